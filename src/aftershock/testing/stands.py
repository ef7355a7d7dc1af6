"""What stands where the loop expects its guard: the real one with a fault planted around it, or none at all.

Must not judge anything: see `check`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, Self

from torch import Tensor, nn

from aftershock.guard.guard import Guard
from aftershock.guard.steps import Outcome
from aftershock.testing.faults import Planter


def value_of(loss: Tensor | float) -> float:
    """The loss as a number."""
    return float(loss.detach()) if isinstance(loss, Tensor) else float(loss)


class Stand(ABC):
    """Stands where the loop expects its guard. `calls` counts whole steps that were asked for."""

    def __init__(self, planter: Planter, settings: Mapping[str, Any]) -> None:
        self.planter = planter
        self.settings = dict(settings)
        self.accumulate = int(self.settings.get("accumulate", 1))
        self.events: list[Mapping[str, Any]] = []
        self.losses: dict[int, float] = {}
        self._parts = 0
        self._sum = 0.0

    @property
    def calls(self) -> int:
        return self._parts // self.accumulate

    def batches(self, loader: Any, **how: Any) -> Iterator[Any]:
        for batch in self._batches(loader, **how):
            yield self.planter.batch(self.calls, batch)

    def step(self, loss: Tensor | float, **how: Any) -> Outcome:
        call, last = self.calls, self._parts % self.accumulate == self.accumulate - 1
        if last:
            loss = self.planter.after_backward(call, loss)
        outcome = self._step(loss, last=last, **how)
        self._sum += value_of(loss)
        self._parts += 1
        if last:
            if outcome.taken:
                self.losses[outcome.step] = self._sum  # one that was taken back is overwritten when it comes again
            self._sum = 0.0
            self.planter.before_forward(self.calls)
        return outcome

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    @abstractmethod
    def step_count(self) -> int:
        """Accepted steps so far."""

    @property
    @abstractmethod
    def stopped(self) -> Any:
        """Why the run was stopped, if it was."""

    @abstractmethod
    def close(self) -> None: ...

    @abstractmethod
    def _batches(self, loader: Any, **how: Any) -> Iterator[Any]: ...

    @abstractmethod
    def _step(self, loss: Tensor | float, *, last: bool, **how: Any) -> Outcome: ...


class Guarded(Stand):
    """The real guard; what the loop asks of it beyond the usual goes to it."""

    def __init__(self, planter: Planter, settings: Mapping[str, Any]) -> None:
        Stand.__init__(self, planter, settings)
        model, optimizer = planter.parts
        self._guard = Guard(model, optimizer, **dict[str, Any](self.settings, mirror=self.events.append))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._guard, name)

    @property
    def step_count(self) -> int:
        return self._guard.step_count

    @property
    def stopped(self) -> Any:
        return self._guard.stopped

    def close(self) -> None:
        self._guard.close()

    def _batches(self, loader: Any, **how: Any) -> Iterator[Any]:
        return self._guard.batches(loader, **how)

    def _step(self, loss: Tensor | float, *, last: bool, **how: Any) -> Outcome:
        return self._guard.step(loss, **how)


class Plain(Stand):
    """No guard: what the loop would be without one. Unscales, clips, steps and schedules in the usual order."""

    batch_id = 0
    epoch = 0

    @property
    def step_count(self) -> int:
        return self.calls

    @property
    def stopped(self) -> Any:
        return None

    def close(self) -> None:
        return None

    def _batches(self, loader: Any, *, epochs: int | None = 1, **how: Any) -> Iterator[Any]:
        passed = 0
        while epochs is None or passed < epochs:
            for batch in loader:
                self.batch_id += 1
                yield batch
            passed += 1
            self.epoch += 1

    def _step(self, loss: Tensor | float, *, last: bool, **how: Any) -> Outcome:
        model, optimizer = self.planter.parts
        if not last:
            return Outcome(None, False, self.step_count, self.batch_id, math.nan, math.nan)
        scaler, clip = self.settings.get("scaler"), self.settings.get("clip_norm")
        if scaler is not None:
            scaler.unscale_(optimizer)
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if scaler is not None:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        if self.settings.get("scheduler") is not None:
            self.settings["scheduler"].step()
        optimizer.zero_grad(set_to_none=True)
        return Outcome(None, True, self.step_count, self.batch_id, value_of(loss), math.nan)
