"""How far ahead each leading indicator warns, at what price in false alarms: from the corpus to figures.

Targets, episodes, lead and false alarms are those of `scoring`. Ways and thresholds are chosen on the tuning seeds,
numbers are of the scoring seeds; beside them stand those of each specimen with choices made without it.
Legend: R runs, S thresholds, K leads, B samples of the runs, M targets. Must not import torch at the top.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aftershock.bench import scoring
from aftershock.bench.corpus import Progress, Signal, Trace, read_trace
from aftershock.bench.curves import (
    Counts,
    Field,
    areas,
    counts_of,
    field_of,
    interval,
    once,
    points,
    resampled,
    weighted_medians,
)
from aftershock.bench.indicators import BASELINE, INDICATORS, Indicator, Way, scores
from aftershock.bench.precursors_record import At, Group, PrecursorRow, Share
from aftershock.bench.records import Span, rounded
from aftershock.bench.scoring import Tally, Target, catchable, episodes, num_healthy_steps, tally
from aftershock.lab.workers import worker_pool
from aftershock.store.reader import RunReader

BUDGETS = (1.0, 10.0)
"""False alarms per 10,000 healthy steps at which an indicator is read."""
HORIZONS = (scoring.HORIZON, 256)
"""Steps before the onset from which an alarm counts: the benchmark's, and one for what grows slowly."""
AT_ONCE = scoring.LEADS.index(0)
TIE = 1e-3
"""Weight of what only decides between equals: less than one spike of a hundred is worth."""
NUM_THRESHOLDS = 24
LOOSE, STRICT = 0.1, 1e-5
"""Shares of healthy steps above the loosest and the strictest threshold."""

Scored = dict[tuple[str, Way], tuple[np.ndarray, np.ndarray]]
"""By indicator and way: steps [N] and scores [N], ascending in steps."""


class Run(NamedTuple):
    """One run of the corpus: its trace, its cause, all its signals, and its indicators' scores."""

    trace: Trace
    cause: str
    signals: dict[str, Signal]
    scored: Scored


class Choice(NamedTuple):
    """A way of reading an indicator, and its threshold for each budget."""

    way: Way
    index: int
    thresholds: tuple[float, ...]
    places: tuple[int, ...]


# ---------------------------------------------------------------------------------------------------- from the corpus


def read_runs(
    folder: Path,
    specimens: Sequence[str],
    *,
    seeds: Sequence[int],
    processes: int = 2,
    on_progress: Progress | None = None,
) -> list[Run]:
    """The trained runs of `folder` with their scores, by specimen, then seed."""
    from aftershock.bench.corpus import run_folder

    jobs = [(run_folder(folder, name, seed), name, seed) for name in specimens for seed in seeds]
    found: dict[int, Run] = {}
    with worker_pool(processes) as pool:
        futures = {pool.submit(read_run, *job): index for index, job in enumerate(jobs)}
        for future in as_completed(futures):
            found[futures[future]] = future.result()
            if on_progress is not None:
                on_progress(len(found), len(jobs))
    return [found[index] for index in range(len(jobs))]


def read_run(folder: Path, name: str, seed: int) -> Run:
    """One trained run with the scores of all indicators that it has."""
    from aftershock.lab.zoo.registry import specimen

    known = specimen(name)
    trace = read_trace(folder, known, seed)
    signals: dict[str, Signal] = {}
    rows = RunReader(folder).scalar_rows()
    first = min(row.step for row in rows)
    for row in rows:
        if row.step - first < trace.num_steps:
            series = signals.setdefault(row.name, Signal([], []))
            series.steps.append(row.step - first)
            series.values.append(row.value)
    return Run(trace, known.cause, signals, score_signals(signals))


def score_signals(signals: Mapping[str, Signal], indicators: Sequence[Indicator] = INDICATORS) -> Scored:
    """Scores of each indicator whose signal is there, each way."""
    return {
        (one.name, way): (np.array(signals[one.signal].steps), scores(one, way, np.array(signals[one.signal].values)))
        for one in indicators
        if one.signal in signals
        for way in one.ways
    }


