"""The forecast of one size that was never trained, as plain values: what `aftershock forecast` prints and writes.

Legend: quantities as in `observations.QUANTITIES`. Reads studies through `observations`; trains nothing.
Must not import torch at the top.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from aftershock.forecast.advice import (
    LOG_Z_LINE,
    Advice,
    Eps,
    Line,
    advise,
    eps_outlook,
    gradient_line,
    logit_line,
)
from aftershock.forecast.check import Check, check_failing, check_quantity, mean_rungs
from aftershock.forecast.failing import FailingRate, forecast_failing, kappa_fit, none_or_all_fail, weigh_ways
from aftershock.forecast.family import Family, find_family
from aftershock.forecast.fits import LEVEL, Interval, interval_of
from aftershock.forecast.observations import QUANTITIES, Observation, Observations, check_enough, read_observations
from aftershock.forecast.surfaces import Surface, fit_surface
from aftershock.forecast.trend import Trend, mean_losses, sensitivity_trend
from aftershock.lab.interventions import BASELINE
from aftershock.lab.sizes import Size, parse_size

SCHEMA = 1


class AtRate(NamedTuple):
    """A quantity of the target at one rate of the ladder."""

    lr: float
    interval: Interval


class QuantityForecast(NamedTuple):
    """One signal of the target at the main rate, and over the ladder. `line` is its danger line, `crosses` whether the
    interval reaches it; `mode` and `error` (decades, at sizes left out; None with two sizes) tell of the fit;
    `refused` says why there is no interval."""

    key: str
    title: str
    interval: Interval | None
    line: Line | None
    crosses: bool
    by_rate: tuple[AtRate, ...]
    mode: str
    error: float | None
    num_runs: int
    refused: str


class AtSize(NamedTuple):
    """The failing rate that the fit gives one new seed of a size; None where it refuses."""

    size: str
    num_params: int
    rate: Interval | None


class Outlook(NamedTuple):
    """All that is forecast of a size, and what it rests on. Intervals hold at `level`, for one new run.

    - `runs`: those that the fits saw; `failing_by_size`: the same fit at the sizes trained and at the target
    - `check`: what runs of the target itself showed, which the fits never see; None where there are none
    """

    schema: int
    study: str
    arm: str
    target: str
    num_params: int
    lr: float
    level: float
    family: str
    sizes: tuple[str, ...]
    rates: tuple[float, ...]
    num_seeds: int
    runs: tuple[Observation, ...]
    failing: FailingRate
    failing_by_size: tuple[AtSize, ...]
    quantities: tuple[QuantityForecast, ...]
    eps: Eps | None
    trend: Trend
    advice: tuple[Advice, ...]
    notes: tuple[str, ...]
    check: Check | None
    checked_by: tuple[Observation, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists; what is not finite is null."""
        return plain(self)


def forecast_study(
    folders: Sequence[str | Path], *, to: str, arm: str = "", lr: float | None = None, seed: int = 0
) -> Outlook:
    """The forecast of size `to` from the runs of one arm of these studies, at rate `lr` (the largest size's best rate).

    Runs of the target itself are left out of every fit: they check the forecast. Deterministic in `seed`. Raises
    ValueError as `read_observations` and `Family.check` do, and for a rate outside those trained.

    Example:
        outlook = forecast_study(["out/sweep"], to="128x2", arm="no_qk_norm")
        print(outlook.failing.rate)
    """
    target = parse_size(to)
    everything = read_observations(folders, arm=arm)
    found, later = set_apart(everything, target)
    baseline = None
    if found.arm != BASELINE:
        try:
            baseline = set_apart(read_observations(folders, arm=BASELINE), target)[0]
        except ValueError:  # there is no such arm, or not enough of it: the check says so
            baseline = None
    return forecast(found, target, lr=lr, baseline=baseline, later=later, seed=seed)


def set_apart(found: Observations, target: Size) -> tuple[Observations, Observations]:
    """The runs of other sizes, and those of the target. Raises ValueError where the others are not enough to fit."""
    mine = [(run.width, run.depth) == (target.width, target.depth) for run in found.runs]
    others = found._replace(runs=tuple(run for run, own in zip(found.runs, mine, strict=True) if not own))
    if any(mine):
        check_enough(others)
    return others, found._replace(runs=tuple(run for run, own in zip(found.runs, mine, strict=True) if own))


