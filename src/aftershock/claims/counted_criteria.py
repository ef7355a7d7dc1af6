"""Criteria that read counted spikes: in spite of clipping, against the size of the model, against its sharpness.

All were fixed before any run of their study; rules of the verdicts: see `claims.criteria`, of classes of causes
`claims.incident_criteria`. Legend: D seeds of one draw; a draw takes the same seeds in every setting.
Must not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from aftershock.claims.claim import Judgement, Line, Verdict
from aftershock.claims.criteria import above_zero, at_least
from aftershock.claims.grid import Interval, bootstrap, slope
from aftershock.claims.incident import Counted, read_counted
from aftershock.claims.shares import NOTHING, Share, as_tables

CLIPPED, FAMILIES, BASE = "clipped", ("curve", "language"), "base"
OFTEN = 0.5
"""S3: a class spikes when half of its runs or more do."""
SERIES: dict[str, tuple[str, Callable[[Counted], float]]] = {
    "width": ("decade of N", lambda run: math.log10(run.num_params)),
    "depth": ("decade of N, in depth", lambda run: math.log10(run.num_params)),
    "batch": ("decade of the batch", lambda run: math.log10(run.batch)),
    "beta2": ("decade of beta2's half-life in samples", lambda run: math.log10(run.half_life)),
}
"""What the settings of a series differ in, by the beginning of their names; each series has the base setting too."""


def spikes_though_clipped(lines: Sequence[Line]) -> Judgement:
    """S3: largest share of a cause class's runs that spike with the gradient norm clipped at 1; at least a half.

    Classes are those of the spontaneous specimens: the loss of a garbage batch is high whatever is clipped. A spike
    counts where clipping had something to do: on one step at least, from 40 before its onset to its peak, the norm was
    above 1. The table has the spikes that did not count too. Contradicted: the whole interval of every class is below
    a half.
    """
    runs = [run for run in read_counted(lines) if run.family == CLIPPED]
    causes = sorted({run.cause for run in runs}, key=lambda cause: int(cause.removeprefix("C")))
    found: dict[str, Interval] = {}
    whole: dict[str, float] = {}
    for cause in causes:
        members = [run for run in runs if run.cause == cause]
        found[cause] = Share(sum(any(run.clipped) for run in members), len(members)).interval
        whole[cause] = float(np.mean([bool(run.spikes) for run in members]))
    most = max(found.values(), key=lambda measured: measured.value, default=NOTHING)
    verdict = at_least(most, OFTEN)
    if verdict == "contradicted" and any(measured.high >= OFTEN for measured in found.values()):
        verdict = "inconclusive"
    return Judgement(
        verdict=verdict,
        effect=most.value,
        interval=most.bounds,
        meaning="share of runs that spike though clipping at 1 is at work, in the class where it is largest",
        detail=as_tables(found) | {"spikes, clipping at work or not": whole},
    )


def larger_spike_more(lines: Sequence[Line]) -> Judgement:
    """S4: slope of spikes per 1e6 samples against log10 N at the same settings, over their mean rate; above 0.

    N grows in width (parameters without tables and head); both families, a curve and a text, count alike: the effect
    is the mean of their slopes, each in units of its own mean rate. Samples are tokens of the text and points of the
    curve. Depth, batch and the half-life of beta2 have slopes of the same kind in the table, and no part in the
    verdict. A family without any spike measures nothing and is left out.
    """
    runs = [run for run in read_counted(lines) if run.family in FAMILIES]
    seeds = sorted({run.seed for run in runs})
    measured = bootstrap(_mean_slope(runs, seeds, "width"), len(seeds)) if runs else NOTHING
    slopes = {
        f"{family} per {SERIES[series][0]}": bootstrap(_mean_slope(_of(runs, family), seeds, series), len(seeds))
        for series in SERIES
        for family in FAMILIES
    }
    return Judgement(
        verdict=above_zero(measured),
        effect=measured.value,
        interval=measured.bounds,
        meaning="change of the rate of spikes per decade of N, in units of the mean rate",
        detail=as_tables(slopes)
        | {f"spikes per 1e6 samples, {family}": _rates(_of(runs, family)) for family in FAMILIES},
    )


def sharper_and_spikier(lines: Sequence[Line]) -> Judgement:
    """H7: slope of log10 sharpness at equal loss against log10 N, and of spikes against log10 sharpness; both above 0.

    Runs of the width series. Equal loss is, in each family, the lowest of the study's levels that all of its runs
    reached before their first spike. Sharpness is the preconditioned one there, the size of the largest eigenvalue of
    D^-1/2 H D^-1/2 (`signals.curvature.sharpness`), times half the learning rate. The rate of spikes is that of the
    whole run, in units of the family's mean. Both slopes are means over the two families. Supported: both intervals
    above 0; contradicted: one below. The effect is the first slope. That better models spike because they are sharper
    does not follow from both: width may bring about each by itself.
    """
    runs = [run for run in read_counted(lines) if run.family in FAMILIES and _in_series(run, "width")]
    seeds = sorted({run.seed for run in runs})
    levels = {family: _equal_loss(_of(runs, family)) for family in FAMILIES}
    sharp, hazard = NOTHING, NOTHING
    if seeds:
        sharp = bootstrap(_mean_over(runs, seeds, lambda some: _sharpness_slope(some, levels)), len(seeds))
        hazard = bootstrap(_mean_over(runs, seeds, lambda some: _hazard_slope(some, levels)), len(seeds))
    verdicts: list[Verdict] = [above_zero(sharp), above_zero(hazard)]
    if "contradicted" in verdicts:
        verdict: Verdict = "contradicted"
    else:
        verdict = "supported" if verdicts == ["supported", "supported"] else "inconclusive"
    return Judgement(
        verdict=verdict,
        effect=sharp.value,
        interval=sharp.bounds,
        meaning="decades of preconditioned sharpness at equal loss per decade of N",
        detail={
            "equal loss": {family: float(level) for family, level in levels.items() if level is not None},
            **as_tables({"sharpness per decade of N": sharp, "rate per decade of sharpness": hazard}),
            **{f"sharpness, {family}": _sharpnesses(_of(runs, family), levels[family]) for family in FAMILIES},
        },
    )


# ------------------------------------------------------------------------------------------------------ pieces


def _of(runs: Sequence[Counted], family: str) -> list[Counted]:
    return [run for run in runs if run.family == family]


def _in_series(run: Counted, series: str) -> bool:
    """`batch=50, half-life kept` changes two things at once and is in no series."""
    return run.setting == BASE or (run.setting.startswith(f"{series}=") and "," not in run.setting)


def _mean_over(
    runs: Sequence[Counted], seeds: Sequence[int], statistic: Callable[[Sequence[Counted]], float]
) -> Callable[[np.ndarray], float]:
    """The statistic of a draw of seeds: the mean over families of that of their runs; nan where none has one."""

    def value(draw_D: np.ndarray) -> float:
        drawn = [run for s in draw_D for run in runs if run.seed == seeds[int(s)]]
        found = [statistic(_of(drawn, family)) for family in FAMILIES]
        known = [one for one in found if not math.isnan(one)]
        return float(np.mean(known)) if known else math.nan

    return value


def _mean_slope(runs: Sequence[Counted], seeds: Sequence[int], series: str) -> Callable[[np.ndarray], float]:
    """Of the rate of spikes against what the series changes."""
    of = SERIES[series][1]
    chosen = [run for run in runs if _in_series(run, series)]
    return _mean_over(chosen, seeds, lambda some: slope([of(run) for run in some], _relative_rates(some)))


def _relative_rates(runs: Sequence[Counted]) -> list[float]:
    """In units of their mean; nan where nothing spikes."""
    mean = float(np.mean([run.rate for run in runs])) if runs else 0.0
    return [run.rate / mean if mean else math.nan for run in runs]


def _equal_loss(runs: Sequence[Counted]) -> str | None:
    """The lowest level that all reached before their first spike."""
    calm = [{level for level, at in run.levels.items() if not run.spikes or at.step < run.spikes[0][0]} for run in runs]
    return min(set.intersection(*calm), key=float, default=None) if calm else None


def _log_sharpness(run: Counted, level: str | None) -> float:
    value = math.nan if level is None else abs(run.levels[level].edge_share)
    return math.log10(value) if value > 0 else math.nan


def _sharpness_slope(runs: Sequence[Counted], levels: dict[str, str | None]) -> float:
    return slope(
        [math.log10(run.num_params) for run in runs], [_log_sharpness(run, levels[run.family]) for run in runs]
    )


def _hazard_slope(runs: Sequence[Counted], levels: dict[str, str | None]) -> float:
    pairs = [
        (_log_sharpness(run, levels[run.family]), rate) for run, rate in zip(runs, _relative_rates(runs), strict=True)
    ]
    known = [(x, y) for x, y in pairs if not math.isnan(x)]
    return slope([x for x, _ in known], [y for _, y in known])


def _sharpnesses(runs: Sequence[Counted], level: str | None) -> dict[str, float]:
    """By N, the geometric mean over seeds."""
    sizes = sorted({run.num_params for run in runs})
    by_size = {size: [_log_sharpness(run, level) for run in runs if run.num_params == size] for size in sizes}
    return {f"N = {size}": 10 ** float(np.mean(values)) for size, values in by_size.items()}


def _rates(runs: Sequence[Counted]) -> dict[str, float]:
    """By setting, the mean over seeds."""
    settings = dict.fromkeys(run.setting for run in runs)
    return {name: float(np.mean([run.rate for run in runs if run.setting == name])) for name in settings}
