"""What all policies share that edit a finite step: a non-finite one is skipped, before it reaches any statistic.

Must not import the guard.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from aftershock.guard.policies.incident import is_finite
from aftershock.guard.policies.saved import packed, unpacked
from aftershock.guard.policy import Action, Live, Policy, Seen, SkipStep, Stop

MAX_SKIPS = 10
"""Non-finite steps in a row after which the state is broken, and no editing of gradients helps (MindFormers)."""


class Editor(Policy, ABC):
    """A policy that changes gradients or updates of finite steps. Ten non-finite steps in a row stop the run; put a
    `Ladder` before it in a `Chain` to have it rewound instead."""

    SAVED: ClassVar[tuple[str, ...]]
    """Names of the state's fields, without their underscore: JSON types, dicts of them, or tensors."""
    _skips: int = 0

    @abstractmethod
    def edit(self, seen: Seen, live: Live) -> Action:
        """`before_step` for a step whose loss and gradient norm are finite."""

    def before_step(self, seen: Seen, live: Live) -> Action:
        if is_finite(seen):
            self._skips = 0
            return self.edit(seen, live)
        noted = self.on_nonfinite(seen, live)
        self._skips += 1
        if self._skips >= MAX_SKIPS:
            return Stop(f"loss or gradient not finite {self._skips} times in a row")
        return SkipStep("; ".join(["loss or gradient not finite", *([noted] if noted else [])]))

    def on_nonfinite(self, seen: Seen, live: Live) -> str:
        """What to do about a step that is skipped, besides; in words, or nothing."""
        return ""

    def state_dict(self) -> dict[str, Any]:
        return packed(self, skips=self._skips, **{name: _copy(getattr(self, f"_{name}")) for name in self.SAVED})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        got = unpacked(self, state, ("skips", *self.SAVED))
        for name, value in got.items():
            setattr(self, f"_{name}", _copy(value))


def _copy(value: Any) -> Any:
    """The state handed out must not change with the run: one level of lists and dicts is all there is."""
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copy(item) for item in value]
    return value
