"""A forecast of scores against the better of a straight line and a sigmoid: how much better, and can it be told?

Legend: M runs above the cut-off, B resamples. Must not import torch or scipy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np

LEVEL = 0.95
NUM_RESAMPLES = 1000


class Rivalry(NamedTuple):
    """The root mean square error of the forecast less that of `rival`, the better one in hindsight, with a `LEVEL`
    interval over resampled models; `told` says whether that lies below 0, above it, or neither."""

    rival: str
    difference: float
    low: float
    high: float

    @property
    def told(self) -> Literal["better", "worse", "not told apart"]:
        """What the interval says."""
        return "better" if self.high < 0 else "worse" if self.low > 0 else "not told apart"

    def scaled(self, unit: float) -> Rivalry:
        """The same in another unit."""
        return Rivalry(self.rival, unit * self.difference, unit * self.low, unit * self.high)


def against_rivals(
    forecast_M: np.ndarray,
    rivals: Mapping[str, np.ndarray],
    truth_M: np.ndarray,
    model_M: np.ndarray,
    *,
    seed: int = 0,
) -> Rivalry | None:
    """None without runs. Resamples draw models with all their checkpoints; runs without a name are models.

    >>> against_rivals(np.array([0.5]), {"line": np.array([0.4])}, np.array([0.5]), np.array(["a"])).told
    'better'
    """
    if not truth_M.size:
        return None
    squares = {name: (guess_M - truth_M) ** 2 for name, guess_M in rivals.items()}
    rival = min(squares, key=lambda name: float(squares[name].mean()))
    ours_M, theirs_M = (forecast_M - truth_M) ** 2, squares[rival]
    counts_BM = model_counts(model_M, NUM_RESAMPLES, np.random.default_rng(seed))
    total_B = counts_BM.sum(1)
    difference_B = np.sqrt(counts_BM @ ours_M / total_B) - np.sqrt(counts_BM @ theirs_M / total_B)
    low, high = np.quantile(difference_B, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Rivalry(rival, float(np.sqrt(ours_M.mean()) - np.sqrt(theirs_M.mean())), float(low), float(high))


def model_counts(model_N: np.ndarray, num_resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Counts [B, N] of a bootstrap over models, a model's checkpoints together; unnamed runs are models."""
    names = [name or number for number, name in enumerate(model_N.tolist())]
    unique = list(dict.fromkeys(names))
    position_N = np.array([unique.index(name) for name in names])
    counts_BU = rng.multinomial(len(unique), np.full(len(unique), 1 / len(unique)), size=num_resamples)
    return counts_BU[:, position_N]
