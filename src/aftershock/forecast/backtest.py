"""Forecasts of sizes that were trained, each from smaller ones and from some of the seeds, set against all their runs:
how far the failing rate was off, and how often the intervals held.

Legend: a repeat is one forecast; a block of seeds is what one repeat may see. Trains nothing. Must not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from aftershock.forecast.check import Check
from aftershock.forecast.fits import LEVEL, Interval
from aftershock.forecast.observations import QUANTITIES, Observations, read_observations
from aftershock.forecast.outlook import forecast, plain, size_of

SCHEMA = 1
FIT_SEEDS = 3
SAME = 1e-9
"""Rungs that are no difference: they come of logarithms."""
FAILING = "failing_rate"
"""Key of the failing rate among the quantities of a tally."""


class Repeat(NamedTuple):
    """The forecast of `target` from `sizes` and `seeds`; `times`: its parameters over those of the largest of them.

    `rate` and `check` are None where it was refused, and `refused` says why.
    """

    target: str
    sizes: tuple[str, ...]
    seeds: tuple[int, ...]
    times: float
    rate: Interval | None
    check: Check | None
    refused: str


class Tally(NamedTuple):
    """Of `of` intervals of one quantity over all repeats, how many held; `lowest` and `highest` share of a repeat."""

    key: str
    title: str
    held: int
    of: int
    lowest: float
    highest: float

    @property
    def share(self) -> float:
        """Held of all."""
        return self.held / self.of


class Backtest(NamedTuple):
    """All repeats, the tallies of their intervals at `level`, and of the failing rates how many came within a rung."""

    schema: int
    study: str
    arm: str
    level: float
    repeats: tuple[Repeat, ...]
    within_a_rung: int
    num_rungs: int
    tallies: tuple[Tally, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists; what is not finite is null."""
        return plain(self)


def backtest_study(
    folders: Sequence[str | Path],
    *,
    arm: str = "",
    fit_seeds: int = FIT_SEEDS,
) -> Backtest:
    """Forecast every size that has two smaller ones, from the sizes up to each of those, by each block of seeds.

    The runs of a size check every forecast of it, whatever their seed: no fit sees a run of its target. Raises
    ValueError as `read_observations` does, for fit_seeds below 1, and where there are fewer than three sizes.

    Example:
        for tally in backtest_study(["out/small", "out/later"], arm="no_qk_norm").tallies:
            print(tally.title, tally.held, tally.of)
    """
    return backtest(read_observations(folders, arm=arm), fit_seeds=fit_seeds)


def backtest(found: Observations, *, fit_seeds: int = FIT_SEEDS) -> Backtest:
    """`backtest_study` of runs already read."""
    if fit_seeds < 1:
        raise ValueError(f"a forecast takes at least one seed, got {fit_seeds}")
    if len(found.sizes) < 3:
        raise ValueError(
            f"{found.study} has {len(found.sizes)} sizes, {', '.join(found.sizes)}; a backtest forecasts a size from "
            "two smaller ones: add sizes"
        )
    blocks = seed_blocks(sorted({run.seed for run in found.runs}), fit_seeds)
    repeats = [
        _repeat(found, largest, to, seeds)
        for to in range(2, len(found.sizes))
        for largest in range(1, to)
        for seeds in blocks
    ]
    rungs = [one.check.rungs for one in repeats if one.check is not None and one.check.rungs is not None]
    return Backtest(
        schema=SCHEMA,
        study=found.study,
        arm=found.arm,
        level=LEVEL,
        repeats=tuple(repeats),
        within_a_rung=sum(abs(off) <= 1 + SAME for off in rungs),
        num_rungs=len(rungs),
        tallies=tallies(repeats),
        notes=found.notes,
    )


def seed_blocks(seeds: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """Blocks of `size` seeds in their order; those left over join the last. All of them where there are fewer.

    >>> seed_blocks([0, 1, 2, 3, 4, 5, 6], 3)
    [(0, 1, 2), (3, 4, 5, 6)]
    """
    starts = list(range(0, max(1, len(seeds) - size + 1), size))
    return [tuple(seeds[at:end]) for at, end in zip(starts, [*starts[1:], len(seeds)], strict=True)]


def tallies(repeats: Sequence[Repeat]) -> tuple[Tally, ...]:
    """By quantity, in the order of the forecast; those that no repeat had are left out."""
    counts: dict[str, list[tuple[int, int]]] = {}
    for one in repeats:
        if one.check is None:
            continue
        if one.check.seeds:
            counts.setdefault(FAILING, []).append((sum(seed.inside for seed in one.check.seeds), len(one.check.seeds)))
        for quantity in one.check.quantities:
            counts.setdefault(quantity.key, []).append((quantity.num_inside, quantity.num_runs))
    return tuple(_tally(key, counts[key]) for key in (FAILING, *QUANTITIES) if key in counts)


def _tally(key: str, counts: Sequence[tuple[int, int]]) -> Tally:
    shares = [held / of for held, of in counts]
    title = "failing rate" if key == FAILING else QUANTITIES[key].title
    held, of = (sum(pair[i] for pair in counts) for i in (0, 1))
    return Tally(key, title, held, of, min(shares), max(shares))


def _repeat(found: Observations, largest: int, to: int, seeds: tuple[int, ...]) -> Repeat:
    sizes = tuple(found.sizes[: largest + 1])
    target, later = found.sizes[to], found.only(found.sizes[to])
    seen = found._replace(runs=tuple(run for run in found.runs if run.size in sizes and run.seed in seeds))
    times = later.runs[0].num_params / max(run.num_params for run in found.runs if run.size in sizes)
    try:
        outlook = forecast(seen, size_of(later.runs[0]), later=later)
    except ValueError as error:
        return Repeat(target, sizes, seeds, times, None, None, str(error))
    return Repeat(target, sizes, seeds, times, outlook.failing.rate, outlook.check, outlook.failing.refused)
