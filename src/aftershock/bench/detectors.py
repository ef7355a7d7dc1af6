"""The benchmark of detectors, from the corpus to the record: alarms, choices on half the seeds, figures of the rest.

Must not import torch at the top: only training needs it.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aftershock.bench import scoring
from aftershock.bench.alarms import Alarms, run_alarms
from aftershock.bench.corpus import MAX_TARGETS, SCORING_SEEDS, TUNING_SEEDS, Progress, Trace, read_trace, train_corpus
from aftershock.bench.curves import (
    BUDGET,
    Counts,
    Points,
    areas,
    areas_in_budget,
    counts_of,
    interval,
    once,
    points,
    recall_in_budget,
    resampled,
    weighted_medians,
)
from aftershock.bench.probes import after_nan, update_cost
from aftershock.bench.recorded import on_record
from aftershock.bench.records import CurvePoint, Record, Rival, Row, Span, Traits, rounded
from aftershock.bench.scoring import LEADS, Tally, catchable, num_healthy_steps
from aftershock.bench.sweeps import SWEEPS
from aftershock.bench.tuning import JUDGED, Choice, Half, choose, judge
from aftershock.lab.workers import worker_pool
from aftershock.signals.detect.registry import DETECTORS, OURS
from aftershock.store.environment import describe_environment

COMMAND = "aftershock bench detectors --rerun"


class Halves(NamedTuple):
    """Seeds on which settings are chosen, and seeds of which numbers are reported."""

    tuning: tuple[int, ...]
    scoring: tuple[int, ...]


def halves(num_seeds: int | None) -> Halves:
    """The first of either half, `num_seeds` in all; None: all ten. Raises ValueError for an odd or impossible number.

    >>> halves(4)
    Halves(tuning=(0, 2), scoring=(1, 3))
    """
    if num_seeds is None:
        return Halves(TUNING_SEEDS, SCORING_SEEDS)
    if num_seeds % 2 or not 2 <= num_seeds <= 10:
        raise ValueError(f"--seeds must be an even number from 2 to 10, half of them for tuning, got {num_seeds}")
    return Halves(TUNING_SEEDS[: num_seeds // 2], SCORING_SEEDS[: num_seeds // 2])


class Phases(NamedTuple):
    """Whom to tell of progress in training the corpus and in running the detectors over it."""

    training: Progress | None = None
    detecting: Progress | None = None


def run_benchmark(
    folder: Path,
    *,
    specimens: Sequence[str] = (),
    tuning_seeds: Sequence[int] = TUNING_SEEDS,
    scoring_seeds: Sequence[int] = SCORING_SEEDS,
    processes: int = 2,
    on_progress: Phases = Phases(),  # noqa: B008 (a tuple of None)
) -> Record:
    """Train what is missing of the corpus in `folder/runs`, and judge every detector on it.

    `specimens`: all of the zoo by default. Raises ValueError on an unknown one, before anything is trained.
    """
    from aftershock.lab.zoo.registry import ZOO, specimen

    chosen = [specimen(name) for name in (specimens or tuple(ZOO))]
    seeds = (*tuning_seeds, *scoring_seeds)
    names = [s.name for s in chosen]
    paths = train_corpus(folder / "runs", names, seeds=seeds, processes=processes, on_progress=on_progress.training)
    pairs = [(s, seed) for s in chosen for seed in seeds]
    traces = [read_trace(path, s, seed) for path, (s, seed) in zip(paths, pairs, strict=True)]
    alarms = detect_all(traces, processes=processes, on_progress=on_progress.detecting)
    tuning, held = split(traces, alarms, tuning_seeds), split(traces, alarms, scoring_seeds)
    return make_record(tuning, held, tuning_seeds=tuning_seeds, scoring_seeds=scoring_seeds)


def detect_all(traces: Sequence[Trace], *, processes: int, on_progress: Progress | None = None) -> list[Alarms]:
    """Alarms of every detector on every run, in the order of `traces`."""
    found: dict[int, Alarms] = {}
    with worker_pool(processes) as pool:
        futures = {pool.submit(run_alarms, trace): index for index, trace in enumerate(traces)}
        for future in as_completed(futures):
            found[futures[future]] = future.result()
            if on_progress is not None:
                on_progress(len(found), len(traces))
    return [found[index] for index in range(len(traces))]


def split(traces: Sequence[Trace], alarms: Sequence[Alarms], seeds: Sequence[int]) -> Half:
    """The runs of these seeds."""
    kept = [index for index, trace in enumerate(traces) if trace.seed in seeds]
    return Half([traces[i] for i in kept], [alarms[i] for i in kept])


def make_record(tuning: Half, held: Half, *, tuning_seeds: Sequence[int], scoring_seeds: Sequence[int]) -> Record:
    """Choose each detector's set-ups on `tuning`, and report what they do on `held`."""
    choices = {name: choose(tuning, name) for name in SWEEPS}
    scored = [_score(held, choice) for several in choices.values() for choice in several]
    here = describe_environment()
    return Record(
        rows=[entry.row for entry in scored],
        traits={name: _traits(name) for name in SWEEPS},
        rivals=_rivals(scored),
        specimens=_specimens(held.traces),
        leads=list(LEADS),
        definition={
            "horizon": scoring.HORIZON,
            "grace": scoring.GRACE,
            "refractory": scoring.REFRACTORY,
            "max_targets": MAX_TARGETS,
            "budget": BUDGET,
        },
        tuning_seeds=list(tuning_seeds),
        scoring_seeds=list(scoring_seeds),
        versions={name: version for name, version in here["versions"].items() if version is not None},
        machine={key: here[key] for key in ("platform", "cpu", "cores", "python")},
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        command=COMMAND + (f" --seeds {count}" if (count := len(tuning_seeds) + len(scoring_seeds)) < 10 else ""),
    )


