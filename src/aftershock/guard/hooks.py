"""The zero-change mode: the guard sits in the optimizer's step hooks, and the training loop stays as it is.

Before each `optimizer.step()` the step is judged; one that is not to be taken is vetoed (see `veto`). Losses come from
a forward hook of the model where it returns one, else the gradient alone decides.
What this cannot do: the caller's `scheduler.step()` moves on with a skipped step, and a rewind takes back a scheduler
only when it was given. Must not import a trainer.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from aftershock.guard import checks, veto
from aftershock.guard.guard import Guard


class Hooked:
    """A guard around somebody else's `optimizer.step()`, from `with` or `attach` on, until the end or `detach`.

    `settings` are those of `Guard`; a `scheduler` or `scaler` given there is taken back on a rewind and never stepped.
    Clear the gradients after each step, as every loop does. `optimizer.step(closure)` is refused.

    Example:
        with Guard.hooked(model, optimizer) as guard:
            train(model, optimizer)
        print(guard.report())
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, **settings: Any) -> None:
        if settings.get("accumulate", 1) != 1:
            raise ValueError(
                "accumulate is not needed here: a step is what optimizer.step() takes, after any backward passes"
            )
        settings["driven"] = False
        self.guard = Guard(model, optimizer, **settings)
        self._model, self._optimizer = model, optimizer
        self._losses: list[Tensor] = []
        self._handles: list[Any] = []
        self._taken = False

    def attach(self) -> Guard:
        """From now on every step of the optimizer is judged."""
        if self._handles:
            raise ValueError("this guard is attached already; detach it first")
        self._handles = [
            self._model.register_forward_hook(self._after_forward),
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
        ]
        return self.guard

    def detach(self) -> None:
        """Leave optimizer and model as they were, and close the guard."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.guard.close()

    def __enter__(self) -> Guard:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def _after_forward(self, model: nn.Module, args: Any, output: Any) -> None:
        if model.training and torch.is_grad_enabled():
            loss = loss_of(output)
            if loss is not None:
                self._losses.append(loss.detach().reshape(()))

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Mapping[str, Any]) -> None:
        checks.check_closure([*args[1:], *kwargs.values()])
        losses, self._losses = self._losses, []
        self._taken = self.guard.begin(torch.stack(losses).mean() if losses else None)
        if self._taken:
            self.guard.steps.scale_rates()
        else:
            veto.veto_grads(optimizer)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Mapping[str, Any]) -> None:
        if self._taken:
            self.guard.steps.unscale_rates()
            self.guard.end()
        # Here and not before the next batch: the caller's scheduler.step() comes after this, also after a rewind.
        self.guard.boundary()


def loss_of(output: Any) -> Tensor | None:
    """The loss in what a model returned: itself, `.loss`, `["loss"]`, or the only scalar of a tuple; else None.

    >>> loss_of((torch.zeros(2, 3), torch.tensor(1.0, requires_grad=True))).item()
    1.0
    """
    if isinstance(output, Tensor):
        found = [output]
    elif isinstance(output, Mapping):
        found = [output.get("loss")]
    elif isinstance(output, (tuple, list)):
        found = list(output)
    else:
        found = [getattr(output, "loss", None)]
    scalars = [one for one in found if isinstance(one, Tensor) and one.numel() == 1 and one.requires_grad]
    return scalars[0] if len(scalars) == 1 else None