def reopened(targets: Sequence[Target], horizon: int, *, planted: bool) -> tuple[Target, ...]:
    """Targets that open `horizon` steps before their onset, at most up to the end of the one before.

    The first target of a planted run, whose fault nobody can foresee, stays as it is.
    """
    found: list[Target] = []
    for index, target in enumerate(targets):
        if not (planted and index == 0):
            earliest = found[-1].end + 1 if found else 0
            target = target._replace(opens=min(max(target.onset - horizon, earliest, 0), target.onset))
        found.append(target)
    return tuple(found)


# ---------------------------------------------------------------------------------------------------------- judging


class Judge:
    """Runs of both halves of the seeds under one horizon; every indicator is judged on those that have it."""

    def __init__(self, runs: Sequence[Run], *, tuning_seeds: Sequence[int], horizon: int = scoring.HORIZON) -> None:
        self.runs = runs
        self._tuning = np.array([run.trace.seed in tuning_seeds for run in runs])
        self._targets = [reopened(r.trace.targets, horizon, planted=r.trace.kind == "planted") for r in runs]
        self._healthy = [num_healthy_steps(t, r.trace.num_steps) for t, r in zip(self._targets, runs, strict=True)]
        self._specimens = np.array([run.trace.specimen for run in runs])
        self._horizon = horizon
        self._baseline: dict[float, dict[int, _Outcome]] = {}

    def row(self, name: str, ways: Sequence[Way], *, ahead: int = 0) -> PrecursorRow | None:
        """Figures of one indicator; None where no run of either half has it. Ask for the baseline first.

        `ahead`: 1 for what is known before its step: an alarm in the step of the peak then has a lead of 1.
        """
        has = np.array([(name, ways[0]) in run.scored for run in self.runs])
        tuning, held = np.flatnonzero(has & self._tuning), np.flatnonzero(has & ~self._tuning)
        if not len(tuning) or not len(held):
            return None
        grids = [self._grid(name, way, tuning) for way in ways]
        tuned, judged = (
            [self._tallies(name, way, half, grid) for way, grid in zip(ways, grids, strict=True)]
            for half in (tuning, held)
        )
        specimens = list(dict.fromkeys(self._specimens[tuning].tolist()))
        # all tuning runs, then for each specimen all but its own
        weights = np.array([np.ones(len(tuning)), *((self._specimens[tuning] != s).astype(float) for s in specimens)])
        lead = scoring.LEADS.index(1 - ahead)
        all_of = _choices(ways, grids, [counts_of(t) for t in tuned], self._field(tuning), weights, lead=lead)
        whole, apart = all_of[0], dict(zip(specimens, all_of[1:], strict=True))
        counts, field = counts_of(judged[whole.index]), self._field(held)
        weights_BR = resampled(len(held))
        area = areas(points(counts, field, once(len(held))))[:, lead]
        ats = []
        for place, budget in enumerate(BUDGETS):
            own = [run[whole.places[place]] for run in judged[whole.index]]
            chosen = [apart.get(self._specimens[i], whole) for i in held]
            without = [judged[choice.index][r][choice.places[place]] for r, choice in enumerate(chosen)]
            found = [_outcomes(t, self._targets[i], ahead) for t, i in zip(own, held, strict=True)]
            out = [_outcomes(t, self._targets[i], ahead) for t, i in zip(without, held, strict=True)]
            if name == BASELINE:
                self._baseline[budget] = dict(zip(held.tolist(), found, strict=True))
            ats.append(self._at(budget, whole.thresholds[place], held, found, out, weights_BR))
        return PrecursorRow(
            indicator=name,
            horizon=self._horizon,
            way=whole.way,
            runs=len(held),
            targets=sum(len(self._targets[i]) for i in held),
            area=rounded(float(area[0])),
            area_span=_span(areas(points(counts, field, weights_BR))[:, lead]),
            at=ats,
        )

    def _field(self, chosen: np.ndarray) -> Field:
        return field_of([self._targets[i] for i in chosen], [self._healthy[i] for i in chosen])

    def _grid(self, name: str, way: Way, chosen: np.ndarray) -> np.ndarray:
        """Thresholds, loose to strict, from the scores at healthy steps; the last is never reached by a number."""
        pairs = [(*self.runs[i].scored[name, way], self._targets[i]) for i in chosen]
        known = np.concatenate([score[_is_quiet(steps, targets)] for steps, score, targets in pairs])
        known = known[np.isfinite(known)]
        if not len(known):
            return np.array([np.inf])
        levels = np.geomspace(LOOSE, STRICT, NUM_THRESHOLDS)
        return np.append(np.unique(np.quantile(known, 1 - levels)), [np.nextafter(known.max(), np.inf), np.inf])

    def _tallies(self, name: str, way: Way, chosen: np.ndarray, grid: np.ndarray) -> list[list[Tally]]:
        """By run and threshold."""
        pairs = [(*self.runs[i].scored[name, way], self._targets[i]) for i in chosen]
        return [
            [tally(episodes(steps[score >= limit].tolist()), targets) for limit in grid]
            for steps, score, targets in pairs
        ]

    def _at(
        self,
        budget: float,
        threshold: float,
        held: np.ndarray,
        found: Sequence[_Outcome],
        out: Sequence[_Outcome],
        weights_BR: np.ndarray,
    ) -> At:
        base = [self._baseline[budget][i] for i in held.tolist()]
        lead_M = np.array([lead for run in found for lead in run.leads], dtype=np.float64)
        runs_M = np.array([r for r, run in enumerate(found) for _ in run.leads], dtype=np.int64)
        healthy_R = np.array([self._healthy[i] for i in held], dtype=np.float64)
        groups: dict[str, list[bool]] = {}
        if self._horizon == scoring.HORIZON:
            groups |= {kind: [self.runs[i].trace.kind == kind for i in held] for kind in ("spontaneous", "planted")}
            causes = sorted({self.runs[i].cause for i in held} - {"none"}, key=lambda c: int(c[1:]))
            groups |= {cause: [self.runs[i].cause == cause for i in held] for cause in causes}
        quartiles = np.quantile(lead_M, (0.25, 0.5, 0.75)) if len(lead_M) else np.full(3, np.nan)
        return At(
            budget=budget,
            threshold=rounded(threshold),
            false_rate=_rate(np.array([run.quiet_false for run in found]), healthy_R, weights_BR),
            recall=_share(found, "caught", "catchable", weights_BR),
            early=_share(found, "early", "foreseeable", weights_BR),
            lead=[rounded(float(q)) for q in quartiles],
            lead_span=_span(weighted_medians(lead_M, runs_M, weights_BR)),
            groups={name: _group(found, np.array(members)) for name, members in groups.items() if any(members)},
            gain_recall=_share(found, "caught", "catchable", weights_BR, less=base),
            gain_early=_share(found, "early", "foreseeable", weights_BR, less=base),
            out_false_rate=_rate(np.array([run.quiet_false for run in out]), healthy_R, weights_BR),
            out_recall=_share(out, "caught", "catchable", weights_BR),
            out_early=_share(out, "early", "foreseeable", weights_BR),
        )