def forecast(
    found: Observations,
    target: Size,
    *,
    lr: float | None = None,
    baseline: Observations | None = None,
    later: Observations | None = None,
    seed: int = 0,
) -> Outlook:
    """`forecast_study` of runs already read; `later` are those of the target."""
    family = find_family([(run.width, run.depth) for run in found.runs])
    family.check(target)
    trend = sensitivity_trend(found, family, target, baseline=baseline, seed=seed)
    largest = mean_losses(found.only(found.sizes[-1]).runs)
    rate = min(largest, key=lambda each: (largest[each], each)) if lr is None else lr
    if not found.rates[0] <= rate <= found.rates[-1]:
        raise ValueError(f"rate {rate:g} lies outside the rates trained, {found.rates[0]:g} to {found.rates[-1]:g}")
    keys = [key for key in QUANTITIES if any(key in run.readings for run in found.runs)]
    surfaces = {key: fit_surface(found, family, key, seed=seed) for key in keys}
    ways = None if none_or_all_fail(found) else weigh_ways(found, seed=seed)
    failing = forecast_failing(found, family, target, ways=ways, seed=seed)
    sized = [
        AtSize(size, one.num_params, forecast_failing(found, family, size_of(one), ways=ways, seed=seed).rate)
        for size, one in ((size, found.only(size).runs[0]) for size in found.sizes)
    ]
    lines = _lines(found, failing, seed)
    quantities = tuple(_quantity(found, surfaces[key], target, rate, lines.get(key)) for key in keys)
    values = {quantity.key: quantity.interval for quantity in quantities if quantity.interval is not None}
    point = (target.width, target.depth)
    eps = None
    if "grad_rms" in values:
        eps = eps_outlook(surfaces["grad_rms"], family, point, rate, found.config.optim.eps)
    return Outlook(
        schema=SCHEMA,
        study=found.study,
        arm=found.arm,
        target=target.label,
        num_params=target.num_block_params,
        lr=rate,
        level=LEVEL,
        family=family.kind,
        sizes=tuple(found.sizes),
        rates=tuple(found.rates),
        num_seeds=len({run.seed for run in found.runs}),
        runs=found.runs,
        failing=failing,
        failing_by_size=(*sized, AtSize(target.label, target.num_block_params, failing.rate)),
        quantities=quantities,
        eps=eps,
        trend=trend,
        advice=tuple(advise(found.config, rate, failing, values, lines, eps)),
        notes=found.notes + _notes(found, family, target),
        check=None if later is None or not later.runs else _check(failing, quantities, later, found.rates),
        checked_by=() if later is None else later.runs,
    )


def _check(
    failing: FailingRate, quantities: Sequence[QuantityForecast], later: Observations, rates: Sequence[float]
) -> Check:
    seeds = check_failing(failing, later, rates)
    rows = (check_quantity(one.key, one.by_rate, later) for one in quantities if one.by_rate)
    return Check(len(later.runs), seeds, mean_rungs(seeds), tuple(row for row in rows if row.num_runs))


def size_of(run: Observation) -> Size:
    """Heads do not matter to a fit."""
    return Size(run.width, run.depth, heads=1)


def plain(value: Any) -> Any:
    """NamedTuples as dicts, sequences as lists, numbers that are not finite as None."""
    fields = getattr(type(value), "_fields", None)
    if fields is not None:
        return {key: plain(item) for key, item in zip(fields, value, strict=True)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def _lines(found: Observations, failing: FailingRate, seed: int) -> dict[str, Line]:
    lines = {
        "early_logit": logit_line(failing.kappa),
        "abs_log_z": Line(LOG_Z_LINE, "where bfloat16 logits are half a nat apart"),
        "grad_rms": gradient_line(found.config.optim.eps),
    }
    end = kappa_fit(found.runs, "logit", seed=seed)
    if end is not None:
        kappa = interval_of(float(end.coef_C[0]), end.draws_BC[:, 0])
        lines["logit"] = logit_line(Interval(*(10**value for value in kappa)))
    return lines


def _quantity(found: Observations, surface: Surface, target: Size, lr: float, line: Line | None) -> QuantityForecast:
    beyond = target.num_block_params > max(run.num_params for run in found.runs)
    refused = ""
    if beyond and not surface.holds:
        refused = (
            f"only {surface.covered:.0%} of the runs of {found.sizes[-1]} lie in the interval that the smaller sizes "
            "give them, so the fit says nothing of a larger one: add sizes"
        )
    point = (target.width, target.depth)
    interval = None if refused else surface.at(point, lr).interval
    by_rate = () if refused else tuple(AtRate(rate, surface.at(point, rate).interval) for rate in surface.rates)
    crosses = False
    if interval is not None and line is not None:
        crosses = interval.high >= line.value if QUANTITIES[surface.key].grows else interval.low <= line.value
    return QuantityForecast(
        key=surface.key,
        title=QUANTITIES[surface.key].title,
        interval=interval,
        line=line,
        crosses=crosses,
        by_rate=by_rate,
        mode=surface.mode,
        error=min(surface.errors.values(), default=None),
        num_runs=surface.num_runs,
        refused=refused,
    )


def _notes(found: Observations, family: Family, target: Size) -> tuple[str, ...]:
    notes = []
    times = target.num_block_params / max(run.num_params for run in found.runs)
    if times > 1:
        notes.append(f"{target.label} has {times:.3g} times the parameters of {found.sizes[-1]}, the largest trained")
    if family.num_sizes == 2:
        notes.append("two sizes: no error at a size left out is known; a third one would tell")
    died = sum(run.final_loss is None for run in found.runs)
    if died:
        notes.append(f"{died} of {len(found.runs)} runs diverged and count as bounds")
    return tuple(notes)
