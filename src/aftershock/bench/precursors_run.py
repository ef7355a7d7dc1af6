"""`aftershock bench precursors --rerun`: corpus, indicators, live forecasts, record.

Must not import torch at the top: only training needs it.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from aftershock.bench.corpus import SCORING_SEEDS, TUNING_SEEDS, Progress, train_corpus
from aftershock.bench.foresight import ALARMS, judge_forecasts, live_name
from aftershock.bench.indicators import BASELINE, INDICATORS, MISSING, Way
from aftershock.bench.precursors import BUDGETS, HORIZONS, Judge, Run, read_runs, specimen_facts
from aftershock.bench.precursors_record import PrecursorRow, Precursors
from aftershock.forecast.hazard import Hazard
from aftershock.store.environment import describe_environment

COMMAND = "aftershock bench precursors --rerun"


class Phases(NamedTuple):
    """Whom to tell of progress: training, reading, fitting forecasts, judging indicators."""

    training: Progress | None = None
    reading: Progress | None = None
    fitting: Progress | None = None
    judging: Progress | None = None


class Outcome(NamedTuple):
    """The record, and the models of the live forecast that it judges."""

    record: Precursors
    hazards: list[Hazard]


def run_precursors(
    folder: Path,
    *,
    specimens: Sequence[str] = (),
    tuning_seeds: Sequence[int] = TUNING_SEEDS,
    scoring_seeds: Sequence[int] = SCORING_SEEDS,
    processes: int = 2,
    on_progress: Phases = Phases(),  # noqa: B008 (a tuple of None)
) -> Outcome:
    """Train what is missing of the corpus in `folder/runs`, judge every indicator on it, and fit the live forecast.

    `specimens`: all of the zoo by default. Raises ValueError on an unknown one, before anything is trained.
    """
    from aftershock.lab.zoo.registry import ZOO, specimen

    names = [specimen(name).name for name in (specimens or tuple(ZOO))]
    seeds = (*tuning_seeds, *scoring_seeds)
    train_corpus(folder / "runs", names, seeds=seeds, processes=processes, on_progress=on_progress.training)
    runs = read_runs(folder / "runs", names, seeds=seeds, processes=processes, on_progress=on_progress.reading)
    return make_record(
        runs, tuning_seeds=tuning_seeds, scoring_seeds=scoring_seeds, processes=processes, on_progress=on_progress
    )


def make_record(
    runs: Sequence[Run],
    *,
    tuning_seeds: Sequence[int],
    scoring_seeds: Sequence[int],
    processes: int = 2,
    on_progress: Phases = Phases(),  # noqa: B008 (a tuple of None)
) -> Outcome:
    """Choose on the tuning seeds, report of the scoring seeds."""
    judged = judge_forecasts(runs, tuning_seeds=tuning_seeds, processes=processes, on_progress=on_progress.fitting)
    with_forecasts = [run._replace(scored=run.scored | own) for run, own in zip(runs, judged.scored, strict=True)]
    here = describe_environment()
    count = len(tuning_seeds) + len(scoring_seeds)
    record = Precursors(
        rows=judge_all(with_forecasts, tuning_seeds=tuning_seeds, on_progress=on_progress.judging),
        forecasters=judged.forecasters,
        specimens=specimen_facts(runs, scoring_seeds),
        missing=dict(MISSING),
        budgets=list(BUDGETS),
        horizons=list(HORIZONS),
        tuning_seeds=list(tuning_seeds),
        scoring_seeds=list(scoring_seeds),
        versions={name: version for name, version in here["versions"].items() if version is not None},
        machine={key: here[key] for key in ("platform", "cpu", "cores", "python")},
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        command=COMMAND + (f" --seeds {count}" if count < len(TUNING_SEEDS) + len(SCORING_SEEDS) else ""),
    )
    return Outcome(record, judged.hazards)


def judge_all(
    runs: Sequence[Run], *, tuning_seeds: Sequence[int], on_progress: Progress | None = None
) -> list[PrecursorRow]:
    """Rows of all indicators, the live forecast among them, under each horizon; the baseline's first."""
    wanted: dict[str, tuple[tuple[Way, ...], int]]
    wanted = {one.name: (one.ways, one.ahead) for one in sorted(INDICATORS, key=lambda one: one.name != BASELINE)}
    wanted |= {live_name(signals): (("level",), 0) for signals in ALARMS}
    found: list[PrecursorRow] = []
    done, total = 0, len(HORIZONS) * len(wanted)
    for horizon in HORIZONS:
        judge = Judge(runs, tuning_seeds=tuning_seeds, horizon=horizon)
        for name, (ways, ahead) in wanted.items():
            row = judge.row(name, ways, ahead=ahead)
            found += [] if row is None else [row]
            done += 1
            if on_progress is not None:
                on_progress(done, total)
    return found
