"""What is measured at a step, for the parameters that the optimizer holds at the moment, and met over all ranks.

Must not decide anything, nor import the guard.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from aftershock.guard import veto
from aftershock.guard.agree import Ranks
from aftershock.guard.checks import Faults, check_held
from aftershock.guard.measure import Gradients, Updates
from aftershock.guard.policy import Live
from aftershock.guard.state import Training
from aftershock.signals.ranks import local


class Gauge:
    """Norms of gradients and updates by the optimizer's parameters of the moment. `refresh` before each use.

    `driven`: False where a GradScaler may hand over gradients that still carry its scale.
    """

    def __init__(self, training: Training, ranks: Ranks, *, how: Literal["sample", "all"], driven: bool) -> None:
        self._training, self._ranks, self._driven = training, ranks, driven
        self._how: Literal["sample", "all"] = how
        self._bind()

    def refresh(self) -> bool:
        """Whether the optimizer got or lost parameters since; then they are named anew. Raises as `check_held` does."""
        if self._ids() == self._held_ids:
            return False
        check_held(self._training.model, self._training.optimizer)
        self._bind()
        return True

    def unchanged(self) -> bool:
        """Whether the model still holds the parameters that the optimizer does. Walks the model."""
        own = {id(p) for p in self._training.model.parameters()}
        return all(id(p) in own for p in self.params.values())

    def agree(self, loss: Tensor | None, norm: Tensor, *, step: int, batch_id: int, faults: Faults) -> Tensor:
        """Loss, gradient norm, step, batch and mistakes, the same on all ranks, from one small all-gather."""
        own = self.gradients.squares() if self.gradients.sharded else norm
        scale = self._scale()
        if scale is not None:
            own = own / (scale.square() if self.gradients.sharded else scale)
        row = self._ranks.agree(
            {
                "loss": (0.0 if loss is None else loss, "mean"),
                "norm": (own, "sum" if self.gradients.sharded else "max"),
                "step": (float(step), "same"),
                "batch": (float(batch_id), "same"),
                "fault": (faults.code, "max"),
            },
            device=self.device,
        )
        if self.gradients.sharded:
            row[1].sqrt_()
        return row

    def clip(self, limit: float, norm: Tensor | None) -> None:
        """Clip to `limit`. `norm`: what `gradients.norm()` gave; None when the gradients were edited since."""
        if self.gradients.sharded:
            norm = self._ranks.agree({"norm": (self.gradients.squares(), "sum")}, device=self.device)[0].sqrt()
        elif norm is None:
            norm = self.gradients.norm()
        scale = self._scale()
        if scale is not None:
            norm = norm / scale
        self.gradients.clip(norm, limit=limit, known=norm.device.type == "cpu")

    def update_norm(self) -> Tensor:
        """Of the update since `updates.before()`."""
        how = "sum" if self.gradients.sharded else "max"
        return self._ranks.agree({"update": (self.updates.squares(), how)}, device=self.device)[0].sqrt()

    def _scale(self) -> Tensor | None:
        """What the gradients still carry where a GradScaler leaves unscaling to the fused kernel."""
        return None if self._driven else veto.grad_scale(self._training.optimizer)

    def _ids(self) -> list[int]:
        return [id(p) for group in self._training.optimizer.param_groups for p in group["params"]]

    def _bind(self) -> None:
        training = self._training
        training.read()  # names the parameters that there are now
        self._held_ids = self._ids()
        held = set(self._held_ids)
        self.params = {name: p for name, p in training.params.items() if id(p) in held}
        self.gradients = Gradients(self.params, group=self._ranks.group)
        self.updates = Updates(self.params, how=self._how)
        self.live = Live(training.model, training.optimizer, self.params)
        self.device = local(next(iter(self.params.values()))).device
