"""What a policy is: it sees a step before and after the optimizer takes it, and says what to do.

`Seen` is the same on every rank, so is every action; only the guard carries actions out. A policy may edit gradients
before the step or weights after it (clips, resets); it must select with `where`, never multiply by a mask.
Must not import the guard itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from aftershock.signals.detect.combine import Cause
from aftershock.signals.detect.rule import Verdict


class Seen(NamedTuple):
    """One step in numbers, all-reduced. `step` counts accepted optimizer steps, `batch_id` is the data's own clock.

    `verdicts` holds what is not ok, by signal: "loss", "grad_norm" (before clipping), "update_norm" (in `after_step`,
    of the update just taken). `healthy` are the steps of snapshots that can be gone back to, oldest first.
    """

    step: int
    batch_id: int
    loss: float
    grad_norm: float
    update_norm: float
    lr: float
    verdicts: Mapping[str, Verdict]
    cause: Cause | None
    healthy: tuple[int, ...]


class Live(NamedTuple):
    """What a policy may edit: the live model and optimizer, and the parameters by name."""

    model: nn.Module
    optimizer: Optimizer
    params: Mapping[str, Tensor]


class Continue(NamedTuple):
    """Take the step (before it), go on (after it)."""

    reason: str = ""
    """Not empty where the policy changed something: it becomes an event."""


class SkipStep(NamedTuple):
    """Do not take this step: weights, moments, counters and schedule stay as they are."""

    reason: str


class ScaleLR(NamedTuple):
    """Take the step, with every rate times `factor` for `steps` steps, then back to the schedule over `rewarm`.

    An empty `reason` continues what was told before: it is no event of its own.
    """

    factor: float
    steps: int
    rewarm: int
    reason: str


class Rewind(NamedTuple):
    """Go back to the snapshot of step `to_step` and on from there.

    `skip` are batch ids [start, stop) not to be trained on (again); `lr_factor` scales the rates for `lr_steps` steps,
    then back to the schedule over `rewarm`; `reset` zeroes moments after the restore.
    """

    to_step: int
    skip: tuple[int, int]
    reason: str
    lr_factor: float = 1.0
    lr_steps: int = 0
    rewarm: int = 0
    reset: Literal["none", "first", "both"] = "none"


class Stop(NamedTuple):
    """End the run, state restored to the last healthy snapshot, with a report."""

    reason: str


Action = Continue | SkipStep | ScaleLR | Rewind | Stop

CONTINUE = Continue()


class Policy(ABC):
    """One way to treat instability. All its state goes through `state_dict`, so a resumed run decides alike.

    Example:
        guard = Guard(model, optimizer, policy=ZClip(max_norm=1.0))
    """

    edits: ClassVar[bool] = True
    """Whether it may edit gradients, weights or optimizer; one that only decides says False."""

    @abstractmethod
    def before_step(self, seen: Seen, live: Live) -> Action:
        """Before clipping and the optimizer: gradients lie in `.grad`. What to do with this step."""

    def after_step(self, seen: Seen, live: Live) -> Action:
        """After the optimizer, with the update's norm: what to do now that it is taken. SkipStep is too late here."""
        return CONTINUE

    def after_rewind(self, step: int) -> None:
        """The run is back at `step`: forget what was learned since, keep the count of attempts."""
        return None

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, as JSON types and tensors."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave. Raises ValueError when it is another policy's."""
