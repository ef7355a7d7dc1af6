"""Learning rates scaled for a while: a factor over the schedule for some steps, then back to it.

The factor lies on the rates only while the optimizer steps, so no scheduler ever sees or undoes it, and a checkpoint
holds the schedule's own rates. Must not import the guard.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch.optim import Optimizer


class Scale(NamedTuple):
    """`factor` for `steps` accepted steps, then linearly to 1 over `rewarm` more; `done` of them are behind."""

    factor: float = 1.0
    steps: int = 0
    rewarm: int = 0
    done: int = 0

    def now(self) -> float:
        """The factor of the coming step; exactly 1.0 when it is over.

        >>> [Scale(0.5, 1, 3, done).now() for done in range(5)]
        [0.5, 0.625, 0.75, 0.875, 1.0]
        """
        if self.done < self.steps:
            return self.factor
        part = (self.done - self.steps + 1) / (self.rewarm + 1)
        return 1.0 if part >= 1 else self.factor + (1 - self.factor) * part

    def after_step(self) -> Scale:
        """One accepted step later."""
        new = self._replace(done=self.done + 1)
        return new if new.now() != 1.0 or new.done < self.steps else Scale()


def put_on(optimizer: Optimizer, factor: float) -> list[Any]:
    """Multiply the rate of every group by `factor`; returns the rates' own objects, for `take_off`."""
    own = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * factor
    return own


def take_off(optimizer: Optimizer, own: list[Any]) -> None:
    """The rates as they were before `put_on`, the same objects."""
    for group, lr in zip(optimizer.param_groups, own, strict=True):
        group["lr"] = lr
