"""How a step is not taken: weights, moments and step counters stay as they are, whoever calls `optimizer.step()`.

Two ways. "grads": every `.grad` is set to None, which each optimizer of torch passes over; the host must know.
"found_inf": a 0/1 tensor that fused kernels read on the device, so the host need not know. That is a convention inside
torch (GradScaler uses it), so it is tried on a small optimizer of the same kind before it is believed.
Must not import the guard.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Way = Literal["grads", "found_inf"]


def veto_grads(optimizer: Optimizer) -> None:
    """Make the coming `optimizer.step()` pass over every parameter."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = None


class FoundInf:
    """Holds a step on the device. `hold(flag)` before the step, `clear()` after it.

    A live GradScaler sets the same two attributes for the time of its `step`: its flag and ours are joined by maximum,
    its scale is left, and what it had set is put back.

    Example:
        hold = FoundInf(optimizer)
        hold.hold(~torch.isfinite(norm))  # a tensor on the parameters' device
        optimizer.step()
        hold.clear()
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer: Any = optimizer
        self._before: dict[str, Any] | None = None

    def hold(self, flag: Tensor) -> None:
        """`flag`: 0-dim, true or not 0 where the step is to be held."""
        assert self._before is None, "hold() once a step"
        own = vars(self._optimizer)
        self._before = {name: own[name] for name in ("grad_scale", "found_inf") if name in own}
        mine = flag.detach().to(torch.float32)
        theirs = own.get("found_inf")
        self._optimizer.grad_scale = own.get("grad_scale")
        self._optimizer.found_inf = mine if theirs is None else torch.maximum(mine, theirs.to(mine))

    def clear(self) -> None:
        """As it was before `hold`."""
        if self._before is None:
            return
        for name in ("grad_scale", "found_inf"):
            vars(self._optimizer).pop(name, None)
        vars(self._optimizer).update(self._before)
        self._before = None


def grad_scale(optimizer: Optimizer) -> Tensor | None:
    """The scale that the gradients still carry when a GradScaler steps a fused optimizer; None when they carry none."""
    return vars(optimizer).get("grad_scale")


def way_of(optimizer: Optimizer) -> Way:
    """ "found_inf" where a small optimizer of this kind really passes over a step that is held so; else "grads".

    Tried only for groups that are all `fused=True`. The trial builds its own parameters: nothing of the run is touched.
    """
    if not all(group.get("fused") for group in optimizer.param_groups):
        return "grads"
    try:
        return "found_inf" if _obeys(optimizer) else "grads"
    except Exception:  # any failure of the trial says the same: this kind cannot be held so
        return "grads"


def _obeys(optimizer: Optimizer) -> bool:
    like = next(p for group in optimizer.param_groups for p in group["params"])
    settings = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    p = nn.Parameter(torch.ones(4, dtype=like.dtype, device=like.device))
    trial = type(optimizer)([p])  # pyright: ignore[reportCallIssue] - every torch optimizer with fused= has defaults
    trial.param_groups[0].update(copy.deepcopy(settings))
    p.grad = torch.ones_like(p)
    trial.step()
    before = [t.clone() for t in _tensors(trial, p)]
    p.grad = torch.full_like(p, float("nan"))
    held = FoundInf(trial)
    held.hold(torch.ones((), device=p.device))
    trial.step()
    held.clear()
    untouched = all(torch.equal(a, b) for a, b in zip(before, _tensors(trial, p), strict=True))
    p.grad = torch.ones_like(p)
    held.hold(torch.zeros((), device=p.device))
    trial.step()
    held.clear()
    moved = not torch.equal(before[0], p) or float(trial.param_groups[0]["lr"]) == 0.0
    return untouched and moved


def _tensors(optimizer: Optimizer, p: Tensor) -> list[Tensor]:
    return [p.detach(), *(v for v in optimizer.state[p].values() if isinstance(v, Tensor))]
