"""Shrink the gradient of the embedding (GLM-130B, arXiv 2210.02414, section 3): alpha E + (1 - alpha) stop_grad(E).

Must not import the guard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from aftershock.guard.policies.editor import Editor
from aftershock.guard.policies.gradients import gradients, scale
from aftershock.guard.policies.saved import require
from aftershock.guard.policy import CONTINUE, Action, Live, Seen
from aftershock.signals.places import match


@dataclass(kw_only=True, eq=False)
class EmbeddingShrink(Editor):
    """Multiplies the gradient of the parameters `names` (patterns) by alpha, which goes linearly to 1 over `steps`.

    `steps` = 0 keeps alpha. Under Adam a *constant* alpha hardly changes the embedding's own step, because Adam divides
    it out again: it acts through eps, through the global clip norm (if the guard's norm is taken after it), and while
    alpha changes. With SGD it is a rate of its own.
    A tied embedding is refused in this form: its gradient also holds the output's share. There, and whenever the global
    norm is to see it, use `attach(model.embed)` with names=(): the forward form, which shrinks the input path only.

    Example:
        policy = EmbeddingShrink(names=("embed.weight",), alpha=0.1, steps=6000)
    """

    SAVED: ClassVar[tuple[str, ...]] = ("steps_taken",)

    names: tuple[str, ...] = ("*embed*",)
    alpha: float = 0.1
    steps: int = 0

    _steps_taken: int = field(default=0, init=False, repr=False)
    _attached: bool = field(default=False, init=False, repr=False)
    _checked: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        require(self, alpha=0, steps=0)
        self.names = (self.names,) if isinstance(self.names, str) else tuple(self.names)
        if self.alpha > 1:
            raise ValueError(f"EmbeddingShrink: alpha must lie in [0, 1], got {self.alpha}")

    @property
    def alpha_now(self) -> float:
        """The factor of the step to come."""
        if not self.steps:
            return self.alpha
        return min(1.0, self.alpha + (1 - self.alpha) * self._steps_taken / self.steps)

    def attach(self, module: nn.Module) -> RemovableHandle:
        """Shrink what flows back through the output of `module` from its next forward on; `handle.remove()` ends it."""
        self._attached = True

        def shrink(_: nn.Module, args: Any, output: Tensor) -> Tensor:
            alpha = self.alpha_now
            # detach() + alpha (x - detach()) has the output's own bits, for any alpha.
            return output if alpha == 1 else output.detach() + alpha * (output - output.detach())

        return module.register_forward_hook(shrink)

    def edit(self, seen: Seen, live: Live) -> Action:
        if self.names:
            chosen = match(self.names, live.params, what="parameter")
            if not self._checked:
                _refuse_tied(live, chosen)
                self._checked = True
            now = gradients(live, names=chosen)
            scale(now.grads, [self.alpha_now] * len(now.grads))
        elif not self._attached:
            raise ValueError("EmbeddingShrink has no names and is attached to no module; it would do nothing")
        return CONTINUE  # acts at every step by definition: no event

    def after_step(self, seen: Seen, live: Live) -> Action:
        self._steps_taken += 1
        return CONTINUE


def _refuse_tied(live: Live, chosen: Sequence[str]) -> None:
    wanted = {id(live.params[name]): name for name in chosen}
    seen: dict[int, str] = {}
    for name, param in live.model.named_parameters(remove_duplicate=False):
        if id(param) in wanted:
            if id(param) in seen:
                raise ValueError(
                    f"{seen[id(param)]} and {name} are one tensor: shrinking its gradient would shrink the output's "
                    "share too; use EmbeddingShrink(names=()) and attach(the embedding module)"
                )
            seen[id(param)] = name
