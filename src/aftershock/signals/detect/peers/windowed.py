"""What rules share that judge each value by a window of the last ones, and let every value enter it.

Must not import anything else of aftershock but the interface and windows.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple, final

from aftershock.signals.detect.rule import Rule, Step
from aftershock.signals.detect.windows import push


class WindowState(NamedTuple):
    """The last values, oldest first."""

    window: tuple[float, ...]


class Windowed(Rule[WindowState]):
    """Judges a value by the last `window` before it; the value then enters, whatever the verdict."""

    window: int

    @abstractmethod
    def fires(self, window: tuple[float, ...], value: float) -> bool:
        """Whether `value` is a spike after `window`, which holds at most `size` values, at the start none."""

    @property
    def size(self) -> int:
        """How many values the window holds."""
        return self.window

    @final
    def init(self) -> WindowState:
        return WindowState(())

    @final
    def update(self, state: WindowState, value: float) -> Step[WindowState]:
        verdict = "spike" if self.fires(state.window, value) else "ok"
        return Step(WindowState(push(state.window, value, self.size)), verdict)
