"""A row of a log, and what was odd about the log: said once, counted after that.

Must not import anything else of aftershock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Row(NamedTuple):
    """Named numbers of one step. `where` is what to call the row in a sentence."""

    where: str
    step: int
    values: dict[str, float]


class Follow(NamedTuple):
    """How to wait for more of a file: look every `poll_s` seconds, until nothing came for `idle_s` (None: for ever)."""

    poll_s: float = 0.5
    idle_s: float | None = None


class Problems:
    """What was odd. The first of each kind goes to `tell` at once, the rest are counted.

    Example:
        problems = Problems("log.csv", print)
        problems.add("cell/loss", "line 3: loss is 'abc', not a number; left out")
    """

    def __init__(self, name: str, tell: Callable[[str], None]) -> None:
        self._name = name
        self._tell = tell
        self._counts: dict[str, int] = {}
        self.sentences: list[str] = []

    def add(self, kind: str, sentence: str) -> None:
        count = self._counts.get(kind, 0)
        self._counts[kind] = count + 1
        if count == 0:
            self._say(sentence)

    def count(self, kind: str) -> int:
        return self._counts.get(kind, 0)

    def summarise(self, words: Callable[[str], str] = str) -> None:
        """Say how often each kind came, for those that came more than once."""
        for kind, count in self._counts.items():
            if count > 1:
                self._say(f"{words(kind)}: {count:,} times in all")

    def _say(self, sentence: str) -> None:
        self.sentences.append(f"{self._name}: {sentence}")
        self._tell(self.sentences[-1])


def number(cell: object) -> float | None:
    """A number from a cell or a JSON value; None when it is no number. `nan`, `inf` and the like are numbers."""
    if isinstance(cell, bool):
        return None
    if isinstance(cell, (int, float)):
        return float(cell)
    if isinstance(cell, str):
        try:
            return float(cell)
        except ValueError:
            return None
    return None
