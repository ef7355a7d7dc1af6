"""A forecast set against runs of its size that were trained: how far it was off, and how often its intervals held.

Legend: a rung is a step of the ladder of rates. Reads a forecast and runs; fits nothing. Must not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from aftershock.forecast.failing import FailingRate, next_rate
from aftershock.forecast.fits import Interval
from aftershock.forecast.observations import QUANTITIES, Observations, Reading


class SeedCheck(NamedTuple):
    """One seed of the size: it trains at `low` and fails from `high` on (infinite: at no rate of the ladder).

    `rungs`: by how many rungs the rate foretold lies above (below: negative) the one found; None where no rate failed
    or all did. `inside`: whether the forecast's interval meets the bracket.
    """

    seed: int
    low: float
    high: float
    rungs: float | None
    inside: bool


class QuantityCheck(NamedTuple):
    """Of `num_runs` runs, over all rates of the ladder, those that have the quantity within their rate's interval."""

    key: str
    num_inside: int
    num_runs: int

    @property
    def title(self) -> str:
        """Its name in words."""
        return QUANTITIES[self.key].title


class Check(NamedTuple):
    """What runs of the size showed. `rungs`: the mean over seeds, None where the forecast or the finding is open."""

    num_runs: int
    seeds: tuple[SeedCheck, ...]
    rungs: float | None
    quantities: tuple[QuantityCheck, ...]

    @property
    def words(self) -> str:
        """One sentence."""
        met = sum(seed.inside for seed in self.seeds)
        found = "at no rate of the ladder" if self.rungs is None else f"{abs(self.rungs):.2g} rungs from the one found"
        if self.rungs is not None and abs(self.rungs) < 0.005:
            found = "the one found"
        held = ", ".join(f"{one.title} {one.num_inside}/{one.num_runs}" for one in self.quantities)
        return (
            f"Trained since: the failing rate foretold is {found}; its interval holds for {met} of {len(self.seeds)} "
            f"seeds. Signals within their intervals: {held or 'none was forecast'}."
        )


def check_failing(failing: FailingRate, later: Observations, rates: Sequence[float]) -> tuple[SeedCheck, ...]:
    """One row a seed; empty where no failing rate was foretold."""
    rate, ladder_rate = failing.rate, failing.ladder_rate
    if rate is None or ladder_rate is None:
        return ()
    rows = []
    for curve in later.curves:
        low, high = (10**end for end in curve.bracket)
        known = 0 < low and high < math.inf
        rungs = rungs_between(next_rate(rates, high), ladder_rate, rates) if known else None
        rows.append(SeedCheck(curve.seed, low, high, rungs, rate.low <= high and rate.high >= low))
    return tuple(rows)


def check_quantity(key: str, by_rate: Sequence[tuple[float, Interval]], later: Observations) -> QuantityCheck:
    """Over the runs with the quantity whose rate is of the ladder; a bound counts where it meets the interval."""
    known = {lr: Reading(_decades(interval.low), _decades(interval.high)) for lr, interval in by_rate}
    pairs = [(run.readings[key], known[run.lr]) for run in later.runs if key in run.readings and run.lr in known]
    return QuantityCheck(key, sum(seen.low <= own.high and seen.high >= own.low for seen, own in pairs), len(pairs))


def rungs_between(found: float, foretold: float, rates: Sequence[float]) -> float:
    """How many steps of the ladder `foretold` lies above `found`; beyond its ends the outer steps go on."""
    return _rung(foretold, rates) - _rung(found, rates)


def mean_rungs(seeds: Sequence[SeedCheck]) -> float | None:
    """None where there is no seed, or one of them has no number."""
    known = [seed.rungs for seed in seeds if seed.rungs is not None]
    return sum(known) / len(known) if known and len(known) == len(seeds) else None


def _rung(lr: float, rates: Sequence[float]) -> float:
    logs = [math.log10(rate) for rate in rates]
    at = math.log10(lr)
    index = max(1, min(len(logs) - 1, sum(log < at for log in logs)))
    low, high = logs[index - 1], logs[index]
    return index - 1 + (at - low) / (high - low)


def _decades(value: float) -> float:
    return math.log10(value) if value > 0 else -math.inf