class _Scored(NamedTuple):
    """A row, and the bootstrap samples [B] of its areas at lead >= 1, for paired differences."""

    row: Row
    area_B: np.ndarray
    in_budget_B: np.ndarray


def _score(held: Half, choice: Choice) -> _Scored:
    tallies = judge(held, choice.detector, choice.variant, choice.signals)
    counts, field = counts_of(tallies), held.field()
    num_runs = len(held.traces)
    weights_BR = resampled(num_runs)
    exact, drawn = points(counts, field, once(num_runs)), points(counts, field, weights_BR)
    if choice.setup == "default":  # published settings have no curve
        counts = Counts(*(array[:, choice.index : choice.index + 1] for array in counts))
        exact, drawn = points(counts, field, once(num_runs)), points(counts, field, weights_BR)
        place = 0
    else:
        place = choice.index
    area_B, in_budget_B = areas(drawn)[:, JUDGED], areas_in_budget(drawn)[:, JUDGED]
    chosen = [run[choice.index] for run in tallies]
    alarmed = counts.caught_RSK[:, place].sum(axis=0) + counts.false_RSK[:, place].sum(axis=0) > 0
    onset, peak = _leads(held.traces, chosen), _leads(held.traces, chosen, to_peak=True)
    row = Row(
        detector=choice.detector,
        setup=choice.setup,
        signals=list(choice.signals),
        settings=choice.settings,
        precision=[
            rounded(float(p)) if there else None
            for p, there in zip(exact.precision_BSK[0, place], alarmed, strict=True)
        ],
        precision_span=_span(drawn.precision_BSK[:, place, JUDGED]),
        recall=[rounded(float(r)) for r in exact.recall_BSK[0, place]],
        recall_span=_span(drawn.recall_BSK[:, place, JUDGED]),
        area=_numbers(areas(exact)[0]),
        area_span=_span(area_B),
        area_in_budget=_numbers(areas_in_budget(exact)[:, JUDGED])[0],
        area_in_budget_span=_span(in_budget_B),
        recall_in_budget=_numbers(recall_in_budget(exact)[:, JUDGED])[0],
        recall_in_budget_span=_span(recall_in_budget(drawn)[:, JUDGED]),
        false_rate=_numbers(exact.false_rate_BS[:, place])[0],
        false_rate_span=_span(drawn.false_rate_BS[:, place]),
        **_lead_fields("lead_onset", onset, weights_BR),
        **_lead_fields("lead_peak", peak, weights_BR),
        caught=_caught(held.traces, chosen),
        curve=_curve(choice, exact),
    )
    return _Scored(row, area_B, in_budget_B)