class _Outcome(NamedTuple):
    """One run at one threshold. `foreseeable` targets open before their onset, of which `early` alarmed before it;
    `leads`: steps from the first alarm to the onset of the targets that had one by their peak."""

    quiet_false: int
    targets: int
    catchable: int
    caught: int
    foreseeable: int
    early: int
    leads: list[int]


def _outcomes(judged: Tally, targets: Sequence[Target], ahead: int) -> _Outcome:
    pairs = list(zip(targets, judged.first, strict=True))
    return _Outcome(
        quiet_false=judged.quiet_false,
        targets=len(targets),
        catchable=sum(catchable(target, 1 - ahead) for target in targets),
        caught=judged.caught[scoring.LEADS.index(1 - ahead)],
        foreseeable=sum(target.opens < target.onset for target in targets),
        early=sum(
            first is not None and first < target.onset + ahead and target.opens < target.onset
            for target, first in pairs
        ),
        leads=[target.onset + ahead - first for target, first in pairs if first is not None and first <= target.peak],
    )


def _choices(
    ways: Sequence[Way],
    grids: Sequence[np.ndarray],
    counts: Sequence[Counts],
    field: Field,
    weights_BR: np.ndarray,
    *,
    lead: int,
) -> list[Choice]:
    """For each weighting of the runs: the way with the largest area at the `lead`, and the threshold for each budget,
    that with the highest recall there which keeps to it; if none does, that with the fewest false alarms. Of equals
    the best at lead >= 0, then the middle one.
    """
    curves = [points(one, field, weights_BR) for one in counts]
    area_VB = np.array([(found := areas(curve))[:, lead] + TIE * found[:, AT_ONCE] for curve in curves])
    found = []
    for b in range(len(weights_BR)):
        index = int(np.argmax(area_VB[:, b]))
        rate, recall_SK = curves[index].false_rate_BS[b], curves[index].recall_BSK[b]
        recall = recall_SK[:, lead] + TIE * recall_SK[:, AT_ONCE]
        places = []
        for budget in BUDGETS:
            within = rate <= budget
            worth = np.where(within, recall, -math.inf) if within.any() else -rate
            best = np.flatnonzero(worth == worth.max())
            places.append(int(best[len(best) // 2]))
        found.append(Choice(ways[index], index, tuple(float(grids[index][p]) for p in places), tuple(places)))
    return found


def _is_quiet(steps: np.ndarray, targets: Sequence[Target]) -> np.ndarray:
    busy = np.zeros(len(steps), dtype=bool)
    for target in targets:
        busy |= (steps >= target.opens) & (steps <= target.end + scoring.GRACE)
    return ~busy


def _group(found: Sequence[_Outcome], members: np.ndarray) -> Group:
    inside = [run for run, member in zip(found, members, strict=True) if member]
    return Group(
        targets=sum(run.targets for run in inside),
        by_peak=sum(len(run.leads) for run in inside),
        catchable=sum(run.catchable for run in inside),
        caught=sum(run.caught for run in inside),
        foreseeable=sum(run.foreseeable for run in inside),
        early=sum(run.early for run in inside),
    )


def _share(
    found: Sequence[_Outcome], part: str, whole: str, weights_BR: np.ndarray, *, less: Sequence[_Outcome] | None = None
) -> Share:
    """Share of `whole` that is `part`, less that of `less` on the same draws."""
    part_R = np.array([getattr(run, part) for run in found], dtype=np.float64)
    if less is not None:
        part_R -= np.array([getattr(run, part) for run in less], dtype=np.float64)
    whole_R = np.array([getattr(run, whole) for run in found], dtype=np.float64)
    return _ratio(part_R, whole_R, weights_BR, scale=1.0)


def _rate(part_R: np.ndarray, steps_R: np.ndarray, weights_BR: np.ndarray) -> Share:
    return _ratio(part_R.astype(np.float64), steps_R, weights_BR, scale=10_000.0)


def _ratio(part_R: np.ndarray, whole_R: np.ndarray, weights_BR: np.ndarray, *, scale: float) -> Share:
    def of(weights: np.ndarray) -> np.ndarray:
        below = weights @ whole_R
        return np.divide(scale * (weights @ part_R), below, out=np.full(len(weights), np.nan), where=below > 0)

    low, high = interval(of(weights_BR))
    return Share(rounded(float(of(once(len(part_R)))[0])), rounded(low), rounded(high))


def _span(samples: np.ndarray) -> Span:
    low, high = interval(samples)
    return rounded(low), rounded(high)


def specimen_facts(runs: Sequence[Run], seeds: Sequence[int]) -> dict[str, dict[str, Any]]:
    """By specimen: kind, cause, and how many runs, targets and healthy steps the figures rest on."""
    found: dict[str, dict[str, Any]] = {}
    for trace, cause, *_ in (run for run in runs if run.trace.seed in seeds):
        start = {"kind": trace.kind, "cause": cause, "runs": 0, "targets": 0, "healthy_steps": 0}
        entry = found.setdefault(trace.specimen, start)
        entry["runs"] += 1
        entry["targets"] += len(trace.targets)
        entry["healthy_steps"] += num_healthy_steps(trace.targets, trace.num_steps)
    return found
