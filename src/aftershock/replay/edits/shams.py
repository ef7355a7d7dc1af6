"""Shams: something innocent is otherwise, so that what removes the spike by chance is known. Each has several draws.

Must not import other edits than those of the data.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from aftershock.replay.edits.checked import Checked, try_loss
from aftershock.replay.edits.data import Shuffled, Skipped, calm, suspects
from aftershock.replay.run import Run, Window
from aftershock.signals.ranks import local

_SEED = 7919
"""Draw k of a sham uses seeds of its own, k times this prime."""


def random_skip(window: Window, *, draw: int, stop: int | None = None) -> Skipped:
    """As many random batches left out as there are suspects, from the calm steps before them; of these at most half.

    Raises ValueError when fewer than two steps lie between the snapshot and the suspects.
    """
    steps = calm(window)
    count = min(len(suspects(window)), len(steps) // 2)
    if not count:
        raise ValueError("fewer than two steps lie between the snapshot and the suspects: no innocent one to leave out")
    order = torch.randperm(len(steps), generator=_generator(draw))[:count]
    return Skipped(steps=tuple(sorted(steps[i] for i in order.tolist())), stop=stop)


def random_order(window: Window, *, draw: int) -> Shuffled:
    """The calm steps before the suspects in another order."""
    return Shuffled(steps=calm(window), seed=_SEED * draw)


@dataclass(frozen=True, kw_only=True)
class Ulp(Checked):
    """Every trained weight moves to the next number that its type can hold, up or down at random."""

    draw: int = 1

    def check(self, run: Run) -> None:
        if not any(p.requires_grad and p.is_floating_point() for p in run.training.params.values()):
            raise ValueError("no trained parameter is a floating-point tensor")

    @torch.no_grad()
    def change(self, run: Run) -> None:
        numbers = _generator(self.draw)
        for p in run.training.params.values():
            if not (p.requires_grad and p.is_floating_point()):
                continue
            weight = local(p)
            up = torch.randint(2, weight.shape, generator=numbers, dtype=torch.bool).to(weight.device)
            infinity = torch.full_like(weight, torch.inf)
            weight.copy_(torch.nextafter(weight, torch.where(up, infinity, -infinity)))


@dataclass(frozen=True, kw_only=True)
class OtherSeed(Checked):
    """Other random numbers from the snapshot on: other dropout masks, in a model that has them."""

    draw: int = 1

    def check(self, run: Run) -> None:
        drawn = list[bool]()
        try_loss(run, _drawing(drawn))
        if not any(drawn):
            raise ValueError("the loss draws no random number, so another seed changes nothing")

    def change(self, run: Run) -> None:
        seed = _SEED * self.draw
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - the user's code may draw from it
        torch.manual_seed(seed)


@contextlib.contextmanager
def _drawing(drawn: list[bool]) -> Iterator[None]:
    """Adds whether torch, numpy or python has drawn a random number inside."""
    before = _states()
    yield
    drawn.append(_states() != before)


def _states() -> list[Any]:
    numbers = np.random.get_state(legacy=False)  # noqa: NPY002 - see above
    assert isinstance(numbers, dict)
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    return [
        random.getstate(),
        numbers["state"]["pos"],
        torch.get_rng_state().tolist(),
        *(torch.cuda.get_rng_state(device).tolist() for device in devices),
    ]


def _generator(draw: int) -> torch.Generator:
    return torch.Generator().manual_seed(_SEED * draw)
