"""What the fault injection study counts, and which runs it trains. Fixed before the study was run.

**A run** is one specimen of the zoo under one policy with one seed. It ends after as many accepted steps as the
specimen has; a step that is skipped or taken back costs batches instead. Its *end* is the held-out loss: the median of
16 readings, 5 steps apart (`survival_run`). A run that the guard stopped, or that used three times its steps in
batches, did not get to its end and has not survived. A policy that refuses a model or optimizer (one for Adam, given
SGD) has not been tried on it.

**Survived**, by kind of specimen:

- planted: end <= 1.02 times the end of the fault-free twin of the same seed (same weights, data and rates)
- spontaneous: weights and loss are finite, and end <= 1.02 times the unguarded run's, where that run has an end. The
  2 % are those of planted faults: one skipped batch moves the end by more than nothing
- healthy: end <= 1.005 times the unguarded run's

**Survived but for noise**: as above, with a limit no lower than 1 + the specimen's noise, the largest over the seeds.
Planted: how far two fault-free twins of one seed end apart, one of which leaves out 3 batches at the onset.
Spontaneous: how far two unguarded runs end apart, one of which began one unit in the last place off. Where that exceeds
2 %, the first definition measures the order of the data, or chaos.

**False interventions**: skips, rewinds, scaled rates, stops and edits on healthy specimens, and on planted ones before
the onset, per 10,000 batches. A policy that edits gradients as its normal work (a clip) counts each step that it says
it changed. **Steps lost**: batches - accepted steps.

Must not import torch or train anything.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from aftershock.bench.survival_run import (
    FAULT_FREE,
    INTERVENTIONS,
    NUDGED,
    REFERENCES,
    REFERENCES_OF,
    SHIFTED,
    UNGUARDED,
    Ended,
)

PLANTED_LIMIT, HEALTHY_LIMIT = 1.02, 1.005

DEFAULT = "ladder"
"""The policy that a guard has when none is given."""
CONTROLS = {"planted": (UNGUARDED, SHIFTED), "spontaneous": (NUDGED,), "healthy": ()}
"""Runs without a guard that are judged as a guarded one is: what a fault does to a run that nothing guards, and what a
difference that means nothing does. A policy is worth what it has beyond these."""

DECIDERS = ("skip", "rewind_and_skip", "backtrack", "back_off", "ratio_back_off")
"""Policies that touch nothing but themselves: they can be asked first, and part when the answer is an action."""
LATE = ("momentum_reset", "beta_switch", "eps_switch", "decay_switch")
"""Those that touch the optimizer, but not before an alarm: they part at the first verdict, before they are asked."""
SHARING = (*DECIDERS, *LATE)
"""Policies whose runs can share their beginning (`survival_shared`). The default is none of them: a policy that never
edits lets the guard take another way through its step."""
REFUSED = "refused: "
"""How the reason of a run begins whose policy was nothing for its model or optimizer."""


class Job(NamedTuple):
    """One run to train."""

    specimen: str
    policy: str
    seed: int


def full_grid(kinds: Mapping[str, str], policies: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """Every policy on every specimen (name: kind) with every seed, and the runs that they are compared with.

    Seed by seed, so that a study cut short has whole seeds.
    """
    return [
        Job(name, one, seed)
        for seed in seeds
        for name, kind in kinds.items()
        for one in (*REFERENCES_OF[kind], *policies)
    ]


class Judged(NamedTuple):
    """One run against its references. Ratios are of ends; None where one of the two has none."""

    specimen: str
    kind: str
    policy: str
    seed: int
    survived: bool
    but_for_noise: bool
    to_unguarded: float | None
    to_fault_free: float | None
    noise: float
    """The largest ratio of the ends of two runs that differ by nothing that matters; 1 where none was trained."""
    steps: int
    batches: int
    lost: int
    interventions: int
    false: int
    quiet_batches: int
    """Batches on which an intervention is false."""
    stopped: bool
    refused: bool
    """The policy said that this model or optimizer is nothing for it: such a run was not tried."""
    reason: str
    """Of a run that did not survive: why."""


def judge(runs: Iterable[Ended], *, kinds: Mapping[str, str], onsets: Mapping[str, int | None]) -> list[Judged]:
    """The guarded runs of `runs` and the `CONTROLS`, judged by the definitions above.

    Raises ValueError when a reference is missing.
    """
    by_job = {Job(run.specimen, run.policy, run.seed): run for run in runs}
    noise = _noise(by_job)
    found = []
    for job, run in by_job.items():
        kind = kinds[job.specimen]
        if job.policy in REFERENCES and job.policy not in CONTROLS[kind]:
            continue
        needed = REFERENCES_OF[kind]
        references = {}
        for name in needed:
            if job._replace(policy=name) not in by_job:
                raise ValueError(f"{job.specimen}, seed {job.seed}: the run {name} is missing; train it first")
            references[name] = by_job[job._replace(policy=name)]
        found.append(_judged(run, kind, onsets.get(job.specimen), references, noise.get(job.specimen, 1.0)))
    return found


def _noise(runs: Mapping[Job, Ended]) -> dict[str, float]:
    """By specimen: how far apart two runs end, at most, that differ by nothing that matters."""
    found: dict[str, float] = {}
    for job, run in runs.items():
        shams = {SHIFTED: FAULT_FREE, NUDGED: UNGUARDED}
        twin = runs.get(job._replace(policy=shams[job.policy])) if job.policy in shams else None
        ratio = None if twin is None else _ratio(_end(run), _end(twin))
        if ratio is not None:
            found[job.specimen] = max(found.get(job.specimen, 1.0), ratio, 1 / ratio)
    return found


def _judged(run: Ended, kind: str, onset: int | None, references: Mapping[str, Ended], noise: float) -> Judged:
    end, unguarded = _end(run), _end(references[UNGUARDED])
    twin = _end(references[FAULT_FREE]) if kind == "planted" else None
    to_unguarded, to_twin = _ratio(end, unguarded), _ratio(end, twin)
    did = sum(run.counts.get(name, 0) for name in INTERVENTIONS)
    wrong = _why(run, kind, to_unguarded, to_twin, PLANTED_LIMIT)
    refused = run.stopped is not None and run.stopped.startswith(REFUSED)
    allowed = _why(run, kind, to_unguarded, to_twin, max(PLANTED_LIMIT, noise))
    return Judged(
        specimen=run.specimen,
        kind=kind,
        policy=run.policy,
        seed=run.seed,
        survived=not wrong,
        but_for_noise=not allowed,
        to_unguarded=to_unguarded,
        to_fault_free=to_twin,
        noise=noise,
        steps=run.steps,
        batches=run.batches,
        lost=run.batches - run.steps,
        interventions=did,
        false=did if kind == "healthy" else run.early,
        quiet_batches=run.batches if kind == "healthy" else min(onset or 0, run.batches),
        stopped=run.stopped is not None and not refused,
        refused=refused,
        reason=wrong,
    )


def _why(run: Ended, kind: str, to_unguarded: float | None, to_twin: float | None, limit: float) -> str:
    """Why a run has not survived; empty when it has."""
    if run.stopped is not None:
        return f"stopped at step {run.steps}: {run.stopped}"
    if _end(run) is None:
        return "not finite" if not run.finite else f"only {run.steps} steps in {run.batches} batches"
    if not run.finite:
        return "not finite"
    if kind == "planted":
        return "" if to_twin is not None and to_twin <= limit else f"ends {_percent(to_twin)} above the fault-free run"
    if to_unguarded is None:
        return ""  # the unguarded run did not end finite
    limit = HEALTHY_LIMIT if kind == "healthy" else limit
    return "" if to_unguarded <= limit else f"ends {_percent(to_unguarded)} above the unguarded run"


def _end(run: Ended) -> float | None:
    """The loss that a run is judged by: held-out, where there is any, else of training."""
    return run.held_out if run.has_held_out else run.tail


def _ratio(value: float | None, reference: float | None) -> float | None:
    return None if value is None or reference is None or reference <= 0 else value / reference


def _percent(ratio: float | None) -> str:
    return "nowhere near" if ratio is None else f"{100 * (ratio - 1):.1f} %"


class Summary(NamedTuple):
    """Runs of one policy, of one specimen, one kind, or all. Medians are over the runs that have a value.

    `runs` are those that were tried; those that the policy `refused` count nowhere else.
    """

    runs: int
    refused: int
    survived: int
    but_for_noise: int
    stopped: int
    to_unguarded: float | None
    to_fault_free: float | None
    worst: float | None
    """The largest ratio to the run that decides: the fault-free twin of a planted fault, the unguarded run else."""
    lost: float
    """Mean of the steps lost a run."""
    interventions: float
    """Mean a run."""
    false: int
    quiet_batches: int

    @property
    def false_rate(self) -> float | None:
        """False interventions per 10,000 batches on which one would be false."""
        return None if not self.quiet_batches else 1e4 * self.false / self.quiet_batches


def summary(runs: Sequence[Judged]) -> Summary:
    """The figures of some guarded runs. Raises ValueError when there are none."""
    if not runs:
        raise ValueError("no run to sum up; train some first")
    tried = [run for run in runs if not run.refused]
    decides = [run.to_fault_free if run.kind == "planted" else run.to_unguarded for run in tried]
    return Summary(
        runs=len(tried),
        refused=len(runs) - len(tried),
        survived=sum(run.survived for run in tried),
        but_for_noise=sum(run.but_for_noise for run in tried),
        stopped=sum(run.stopped for run in tried),
        to_unguarded=_median(run.to_unguarded for run in tried),
        to_fault_free=_median(run.to_fault_free for run in tried),
        worst=max((ratio for ratio in decides if ratio is not None), default=None),
        lost=statistics.fmean(run.lost for run in tried) if tried else 0.0,
        interventions=statistics.fmean(run.interventions for run in tried) if tried else 0.0,
        false=sum(run.false for run in tried),
        quiet_batches=sum(run.quiet_batches for run in tried),
    )


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return statistics.median(known) if known else None
