"""The optimizer's moments of the tensors that have a gradient: where they are, RMS_t, zeroing them.

Legend: P places (parameters with a gradient and a state). Written for torch.optim's names of them: `exp_avg`,
`exp_avg_sq`, `momentum_buffer`, `step`. Must not import a policy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from aftershock.guard.policies.gradients import Gradients
from aftershock.guard.policy import Live
from aftershock.signals.pieces import Cut
from aftershock.signals.ranks import local, meet, sharding
from aftershock.signals.tensors import AdamFacts, rms_t_columns

FIRST = ("exp_avg", "momentum_buffer")
SECOND = ("exp_avg_sq", "max_exp_avg_sq")


class Moments(NamedTuple):
    """`places` index the gradients they belong to; `first`, `second` are local pieces [P]; `groups` their settings."""

    places: list[int]
    first: list[Tensor]
    second: list[Tensor]
    steps: list[float]
    groups: list[dict[str, Any]]


def moments(now: Gradients, live: Live) -> Moments:
    """Adam's moments of those of the gradients that have any yet.

    Raises ValueError when the optimizer keeps a state for them but no second moment.
    """
    group_of = groups(live.optimizer)
    found = Moments([], [], [], [], [])
    counters: list[Any] = []
    for place, (name, param) in enumerate(zip(now.names, now.params, strict=True)):
        state = live.optimizer.state.get(param, {})
        if not state:
            continue
        if "exp_avg" not in state or "exp_avg_sq" not in state:
            raise ValueError(
                f"{type(live.optimizer).__name__} keeps no exp_avg and exp_avg_sq for {name}; this policy needs an Adam"
            )
        found.places.append(place)
        found.first.append(local(state["exp_avg"]))
        found.second.append(local(state["exp_avg_sq"]))
        found.groups.append(group_of[param])
        counters.append(state["step"])
    return found._replace(steps=_numbers(counters))


def groups(optimizer: Optimizer) -> dict[Tensor, dict[str, Any]]:
    """The parameter group of each parameter."""
    return {param: group for group in optimizer.param_groups for param in group["params"]}


def betas_of(group: dict[str, Any]) -> tuple[float, float]:
    """Both betas as numbers."""
    first, second = group["betas"]
    return float(first), float(second)


def rms_t(now: Gradients, adam: Moments) -> list[float]:
    """RMS_t = sqrt(mean(g^2 / max(v_hat, eps^2))) of each place of `adam`, on the host, over all ranks.

    v_hat is the second moment as it lies there, debiased: before the optimizer's step that of the steps so far, after
    it with this gradient in. Wortsman et al. 2023 (arXiv 2304.13013), algorithm 2. Cost: one read of g and v.
    """
    if not adam.places:
        return []
    grads = [now.grads[place] for place in adam.places]
    betas = np.array([betas_of(group) for group in adam.groups])
    bias = 1 - betas ** np.array(adam.steps)[:, None]
    eps = np.array([float(group["eps"]) for group in adam.groups])
    facts = AdamFacts(eps, betas[:, 1], bias[:, 0], bias[:, 1])
    cut = Cut([grad.numel() for grad in grads], grads[0].device)
    squares_P = rms_t_columns(cut, grads, adam.second, facts)["norm_rms_t"]
    params = {now.names[place]: now.params[place] for place in adam.places}
    total_P = meet(squares_P[:, None], ["sum"], sharding(params)).flatten().tolist()
    sizes = [max(1, param.numel()) for param in params.values()]
    # v_hat = v / bias: the columns divide by v.
    return [math.sqrt(t * b / n) for t, b, n in zip(total_P, bias[:, 1].tolist(), sizes, strict=True)]


def zero(optimizer: Optimizer, params: Sequence[Tensor], *, restart: bool) -> None:
    """Zero all moments of these parameters, and with `restart` the counter of their bias correction."""
    pieces: list[Tensor] = []
    for param in params:
        state = optimizer.state.get(param, {})
        pieces += [local(state[key]) for key in (*FIRST, *SECOND) if isinstance(state.get(key), Tensor)]
        if restart and "step" in state:
            state["step"] = torch.zeros_like(state["step"]) if isinstance(state["step"], Tensor) else 0
    if pieces:
        torch._foreach_zero_(pieces)


def _numbers(counters: list[Any]) -> list[float]:
    """Step counters on the host: those on a GPU in one transfer."""
    if counters and all(isinstance(one, Tensor) for one in counters):
        return torch.stack([local(one).reshape(()) for one in counters]).tolist()
    return [float(one) for one in counters]
