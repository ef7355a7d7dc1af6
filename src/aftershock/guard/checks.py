"""What the guard refuses, in a sentence that says what to do: at attach where it can be known, else at first sight.

Pure looks at the parts of a run; nothing here changes them. Must not import the guard.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from aftershock.guard.state import Stateful


def check_optimizer(model: nn.Module, optimizer: Any) -> None:
    """The optimizer can be guarded, and every parameter it holds is the model's. Raises ValueError otherwise."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"Guard needs the model, an nn.Module, first; got {type(model).__name__}")
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"Guard needs a torch.optim.Optimizer, got {type(optimizer).__name__}; pass the one inside it")
    if isinstance(optimizer, LBFGS):
        raise ValueError(
            "LBFGS evaluates its closure several times a step, so a step cannot be judged before it is taken; use an "
            "optimizer that steps without a closure"
        )
    check_held(model, optimizer)


def check_held(model: nn.Module, optimizer: Optimizer) -> None:
    """Every parameter of the optimizer is one of the model's, and one of them is to be trained."""
    own = {id(p) for p in model.parameters()}
    strange = [
        f"group {g}, parameter {i}, shape {tuple(p.shape)}"
        for g, group in enumerate(optimizer.param_groups)
        for i, p in enumerate(group["params"])
        if id(p) not in own
    ]
    if strange:
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise ValueError(
            f"the optimizer holds a parameter that the model does not ({strange[0]}{more}), so a rewind could not name "
            "it; pass the module that holds all of them (nn.ModuleList([a, b]) for several), and build the optimizer "
            "after the model was moved, wrapped or changed"
        )
    if not own:
        raise ValueError("the model has no parameters; pass the module that is trained")


def check_scheduler(scheduler: Any, optimizer: Optimizer) -> None:
    """The scheduler can be stepped by the guard: once an accepted step, without arguments."""
    if scheduler is None:
        return
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError(
            "ReduceLROnPlateau needs a metric at each step, which the guard does not have; leave scheduler out, pass "
            "it as extra={'scheduler': scheduler} so that it is rewound too, and step it yourself"
        )
    theirs = getattr(scheduler, "optimizer", None)
    if (
        isinstance(scheduler, LRScheduler)
        and theirs is not optimizer
        and getattr(theirs, "optimizer", None) is not optimizer
    ):
        raise ValueError("the scheduler belongs to another optimizer; build it on the one that the guard gets")
    if not isinstance(scheduler, Stateful) or not callable(getattr(scheduler, "step", None)):
        raise ValueError(f"scheduler is a {type(scheduler).__name__}; it needs step, state_dict and load_state_dict")


def check_loss(loss: Any, accumulate: int) -> Tensor:
    """The loss of a step as a detached 0-dim tensor."""
    if isinstance(loss, (int, float)) and not isinstance(loss, bool):
        return torch.tensor(float(loss))
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"guard.step needs the loss, a number or a tensor of one element, got {type(loss).__name__}; pass "
            "output.loss of a model that returns more"
        )
    if loss.numel() != 1:
        hint = f"the micro-batch's loss / {accumulate}" if accumulate > 1 else "loss.mean(), as in backward()"
        raise ValueError(f"guard.step needs one loss, got a tensor of shape {tuple(loss.shape)}; pass {hint}")
    return loss.detach().reshape(())


def check_closure(args: Iterable[Any]) -> None:
    """`optimizer.step(closure)` evaluates the loss inside the step, after it was judged."""
    if any(callable(one) for one in args):
        raise ValueError(
            "optimizer.step(closure) computes loss and gradients inside the step, where the guard cannot judge them; "
            "call loss.backward() yourself and step without a closure"
        )


class SchedulerWatch:
    """Finds out when somebody else steps the scheduler too: its count is not what the guard left."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self.accept()

    def accept(self) -> None:
        """The count is right as it is now."""
        self._count = self._now()

    def check(self) -> None:
        """Raises ValueError when the scheduler moved since."""
        now = self._now()
        if now != self._count:
            raise ValueError(
                f"the scheduler was stepped outside of guard.step (it is at {now}, the guard left it at "
                f"{self._count}), so the rates would run ahead; remove your scheduler.step(), or leave scheduler out "
                "of the Guard and pass it as extra={'scheduler': scheduler}"
            )

    def _now(self) -> Any:
        return getattr(self._scheduler, "last_epoch", None)


class Faults(NamedTuple):
    """Mistakes that one rank may make alone, by the number that goes to the others."""

    no_gradient: bool = False
    changed: bool = False

    @property
    def code(self) -> float:
        """0 when there is none."""
        return float(self.no_gradient + 2 * self.changed)


def raise_fault(code: float, *, here: Faults) -> None:
    """Raises ValueError on every rank when one of them made a mistake."""
    if code == 0:
        return
    where = "" if here.code else "on another rank: "
    if code >= 2:
        raise ValueError(
            f"{where}the model's parameters are others than when the guard was attached (modules were replaced or "
            "moved to new memory); make a new Guard after changing the model"
        )
    raise ValueError(
        f"{where}guard.step without gradients: no parameter has one. Call loss.backward() before each "
        "guard.step(loss), only once, and leave optimizer.zero_grad() and optimizer.step() to the guard"
    )


def check_durable(every: int | None, *, folder: Any, resume: bool | str, driven: bool, group: Any) -> None:
    """Snapshots on disk, every `every` steps, and `resume` can be had."""
    if resume not in (True, False, "past_stop"):
        raise ValueError(f"resume must be True, False or 'past_stop', got {resume!r}")
    if not every:
        if resume:
            raise ValueError("resume needs snapshots on disk; leave save_every out, or give a number of steps")
        return
    if folder is None:
        raise ValueError("resume and save_every need a place: give folder=")
    if not driven:
        raise ValueError(
            "the loop that steps the optimizer here has checkpoints of its own; leave resume and save_every out, and "
            "keep guard.state_dict() with them"
        )
    if group is not None:
        raise ValueError("resume and save_every need group=None: all processes write one snapshot together")


def check_settings(*, clip_norm: float | None, accumulate: int, mode: str) -> None:
    """Numbers and names that the guard is made with."""
    if clip_norm is not None and not 0 < clip_norm < float("inf"):
        raise ValueError(f"clip_norm must be a positive number or None, got {clip_norm}")
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1, got {accumulate}")
    if mode not in ("in_place", "restart"):
        raise ValueError(f"mode must be 'in_place' or 'restart', got {mode!r}")