class _Leads(NamedTuple):
    """Steps from the first alarm of a target to its onset or peak, for each target with one, and the target's run."""

    steps_M: np.ndarray
    runs_M: np.ndarray


def _leads(traces: Sequence[Trace], tallies: Sequence[Tally], *, to_peak: bool = False) -> _Leads:
    """Of targets that were caught at lead >= 0, by their first alarm."""
    found = [
        ((target.peak if to_peak else target.onset) - first, run)
        for run, (trace, judged) in enumerate(zip(traces, tallies, strict=True))
        for target, first in zip(trace.targets, judged.first, strict=True)
        if first is not None and first <= target.peak
    ]
    return _Leads(np.array([s for s, _ in found], dtype=np.float64), np.array([r for _, r in found], dtype=np.int64))


def _lead_fields(name: str, leads: _Leads, weights_BR: np.ndarray) -> dict[str, Any]:
    exact = weighted_medians(*leads, once(weights_BR.shape[1]))
    return {name: rounded(float(exact[0])), f"{name}_span": _span(weighted_medians(*leads, weights_BR))}


def _caught(traces: Sequence[Trace], tallies: Sequence[Tally]) -> dict[str, int]:
    caught: dict[str, int] = {}
    for trace, judged in zip(traces, tallies, strict=True):
        if trace.kind != "healthy":
            caught[trace.specimen] = caught.get(trace.specimen, 0) + judged.caught[JUDGED]
    return caught


def _curve(choice: Choice, exact: Points) -> list[CurvePoint]:
    """The sweep, without settings that have the same figures as the looser one before."""
    if choice.setup not in ("tuned", "combined"):
        return []
    found: list[CurvePoint] = []
    for index, threshold in enumerate(SWEEPS[choice.detector].grid):
        recall, precision = exact.recall_BSK[0, index], exact.precision_BSK[0, index]
        point = CurvePoint(threshold, _numbers(exact.false_rate_BS[:, index])[0], _numbers(recall), _numbers(precision))
        if not found or point[1:] != found[-1][1:]:
            found.append(point)
    return found


def _rivals(scored: Sequence[_Scored]) -> list[Rival]:
    """Ours against each other detector; the rows come in rising order of set-up, so the last tuned one is the best."""
    best: dict[str, _Scored] = {e.row.detector: e for e in scored if e.row.setup in ("tuned", "combined")}
    ours = best.pop(OURS, None)
    if ours is None:
        return []
    return [
        Rival(
            detector=name,
            area=_numbers([ours.row.area[JUDGED] - other.row.area[JUDGED]])[0],
            area_span=_span(ours.area_B - other.area_B),
            in_budget=_numbers([ours.row.area_in_budget - other.row.area_in_budget])[0],
            in_budget_span=_span(ours.in_budget_B - other.in_budget_B),
        )
        for name, other in best.items()
    ]


def _specimens(traces: Sequence[Trace]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for trace in traces:
        entry = found.setdefault(
            trace.specimen, {"kind": trace.kind, "runs": 0, "targets": 0, "catchable": 0, "healthy_steps": 0}
        )
        entry["runs"] += 1
        entry["targets"] += len(trace.targets)
        entry["catchable"] += sum(catchable(target, 1) for target in trace.targets)
        entry["healthy_steps"] += num_healthy_steps(trace.targets, trace.num_steps)
    return found


def _traits(name: str) -> Traits:
    return Traits(
        source=DETECTORS[name].source,
        microseconds=_numbers([update_cost(name)])[0],
        after_nan=after_nan(name)._asdict(),
        bloom=[seen._asdict() for seen in on_record("bloom", name)],
        bigscience=[seen._asdict() for seen in on_record("bigscience", name)],
    )


def _span(samples: np.ndarray) -> Span:
    low, high = interval(samples)
    return rounded(low), rounded(high)


def _numbers(values: Sequence[float] | np.ndarray) -> list[float]:
    """Rounded; these always have a value."""
    return [float(f"{float(value):.4g}") for value in values]
