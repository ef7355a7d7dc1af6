"""What one replay is made of: the `Run` that an edit changes, the `Edit`, and the `Cell` that names it.

A run is a plain loop over steps; everything that an edit may change about it is an attribute here. Who writes an edit
needs this file only. Must not import the runner, the lab or any edit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor, nn

    from aftershock.guard.state import Training
    from aftershock.workload import Workload

StepHook = Callable[[int], None]
"""Called with the loop's step."""


class Window(NamedTuple):
    """Where the spike lay, in steps of the loop, a half-open range: `end` is the first step that is calm again.

    `start` is the step that the suspect snapshot stands before: the first one to be replayed.
    """

    start: int
    onset: int
    peak: int
    end: int

    @property
    def length(self) -> int:
        """The spike's own steps, at least 1."""
        return max(1, self.end - self.onset)


class Run:
    """One replay under way. An edit sets what it wants otherwise; all else stays as it was recorded.

    The loop, for each step: `before_step` hooks; for each micro-batch of `batch(index_of(step))` the gradient of
    `loss(model, transform(part)) / accumulate`; `after_backward` hooks, gradients in `.grad`; clip to `clip_norm`;
    optimizer; scheduler; gradients to None; `after_step` hooks; `keep_going(step, loss)`, False ends the replay.

    - `step`, `part`: the step under way and its micro-batch, for a `transform` that minds them
    - `index_of`: loop step to batch index, as recorded by default; `batch`: that index's batch
    - `transform`: a micro-batch, just as `loss` gets it, to the one to train on
    - `undo`: called last to first when the replay is over, also after an error. Weights, optimizer state and settings
      (`param_groups`), schedule and random numbers go back by themselves; whatever else an edit changes (a dtype, a
      module, a hook, `requires_grad`, dropout rates) it must put back here: the same objects, bit for bit

    Random numbers of an edit come from a `torch.Generator` of its own, else every dropout mask after it moves.
    """

    def __init__(self, workload: Workload, training: Training, window: Window) -> None:
        self.workload = workload
        self.training = training
        self.window = window
        self.step = window.start
        self.part = 0
        self.index_of: Callable[[int], int] = _same
        self.batch: Callable[[int], Any] = workload.batch
        self.transform: Callable[[Any], Any] = _same
        self.loss: Callable[[nn.Module, Any], Tensor] = workload.loss
        self.clip_norm: float | None = workload.clip_norm
        self.before_step: list[StepHook] = []
        self.after_backward: list[StepHook] = []
        self.after_step: list[StepHook] = []
        self.keep_going: Callable[[int, float], bool] = _always
        self.undo: list[Callable[[], object]] = []


class Edit(ABC):
    """One thing that is otherwise. The same edit may be applied to many runs, so it keeps no state of its own.

    Example:
        class Clip(Edit):
            def apply(self, run: Run) -> None:
                run.clip_norm = 0.1
    """

    @property
    def first_step(self) -> int | None:
        """The loop step from which it acts; None from the snapshot on. What comes before is shared between cells."""
        return None

    @abstractmethod
    def apply(self, run: Run) -> None:
        """Change `run`; called once, when it stands before `first_step`, weights and optimizer as they were then.

        Raises ValueError, with nothing changed, where the edit means nothing for this workload.
        """


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One replay with a name: `family` groups what answers one question ("control", "sham", "rate", ..).

    `full`: its answer needs the full length, so it is never stopped early.
    """

    name: str
    family: str
    edit: Edit
    full: bool = False


class Unchanged(Edit):
    """Nothing is otherwise: the control."""

    def apply(self, run: Run) -> None:
        return None


CONTROL = Cell(name="control", family="control", edit=Unchanged())


def _same(value: Any) -> Any:
    return value


def _always(step: int, loss: float) -> bool:
    return True
