"""What all edits share: a check that changes nothing, then the change; hooks on the optimizer's step; a trial loss.

Must not import any edit.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from aftershock.guard.policy import Live
from aftershock.replay.loop import parts
from aftershock.replay.run import Edit, Run
from aftershock.signals.untouched import untouched


class Checked(Edit):
    """An edit that can be asked beforehand: `check` raises what `apply` would, and changes nothing."""

    def apply(self, run: Run) -> None:
        self.check(run)
        self.change(run)

    @abstractmethod
    def check(self, run: Run) -> None:
        """Raises ValueError, in a sentence, where the edit means nothing for this workload."""

    @abstractmethod
    def change(self, run: Run) -> None:
        """Change `run`, which `check` has let through."""


def around_step(run: Run, before: Callable[[], None], after: Callable[[], None]) -> None:
    """Call `before` and `after` right around the optimizer's step: after clipping, before the schedule moves on.

    `after` is called once more when the replay is over, in case the step itself failed; it must bear that.
    """
    optimizer = run.workload.optimizer

    def enter(*_: Any) -> None:
        before()

    def leave(*_: Any) -> None:
        after()

    handles = [optimizer.register_step_pre_hook(enter), optimizer.register_step_post_hook(leave)]
    run.undo += [after, *(handle.remove for handle in handles)]


def live(run: Run) -> Live:
    """What the guard's policies edit, of this run."""
    return Live(run.workload.model, run.workload.optimizer, run.training.params)


def first_part(run: Run) -> Any:
    """The first micro-batch of the step under way, as `run.loss` gets it."""
    index = run.index_of(run.step)
    return run.transform(parts(run.workload, run.batch(index), index)[0])


def try_loss(run: Run, inside: AbstractContextManager[Any]) -> Tensor:
    """The loss of the first micro-batch with `inside` around it: no gradient, and nothing of the run has changed."""
    batch = first_part(run)
    with untouched(run.workload.model, evaluate=False), torch.no_grad(), inside:
        return run.loss(run.workload.model, batch)


def clear_gradients(run: Run) -> None:
    """No gradient is left, of any parameter of model or optimizer."""
    run.workload.optimizer.zero_grad(set_to_none=True)
    run.workload.model.zero_grad(set_to_none=True)


def kind(optimizer: torch.optim.Optimizer) -> str:
    """The optimizer's name, for sentences."""
    return type(optimizer).__name__
