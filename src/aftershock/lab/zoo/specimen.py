"""A specimen of the zoo: a training run with a known end, an instability whose cause is known or a healthy run.

What a run depends on as state (weights, optimizer, schedule, data) is in its `Workload`. What merely happens to the
process (a flipped bit, a checkpoint loaded wrongly) is a `Disturbance`: it strikes once, and a replay from a snapshot
does not see it again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from aftershock.causes import CAUSES
from aftershock.workload import Workload

Kind = Literal["spontaneous", "planted", "healthy"]
"""spontaneous: the settings make it spike, at a step nobody chose; planted: a fault at a known step; healthy: none."""


class Disturbance(ABC):
    """Something that happens to the process at a step, once, and is no part of what a snapshot holds."""

    @abstractmethod
    def before_forward(self, index: int) -> None:
        """Called with the global batch index before its forward pass."""

    @abstractmethod
    def after_backward(self, index: int) -> None:
        """Called with the global batch index when its gradients lie in `.grad`, before clipping."""


class Trial(NamedTuple):
    """One run to train: the workload, and what will happen to it."""

    workload: Workload
    disturbance: Disturbance | None


class Build(Protocol):
    """Makes a trial. `faulty=False` gives the twin without the cause: of a planted fault the same weights, data and
    rates; of a spontaneous specimen the same run with the one setting changed that makes it spike."""

    def __call__(self, seed: int, *, faulty: bool = True) -> Trial: ...


@dataclass(frozen=True, kw_only=True)
class Specimen:
    """One recipe of the zoo. `steps` is its length; `onset` the first faulty step of a planted fault, else None."""

    name: str
    kind: Kind
    cause: str
    """A key of `CAUSES`, or "none"."""
    about: str
    """One sentence: what happens, and why."""
    source: str
    steps: int
    build: Build
    onset: int | None = None

    def __post_init__(self) -> None:
        assert self.cause in {*CAUSES, "none"}, self.name
        assert (self.cause == "none") == (self.kind == "healthy"), self.name
        assert (self.onset is not None) == (self.kind == "planted"), self.name
