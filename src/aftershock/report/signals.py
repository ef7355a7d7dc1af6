"""The recorded series of a study, read once and thinned to what one page can carry.

Signals of the whole run (losses, attention, output) come first; the many per-tensor ones are left out as a whole, and
counted, when a study is too large for them.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from aftershock.report.series import rounded, thin
from aftershock.store.reader import RunReader, StatSeries

MAX_VALUES = 600_000
"""Numbers on one page, over all runs: about 5 MB of JSON, which still opens at once."""

MIN_POINTS, MAX_POINTS = 32, 400
"""A series thinner than the first no longer shows its shape; more than the second is finer than pixels."""

LOGIT = "attn/blocks.0/max_logit"
LOSS = "loss/train/ce"
EVAL_LOSS = "loss/eval/ce"
FIRST = ("loss/*", "accuracy/*", "attn/*", "output/*", "grad/all/*", "optim/*")
"""Signals that are always kept."""


@dataclass(frozen=True, kw_only=True)
class Signals:
    """`names` in the order of the picker; `left_out` those too many for the page; `runs`: run_id -> JSON of its series.

    A run's JSON is {"grids": [[step, ..], ..], "signals": {name: [index of its grid, [value, ..]]}}.
    """

    names: list[str]
    left_out: list[str]
    runs: dict[str, dict[str, Any]]


def read_series(reader: RunReader) -> dict[str, StatSeries]:
    """Every scalar and statistic of a run: name -> (steps, values). Empty for a run that has recorded nothing."""
    series: dict[str, StatSeries] = {}
    if names := reader.scalar_names():
        scalars = reader.scalars(*names)
        for name in names:
            series[name] = _known(scalars.steps, scalars.values[name])
    if reader.stat_names():
        series |= reader.stats("*")
    return series


def read_key_series(reader: RunReader) -> dict[str, StatSeries]:
    """Only what the verdict on a run needs: the evaluation loss and the block-0 logit, where they were recorded."""
    series: dict[str, StatSeries] = {}
    if EVAL_LOSS in reader.scalar_names():
        scalars = reader.scalars(EVAL_LOSS)
        series[EVAL_LOSS] = _known(scalars.steps, scalars.values[EVAL_LOSS])
    if LOGIT in reader.stat_names():
        series |= reader.stats(LOGIT)
    return series


def _known(steps: np.ndarray, values: np.ndarray) -> StatSeries:
    """Without the steps that have no number: not logged there, or NaN, which no chart can draw (events tell it)."""
    there = ~np.isnan(values)
    return StatSeries(steps[there], values[there])


def page_signals(runs: Mapping[str, Mapping[str, StatSeries]]) -> Signals:
    """Choose and thin `runs`: run_id -> series, so that the page holds about `MAX_VALUES` numbers at most."""
    names = _ordered({name for series in runs.values() for name in series})
    first = [name for name in names if _is_first(name)]
    rest = [name for name in names if not _is_first(name)]
    num_first = sum(len(series[name][0]) for series in runs.values() for name in first if name in series)
    share = MAX_VALUES if num_first == 0 else MAX_VALUES // 2
    points = _points(runs, first, share)
    left = max(MAX_VALUES - _size(runs, first, points), 0)
    points_rest = _points(runs, rest, left)
    left_out = rest if rest and _size(runs, rest, points_rest) > max(left, MAX_VALUES // 4) else []
    limits = dict.fromkeys(first, points) | {name: points_rest for name in rest if name not in left_out}
    return Signals(
        names=list(limits),
        left_out=left_out,
        runs={run: _encode(series, limits) for run, series in runs.items()},
    )


def _points(runs: Mapping[str, Mapping[str, Any]], names: Sequence[str], budget: int) -> int:
    num_series = sum(name in series for series in runs.values() for name in names)
    return max(MIN_POINTS, min(MAX_POINTS, budget // max(num_series, 1)))


def _size(runs: Mapping[str, Mapping[str, Any]], names: Sequence[str], points: int) -> int:
    return sum(min(len(series[name][0]), points) for series in runs.values() for name in names if name in series)


def _encode(series: Mapping[str, StatSeries], limits: Mapping[str, int]) -> dict[str, Any]:
    grids: dict[tuple[int, ...], int] = {}
    encoded: dict[str, list[Any]] = {}
    for name, points in limits.items():
        if name not in series:
            continue
        steps, values = thin(*series[name], points)
        index = grids.setdefault(tuple(int(s) for s in steps), len(grids))
        encoded[name] = [index, [rounded(float(v)) for v in values]]
    return {"grids": [list(grid) for grid in grids], "signals": encoded}


def _is_first(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in FIRST)


def _ordered(names: set[str]) -> list[str]:
    kinds = ["loss", "accuracy", "attn", "output", "grad", "grad_clipped", "update", "param", "optim"]

    def key(name: str) -> tuple[int, list[tuple[int, str]]]:
        kind, _, rest = name.partition("/")
        order = kinds.index(kind) if kind in kinds else len(kinds)
        return order, [(int(part), "") if part.isdigit() else (-1, part) for part in rest.replace("/", ".").split(".")]

    return sorted(names, key=key)
