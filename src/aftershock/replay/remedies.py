"""Which changes removed the spike, the smallest first, what each costs on healthy steps, and how to go on with it.

Must not import the runner.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from aftershock.replay.response import Baseline, Effect, Response, cost, effect

MILD = (
    "skip",
    "reorder",
    "clip*2",
    "clip*1.05",
    "policy:stable-adamw",
    "lr=before",
    "lr*0.9",
    "qk-clip",
    "z-loss",
    "float64:loss",
    "float32:loss",
    "hold:v",
    "eps",
    "lr*0.5",
    "wd",
    "beta",
    "lr*0.1",
    "qk-norm",
    "float",
    "dropout",
)
"""Beginnings of cells' names from the smallest change of a run to the largest; others are evidence, no remedies."""
CHEAP = 0.01
"""Log units of the loss on healthy steps below which a cost does not put one remedy before another."""


class Remedy(NamedTuple):
    """A cell without the spike. `cost`: log units of the loss on healthy steps, nan where it was not measured;
    `policy`: how to go on with it, a policy of the guard where one does it."""

    cell: str
    cost: float
    effect: Effect
    policy: str
    words: str


def remedies(
    responses: Mapping[str, Response],
    losses: Mapping[str, Mapping[int, float]],
    since: Mapping[str, int],
    *,
    shams: Sequence[Response],
    control: Mapping[int, float],
    base: Baseline,
    eps: float = math.nan,
) -> list[Remedy]:
    """Cells that removed the spike, the smallest change first: cheap ones by the order of `MILD`, then by their cost.

    Empty where no sham ran: a remedy counts only against its sham. `eps` is the optimizer's present one.
    """
    found: list[Remedy] = []
    for name, response in responses.items():
        order = _mildness(name)
        if order is None or response.present or not shams:
            continue
        paid = cost(losses[name], control, base, since=since[name])
        found.append(_remedy(name, response, paid, shams, eps))
    return sorted(found, key=lambda one: (_dear(one.cost), _mildness(one.cell)))


def _remedy(name: str, response: Response, paid: float, shams: Sequence[Response], eps: float) -> Remedy:
    against = effect([response], shams)
    words = f"{name} removes it; of {against.num_shams} shams {1 - against.sham_removed:.0%} still spike"
    if math.isfinite(paid):
        words += f"; on healthy steps it costs {paid:+.3f} in ln loss"
    return Remedy(name, paid, against, policy_for(name, eps), words)


def policy_for(name: str, eps: float = math.nan) -> str:
    """How to go on as that cell did: what to give `Guard` as its policy, or what to build the run with.

    >>> policy_for("lr*0.5"), policy_for("eps*1e3", 1e-8)
    ('BackOff(factor=0.5)', 'EpsSwitch(eps=1e-05)')
    """
    head, _, option = name.partition(":")
    head, sign, value = head.partition("*") if "*" in head else head.partition("=")
    number = _number(value)
    if head == "lr" and sign == "*":
        return f"BackOff(factor={number:g})"
    if head == "eps":
        return f"EpsSwitch(eps={number * eps if sign == '*' else number:g})"
    if head in ("beta1", "beta2"):
        return f'BetaSwitch({head}={number:g}, moments="recompute")'
    if head == "wd" and number == 0:
        return f'DecaySwitch(names=("{"*embed*" if option == "embeddings" else "*"}",))'
    texts = {
        "clip": "ZClip()",
        "policy": "StableAdamW()",
        "qk-clip": "QKClip(layers=..., max_logits=...)",
        "qk-norm": "a model with q and k normalised, from this snapshot on",
        "z-loss": "ZLossSwitch(dial=...)",
        "float32": "PrecisionSwitch(apply=...)",
        "float64": "PrecisionSwitch(apply=..., dtype=torch.float64)",
        "hold": "the optimizer with amsgrad=True, from this snapshot on",
        "wd": f"weight_decay {sign}{value}, from this snapshot on",
        "dropout": f"dropout {sign}{value}, from this snapshot on",
    }
    return texts.get(head, "Ladder()")


def _number(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        return math.nan


def _mildness(name: str) -> int | None:
    return next((i for i, start in enumerate(MILD) if name.startswith(start)), None)


def _dear(paid: float) -> float:
    return 0.0 if math.isnan(paid) or paid < CHEAP else paid
