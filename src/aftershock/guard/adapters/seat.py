"""A guard's seat in a loop that belongs to somebody else: the loop's own clock, skip list, veto, and schedule.

One batch id is one optimizer step of that loop, with all its micro-batches: id = epoch * steps per epoch + index. So an
id is a place in the data, whatever was skipped or taken back. Must not import a trainer.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from aftershock.guard import veto
from aftershock.guard.guard import Guard
from aftershock.guard.policy import Rewind, Stop

log = logging.getLogger("aftershock.guard")
TRAINERS_OWN = ("scheduler", "scaler", "accumulate", "driven")


class Clock(NamedTuple):
    """How the loop counts: it stands before step `at`; an epoch has `per_epoch`, each of `samples` over all ranks."""

    at: int
    per_epoch: int
    samples: int | None


class Seat:
    """One run of the loop with its guard; `settings` are those of `Guard`, `kept` the guard's state of before.

    Per step: `open`, any forwards and backwards, `begin` before gradients are clipped, `end` after the optimizer,
    `finish` when the loop's scheduler had its turn. A vetoed step leaves weights, moments and schedule as they are.
    In mode "restart" a rewind is left to the caller: `restart` then holds it, and the loop should stop.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        scheduler: Any,
        clock: Clock,
        settings: Mapping[str, Any],
        kept: Mapping[str, Any] | None = None,
    ) -> None:
        own = {"late": False, **settings}
        if isinstance(scheduler, ReduceLROnPlateau):  # it is rewound too, and stepped by the loop with its metric
            own["extra"] = {**(own.get("extra") or {}), "scheduler": scheduler}
        self.guard = Guard(
            model,
            optimizer,
            scheduler=None if "scheduler" in (own.get("extra") or {}) else scheduler,
            driven=False,
            **own,
        )
        self.restart: Rewind | None = None
        self._model, self._optimizer, self._scheduler = model, optimizer, scheduler
        self._acts = not own.get("dry_run", False)
        self._restarts = self._acts and own.get("mode", "in_place") == "restart"
        if kept is not None or clock.at:
            fresh = self.guard.state_dict() | {"step": clock.at}
            self.guard.load_state_dict(_standing(fresh if kept is None else kept, clock))
        self._stream = self.guard.batches(range(clock.per_epoch), epochs=None, samples_per_batch=clock.samples)
        self._id = -1
        self._taken = False
        self._buffers: list[Tensor] | None = None
        self._schedule: _Schedule | None = None
        self.guard.boundary()

    def open(self, at: int) -> None:
        """Step `at` of the loop begins. What the forward pass of a batch on the skip list does to buffers is undone."""
        while self._id < at and next(self._stream, None) is not None:
            self._id = self.guard.batch_id - 1
        self._buffers = [b.detach().clone() for b in self._model.buffers()] if self._id > at else None

    def begin(self, loss: Tensor | None, batch: Any) -> bool:
        """Whether the optimizer is to step; if not, no parameter has a gradient any more."""
        self._taken = False
        if self._buffers is not None:
            with torch.no_grad():
                for live, old in zip(self._model.buffers(), self._buffers, strict=True):
                    live.copy_(old)
        else:
            if batch is not None:
                self.guard.recorder.keep_batch(self._id, batch)
            self._taken = self.guard.begin(loss)
            self._look()
        if self._taken:
            self.guard.steps.scale_rates()
        else:
            veto.veto_grads(self._optimizer)
            self._schedule = _Schedule(self._scheduler, self._optimizer)
        return self._taken

    def end(self) -> None:
        """The optimizer has stepped, or passed over a vetoed step."""
        if not self._taken:
            return
        self._taken = False
        self.guard.steps.unscale_rates()
        self.guard.end()
        self._look()
        if self._acts and isinstance(self.guard.steps.outcome.action, (Rewind, Stop)):
            self._schedule = _Schedule(self._scheduler, self._optimizer)

    def finish(self) -> None:
        """The loop has stepped its scheduler: take that back where the step was not taken; then a snapshot if due."""
        if self._schedule is not None:
            self._schedule.put_back()
            self._schedule = None
        self.guard.boundary()

    def _look(self) -> None:
        action = self.guard.steps.outcome.action
        if self._restarts and isinstance(action, Rewind):
            self.restart = action


class Seated:
    """What the callbacks of all trainers show of their run. A part of a callback, without an `__init__` of its own."""

    _seat: Seat | None
    _given_up: Stop | None
    _begins: ClassVar[str]
    """The call that starts training, in the trainer's words."""

    @property
    def guard(self) -> Guard:
        """The guard of this run, or the last. Raises ValueError before the first one."""
        if self._seat is None:
            raise ValueError(f"training has not begun: the guard is made when {self._begins} starts")
        return self._seat.guard

    @property
    def restart(self) -> Rewind | None:
        """In mode "restart": the rewind that training was stopped for."""
        return None if self._seat is None else self._seat.restart

    @property
    def stopped(self) -> Stop | None:
        """Why the run was given up, by the policy or because no restart was left; None otherwise."""
        return self._given_up or (None if self._seat is None else self._seat.guard.stopped)


class _Schedule:
    """The scheduler and the rates it writes, as they are now."""

    def __init__(self, scheduler: Any, optimizer: Optimizer) -> None:
        self._scheduler, self._optimizer = scheduler, optimizer
        self._state = None if scheduler is None else copy.deepcopy(scheduler.state_dict())
        self._groups = [copy.deepcopy({k: v for k, v in g.items() if k != "params"}) for g in optimizer.param_groups]

    def put_back(self) -> None:
        if self._state is None:
            return
        self._scheduler.load_state_dict(self._state)
        for group, old in zip(self._optimizer.param_groups, self._groups, strict=True):
            for key, value in old.items():
                if isinstance(value, Tensor):
                    group[key].copy_(value)
                else:
                    group[key] = value


def check_settings(settings: Mapping[str, Any], trainer: str) -> None:
    """Raises ValueError for settings that are the trainer's own business."""
    wrong = [name for name in TRAINERS_OWN if name in settings]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: the guard takes this from the {trainer}; leave it out")


def _standing(state: Mapping[str, Any], clock: Clock) -> dict[str, Any]:
    """A guard's state, with its stream where the loop stands: only the loop knows that after a resume."""
    epoch = clock.at // clock.per_epoch
    place = {
        "next_id": clock.at,
        "epoch": epoch,
        "call_epoch": None,
        "unit": None,
        "starts": [[e, e * clock.per_epoch] for e in range(epoch + 1)],
        "draws": [],
        "mark": None,
    }
    return {**state, "stream": {**state["stream"], **place}}
