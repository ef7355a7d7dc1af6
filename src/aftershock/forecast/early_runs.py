"""The start of every run of a study's arm, up to step k, and what became of it: what early forecasts are fitted on.

Nothing measured after step k enters a feature. Legend: C features. Logarithms are decades. A curve is one seed of one
size over all rates; who failed is known once all of its runs are done.
Must not import torch: a study is read in a second.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from aftershock.config import from_dict
from aftershock.forecast.observations import (
    LATEST_FRAC,
    LOG_Z,
    LOGIT,
    MIN_RATES,
    OUTPUTS,
    Observation,
    check_settings,
    early_step,
    judged,
    runs_of_arm,
)
from aftershock.lab.recipe import DecoderConfig, RunConfig
from aftershock.lab.sizes import Size
from aftershock.store.study import Study, StudyRow

LOSS, GRAD_NORM, UPDATES = "loss/train/ce", "grad/all/norm", "update/blocks.0.mlp.in/rms"
SCALARS = (LOSS, GRAD_NORM)
DONE = ("finished", "diverged")

Form = Literal["setting", "level", "growth"]


class Feature(NamedTuple):
    """`form` of `signal`: its level at the last measurement up to step k, or its growth since the first; a setting has
    no signal."""

    key: str
    title: str
    signal: str
    form: Form


FEATURES = {
    feature.key: feature
    for feature in (
        Feature("rate", "log peak learning rate", "", "setting"),
        Feature("size", "log N", "", "setting"),
        Feature("logit", "log max attention logit, block 0", LOGIT, "level"),
        Feature("log_z", "log |log Z|", LOG_Z, "level"),
        Feature("grad_norm", "log gradient norm", GRAD_NORM, "level"),
        Feature("grad_growth", "growth of the gradient norm since the start", GRAD_NORM, "growth"),
        Feature("update", "log update RMS, first MLP matrix of block 0", UPDATES, "level"),
        Feature("output", "log output RMS, last block", OUTPUTS, "level"),
        Feature("loss", "log loss over that at the start", LOSS, "growth"),
    )
}
"""The rate at step k is not among them: within an arm the schedule makes it the same share of the peak in every run."""

Series = Mapping[int, float]
"""Values by step."""


class EarlyRun(NamedTuple):
    """One run. `features` are None where it had ended, or has not come, by step k; `fails` (see `run_fails`, above the
    best rate of its curve) is None until its whole curve is done, `diverged` until the run is."""

    run_id: str
    size: str
    num_params: int
    lr: float
    seed: int
    status: str
    features: tuple[float, ...] | None
    fails: bool | None
    diverged: bool | None


class EarlyRuns(NamedTuple):
    """One arm of one or more studies at step `step` of `steps`; `features` name the columns that all runs have."""

    study: str
    arm: str
    step: int
    steps: int
    features: tuple[Feature, ...]
    runs: tuple[EarlyRun, ...]
    notes: tuple[str, ...]


def read_early(folders: Sequence[str | Path], *, arm: str = "", at: int | None = None) -> EarlyRuns:
    """Every run of one arm of these studies up to step `at`: by default the first measured one at 2 % of the run.

    A feature that a finished run lacks is dropped, with a note. Raises ValueError for an arm that no study has, runs
    that differ in more than size, rate and seed, no finished run, fewer than three rates in a curve, no measurement
    between 2 % and 5 % without `at`, and an `at` outside of the run; each says what to do.
    """
    where, studies, arm, mine = runs_of_arm(folders, arm)
    finished = [run for run, (_, row) in mine.items() if row.status == "finished"]
    if not finished:
        raise ValueError(f"{where}: no run of arm {arm!r} has finished; train them, or add lower rates if all diverge")
    configs = {
        run: from_dict(RunConfig, study.reader(run).config)
        for run, (study, row) in mine.items()
        if row.status != "missing"
    }
    steps = check_settings(configs).steps
    if at is not None and not 0 < at < steps:
        raise ValueError(f"--at {at} lies outside of these runs, which have steps 1 to {steps - 1} after their first")
    series = _read_series(studies, list(configs), math.floor(LATEST_FRAC * steps) if at is None else at)
    step = _default_step(series, finished, steps) if at is None else at
    before = {
        run: {n: {s: v for s, v in column.items() if s <= step} for n, column in own.items()}
        for run, own in series.items()
    }
    features, notes = _available(before, finished, step)
    runs, more = _runs(mine, configs, before, features, where)
    return EarlyRuns(where, arm, step, steps, features, runs, (*notes, *more))


# ----------------------------------------------------------------------------------------------------------- features


def _available(
    series: Mapping[str, Mapping[str, Series]], finished: Sequence[str], step: int
) -> tuple[tuple[Feature, ...], list[str]]:
    """The features that every finished run has at the same steps, and notes on the others and on old measurements."""
    found, notes, stale = [], [], {}
    for feature in FEATURES.values():
        if feature.form == "setting":
            found.append(feature)
            continue
        common = _common_steps(series, finished, feature.signal)
        lacking = sum(not series.get(run, {}).get(feature.signal) for run in finished)
        if lacking:
            notes.append(f"{feature.key} is dropped: {lacking} of {len(finished)} finished runs lack {feature.signal}")
        elif len(common) < (2 if feature.form == "growth" else 1):
            notes.append(f"{feature.key} is dropped: too few steps up to {step} have {feature.signal} in every run")
        else:
            found.append(feature)
            if max(common) < step:
                stale.setdefault(max(common), []).append(feature.key)
    for last, keys in stale.items():
        notes.append(
            f"{', '.join(keys)} were last measured at step {last}; for step {step} train with a measure_every that "
            "divides it"
        )
    return tuple(found), notes


def _common_steps(series: Mapping[str, Mapping[str, Series]], runs: Sequence[str], signal: str) -> list[int]:
    """Ascending steps at which all of these runs have the signal."""
    return sorted(set.intersection(*(set(series.get(run, {}).get(signal, {})) for run in runs)))


def _value(feature: Feature, own: Series, common: Sequence[int]) -> float:
    """The feature of one run from its rows at the common steps; nan where one it needs is missing or not positive."""
    first, last = (own.get(step, math.nan) for step in (common[0], common[-1]))
    if not (math.isfinite(last) and last > 0):
        return math.nan
    if feature.form == "level":
        return math.log10(last)
    return math.log10(last / first) if math.isfinite(first) and first > 0 else math.nan


def _default_step(series: Mapping[str, Mapping[str, Series]], finished: Sequence[str], steps: int) -> int:
    step, problem = early_step(_common_steps(series, finished, LOGIT), steps)
    if step is None:
        raise ValueError(f"{problem}; or choose a step that was measured with --at")
    return step


# --------------------------------------------------------------------------------------------------------------- runs


def _runs(
    mine: Mapping[str, tuple[Study, StudyRow]],
    configs: Mapping[str, RunConfig],
    series: Mapping[str, Mapping[str, Series]],
    features: Sequence[Feature],
    where: str,
) -> tuple[tuple[EarlyRun, ...], list[str]]:
    """The runs that have started, in ascending N, seed and rate, and notes on those of which something is not known."""
    fails = _failing([row for _, row in mine.values()], configs, where)
    finished = [run for run, (_, row) in mine.items() if row.status == "finished"]
    common = {f.signal: _common_steps(series, finished, f.signal) for f in features if f.signal}
    runs = []
    for run, config in configs.items():
        row = mine[run][1]
        num_params = _size(config).num_block_params
        settings = {"rate": math.log10(row.ref.lr), "size": math.log10(num_params)}
        values = tuple(
            _value(f, series.get(run, {}).get(f.signal, {}), common[f.signal]) if f.signal else settings[f.key]
            for f in features
        )
        seen = values if all(map(math.isfinite, values)) else None
        diverged = row.status == "diverged" if row.status in DONE else None
        runs.append(
            EarlyRun(
                run, row.ref.size, num_params, row.ref.lr, row.ref.seed, row.status, seen, fails.get(run), diverged
            )
        )
    counts = {
        "have no folder yet": len(mine) - len(configs),
        "had ended, or lack a finite value of a feature, by then": sum(
            run.features is None and run.status in DONE for run in runs
        ),
        "are under way and not there yet": sum(run.features is None and run.status not in DONE for run in runs),
        "are done but their curve is not, so whether they fail is open": sum(
            run.fails is None and run.status in DONE for run in runs
        ),
    }
    notes = [f"{count} runs {what}: not scored" for what, count in counts.items() if count]
    return tuple(sorted(runs, key=lambda run: (run.num_params, run.seed, run.lr))), notes


def _failing(rows: Iterable[StudyRow], configs: Mapping[str, RunConfig], where: str) -> dict[str, bool]:
    """Who failed, of the curves whose every run is done. Raises ValueError where a curve has fewer than three rates."""
    curves: dict[tuple[str, int], list[StudyRow]] = {}
    for row in rows:
        curves.setdefault((row.ref.size, row.ref.seed), []).append(row)
    for (size, seed), members in curves.items():
        rates = {row.ref.lr for row in members}
        if len(rates) < MIN_RATES:
            raise ValueError(
                f"{where}: size {size}, seed {seed} has {len(rates)} rates, needs {MIN_RATES}: a run fails in "
                "comparison with the best rate of its own size and seed; add rates"
            )
    done = [row for members in curves.values() if all(row.status in DONE for row in members) for row in members]
    return {run.run_id: run.fails for run in judged([_observation(row, configs[row.ref.run_id]) for row in done])}


def _observation(row: StudyRow, config: RunConfig) -> Observation:
    """What `judged` needs of a run."""
    size, loss = _size(config), row.summary["final_loss"]
    return Observation(
        run_id=row.ref.run_id,
        size=row.ref.size,
        width=size.width,
        depth=size.depth,
        num_params=size.num_block_params,
        lr=row.ref.lr,
        seed=row.ref.seed,
        initial_loss=row.summary["initial_loss"],
        final_loss=loss if loss is not None and math.isfinite(loss) else None,
        fails=False,
        seconds=row.summary["seconds"],
        readings={},
    )


def _size(config: RunConfig) -> Size:
    assert isinstance(config.model, DecoderConfig), "check_settings lets only decoders pass"
    return Size(config.model.width, config.model.depth, config.model.heads)


def _read_series(studies: Sequence[Study], runs: Sequence[str], last: int) -> dict[str, dict[str, dict[int, float]]]:
    """By run and signal, up to step `last`. One query a study: each makes the study's tables anew."""
    signals = list(dict.fromkeys(f.signal for f in FEATURES.values() if f.signal))
    stats = " or ".join(_named(signal) for signal in signals if signal not in SCALARS)
    scalars = ", ".join(f"'{name}'" for name in SCALARS)
    wanted, series = set(runs), dict[str, dict[str, dict[int, float]]]()
    for study in studies:
        rows = study.sql(
            f"select run_id, name, step, value from scalars where name in ({scalars}) and step <= {last} union all "
            "select run_id, kind || '/' || place || '/' || stat as name, step, value from stats "
            f"where ({stats}) and step <= {last}"
        )
        for row in rows:
            if row["run_id"] in wanted:
                series.setdefault(row["run_id"], {}).setdefault(row["name"], {})[row["step"]] = row["value"]
    for own in series.values():
        outputs = [name for name in own if name.startswith("output/blocks.")]
        if outputs:
            own[OUTPUTS] = own[max(outputs, key=lambda name: int(name.split("/")[1].removeprefix("blocks.")))]
    return series


def _named(signal: str) -> str:
    kind, place, stat = signal.split("/")
    return f"(kind = '{kind}' and place like '{place.replace('*', '%')}' and stat = '{stat}')"
