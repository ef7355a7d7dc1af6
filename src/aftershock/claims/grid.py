"""The runs of a study as arrays over (rate, seed), and intervals by resampling seeds.

Legend: R rates of the ladder, S seeds, D seeds of one draw. A draw is an index array into the seeds: a statistic of a
draw uses the same seeds in every arm and size, so that what is paired in the study stays paired in the interval.
Must not import torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from aftershock.claims.claim import RunResult
from aftershock.forecast.sensitivity import failing_lr, lr_sensitivity

LEVEL = 0.95
MAX_SEEDS_EXACT = 5
NUM_DRAWS = 3000


class Interval(NamedTuple):
    """`value` of all seeds with a bootstrap percentile interval [`low`, `high`]; nan where nothing was measured."""

    value: float
    low: float
    high: float

    @property
    def bounds(self) -> tuple[float, float]:
        return self.low, self.high


class BestPoint(NamedTuple):
    """log10 of the best rate, and the loss there [nats]."""

    log_lr: float
    loss: float


class Grid:
    """All runs of a study, checked to be a full grid size x arm x rate x seed. Sizes ascend in N, rates too.

    Raises ValueError when there are no runs, or one is missing or there twice. What is made of losses raises it too
    when no run of a size, arm and seed trained at any rate: then there is nothing to compare with.
    """

    def __init__(self, runs: Sequence[RunResult]) -> None:
        if not runs:
            raise ValueError("a criterion needs runs, got none")
        self.num_params = {run.size: run.num_params for run in sorted(runs, key=lambda run: run.num_params)}
        self.sizes = list(self.num_params)
        self.arms = list(dict.fromkeys(run.arm for run in runs))
        self.lrs = np.array(sorted({run.lr for run in runs}))
        self.seeds = sorted({run.seed for run in runs})
        self._runs = {(run.size, run.arm, run.lr, run.seed): run for run in runs}
        cells = list(itertools.product(self.sizes, self.arms, self.lrs.tolist(), self.seeds))
        lost = next((cell for cell in cells if cell not in self._runs), None)
        if lost is not None or len(runs) != len(cells):
            what = f"no run of size {lost[0]}, arm {lost[1]}, lr {lost[2]:g}, seed {lost[3]}" if lost else "a run twice"
            raise ValueError(f"a criterion needs one run for each size, arm, rate and seed; there is {what}")

    @property
    def everyone(self) -> np.ndarray:
        """The draw of all seeds, each once."""
        return np.arange(len(self.seeds))

    @property
    def log_n(self) -> np.ndarray:
        """log10 N of the sizes."""
        return np.log10([self.num_params[size] for size in self.sizes])

    def run(self, size: str, arm: str, lr: float, s: int) -> RunResult:
        """The run of seed number `s`."""
        return self._runs[size, arm, lr, self.seeds[s]]

    def ladder(self, size: str, arm: str, s: int) -> list[RunResult]:
        """The runs of seed number `s` in ascending order of the rate."""
        return [self.run(size, arm, lr, s) for lr in self.lrs.tolist()]

    def capped_RS(self, size: str, arm: str) -> np.ndarray:
        """min(final loss, l0) per rate and seed, a diverged run counting as l0."""
        columns = [self.ladder(size, arm, int(s)) for s in self.everyone]
        for s, column in enumerate(columns):
            if not any(_loss(run) < run.initial_loss for run in column):
                raise ValueError(f"no run of size {size}, arm {arm}, seed {self.seeds[s]} trained; add lower rates")
        return np.array([[min(_loss(run), run.initial_loss) for run in column] for column in columns]).T

    def curve_R(self, size: str, arm: str, draw_D: np.ndarray) -> np.ndarray:
        """Capped losses averaged over the draw."""
        return self.capped_RS(size, arm)[:, draw_D].mean(axis=1)

    def initial_loss(self, size: str, arm: str, draw_D: np.ndarray) -> float:
        """l0 averaged over the draw."""
        return float(np.mean([self.ladder(size, arm, int(s))[0].initial_loss for s in draw_D]))

    def sensitivity(
        self, size: str, arm: str, draw_D: np.ndarray, *, within: tuple[float, float] = (0.0, math.inf)
    ) -> float:
        """LR sensitivity [nats] of the draw's mean curve, over the rates inside `within`."""
        inside_R = (self.lrs >= within[0]) & (self.lrs <= within[1])
        curve_R = self.curve_R(size, arm, draw_D)[inside_R]
        # A mean of capped losses can round to a hair above the mean of l0.
        return lr_sensitivity(curve_R, max(self.initial_loss(size, arm, draw_D), float(curve_R.min())))

    def seed_sensitivity_S(self, size: str, arm: str) -> np.ndarray:
        """LR sensitivity [nats] of each seed's own curve."""
        return np.array([self.sensitivity(size, arm, np.array([s])) for s in self.everyone])

    def failing_lr(self, size: str, arm: str, s: int) -> float | None:
        """`forecast.sensitivity.failing_lr` of one seed's curve."""
        ladder = self.ladder(size, arm, s)
        return failing_lr(self.lrs.tolist(), [run.final_loss for run in ladder], ladder[0].initial_loss)

    def best_point(self, size: str, arm: str, draw_D: np.ndarray) -> BestPoint:
        """Vertex of the parabola, in log rate, through the best point of the draw's mean curve and its neighbours.

        So neither rate nor loss depends on where the ladder's rates happen to lie. At an end of the ladder, the end.
        """
        curve_R, log_lr_R = self.curve_R(size, arm, draw_D), np.log10(self.lrs)
        best = int(curve_R.argmin())
        if 0 < best < len(curve_R) - 1:
            around = slice(best - 1, best + 2)
            square, linear, level = np.polyfit(log_lr_R[around] - log_lr_R[best], curve_R[around], 2)
            if square > 0:  # three equal losses have no vertex
                return BestPoint(log_lr_R[best] - linear / (2 * square), level - linear**2 / (4 * square))
        return BestPoint(float(log_lr_R[best]), float(curve_R[best]))

    def interval(self, statistic: Callable[[np.ndarray], float]) -> Interval:
        """The statistic of all seeds, and its interval over draws of seeds; see `bootstrap`."""
        return bootstrap(statistic, len(self.seeds))


def bootstrap(statistic: Callable[[np.ndarray], float], num_seeds: int) -> Interval:
    """Percentile interval at `LEVEL` of `statistic(draw_D)` over draws of `num_seeds` seeds with replacement.

    Every draw there is up to 5 seeds, 3000 random ones (of a fixed generator) beyond. Draws whose statistic is nan
    measure nothing and are left out.

    Coarse with 3 seeds: there are 27 draws, only 10 of them different, and an extreme one has a chance of 1/27, more
    than the 2.5 % that is cut off; so the interval is nearly the range of what single seeds say. It excludes 0 about
    when all three seeds agree in sign, which three fair coins do one time in four. Read it as `every seed agrees`.
    """
    if num_seeds <= MAX_SEEDS_EXACT:
        draws = np.array(list(itertools.product(range(num_seeds), repeat=num_seeds)))
    else:
        draws = np.random.default_rng(0).integers(num_seeds, size=(NUM_DRAWS, num_seeds))
    cache: dict[tuple[int, ...], float] = {}
    values = []
    for draw_D in np.sort(draws, axis=1):
        key = tuple(draw_D.tolist())
        if key not in cache:
            cache[key] = statistic(draw_D)
        values.append(cache[key])
    known = np.array(values)[~np.isnan(values)]
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if known.size else (math.nan, math.nan)
    return Interval(float(statistic(np.arange(num_seeds))), float(low), float(high))


def slope(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float:
    """Least-squares slope of y against x; pairs whose y is nan are left out, nan when fewer than two are left."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    known = ~np.isnan(y)
    x, y = x[known], y[known]
    if len(np.unique(x)) < 2:
        return math.nan
    return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


def _loss(run: RunResult) -> float:
    """The final loss, infinite where the run diverged."""
    return run.final_loss if run.final_loss is not None and math.isfinite(run.final_loss) else math.inf
