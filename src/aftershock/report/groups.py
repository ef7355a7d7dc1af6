"""The runs of a study grouped by (size, arm): loss per rate, which rates fail, LR sensitivity.

What counts as failing is `forecast.sensitivity.run_fails`; `FAILS` states it for the reader of the report.
Pure: takes plain values, reads no files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from aftershock.forecast.sensitivity import FAIL_FRAC, LossRow, bootstrap_sensitivity, run_fails, sensitivity_table

FAILS = (
    "A run fails when it diverges (its loss stops being finite), or when its rate lies above its arm's best rate and "
    f"it ends with more than {FAIL_FRAC:.0%} of the gain missing that the best rate of its own size and arm made over "
    "the initial loss. A rate fails when at least half of its seeds fail."
)

Outcome = Literal["trained", "slow", "broken", "diverged", "unfinished"]


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """One run as the report sees it. Losses in nats; None where the run has no such number (yet)."""

    run_id: str
    size: str
    arm: str
    lr: float
    seed: int
    status: str
    final_loss: float | None = None
    final_train_loss: float | None = None
    initial_loss: float | None = None
    diverged_step: int | None = None
    steps: int | None = None
    tokens: int | None = None
    num_params: int | None = None
    num_block_params: int | None = None
    seconds: float | None = None
    peak_logit: float | None = None

    @property
    def judged(self) -> bool:
        """Whether the run has come to an end that says something about its rate."""
        return self.status in ("finished", "diverged")


@dataclass(frozen=True, kw_only=True)
class Point:
    """One rate of a group. `loss` is the mean over seeds of min(loss, l0), a diverged seed counting as l0 [nats]."""

    lr: float
    loss: float | None
    low: float | None
    high: float | None
    num_runs: int
    num_judged: int
    num_diverged: int
    num_broken: int
    verdict: Literal["trained", "slow", "fails", "unknown"]
    peak_logit: float | None


@dataclass(frozen=True, kw_only=True)
class Group:
    """One (size, arm). `lr_sensitivity` [nats] and its 95 % `interval` over seeds; None with the reason in `note`.

    `fails_from`: the lowest rate from which every judged rate up to the highest fails.
    """

    size: str
    arm: str
    num_params: int | None
    num_block_params: int | None
    num_seeds: int
    l0: float | None
    best_lr: float | None
    best_loss: float | None
    lr_sensitivity: float | None
    interval: tuple[float, float] | None
    note: str
    fails_from: float | None
    points: tuple[Point, ...]


class Judged(NamedTuple):
    """`groups` in order of (size, arm); `outcomes` run_id -> outcome."""

    groups: list[Group]
    outcomes: dict[str, Outcome]


def judge(runs: Sequence[RunFacts]) -> Judged:
    """Group, judge every run, and measure each group's LR sensitivity."""
    sizes, arms = ordered_sizes(runs), list(dict.fromkeys(r.arm for r in runs))
    groups: list[Group] = []
    outcomes: dict[str, Outcome] = {}
    for size in sizes:
        for arm in arms:
            members = [r for r in runs if (r.size, r.arm) == (size, arm)]
            if members:
                groups.append(_group(members, outcomes))
    return Judged(groups, outcomes)


def ordered_sizes(runs: Sequence[RunFacts]) -> list[str]:
    """Sizes from small to large by block parameters; those without a number last, in order of appearance."""
    known: dict[str, float] = {}
    for run in runs:
        params = run.num_block_params if run.num_block_params is not None else math.inf
        known[run.size] = min(known.get(run.size, math.inf), params)
    return sorted(known, key=lambda size: known[size])


def _group(members: Sequence[RunFacts], outcomes: dict[str, Outcome]) -> Group:
    starts = [r.initial_loss for r in members if r.initial_loss is not None and math.isfinite(r.initial_loss)]
    l0 = sum(starts) / len(starts) if starts else None
    ladder: dict[float, list[RunFacts]] = {lr: [] for lr in sorted({r.lr for r in members})}
    for run in members:
        ladder[run.lr].append(run)
    capped = {lr: [_capped(r, l0) for r in runs if r.judged] for lr, runs in ladder.items()}
    means = {lr: _mean(values) for lr, values in capped.items()}
    alive = {
        lr: mean
        for lr, mean in means.items()
        if mean is not None and any(_finite(r.final_loss) and r.judged for r in ladder[lr])
    }
    best_lr = min(alive, key=lambda lr: alive[lr]) if alive else None
    for run in members:
        outcomes[run.run_id] = _outcome(run, l0, best_lr, alive.get(best_lr) if best_lr is not None else None)
    points = tuple(_point(lr, runs, means[lr], l0, outcomes) for lr, runs in ladder.items())
    measured = _sensitivity(ladder, l0)
    return Group(
        size=members[0].size,
        arm=members[0].arm,
        num_params=next((r.num_params for r in members if r.num_params is not None), None),
        num_block_params=next((r.num_block_params for r in members if r.num_block_params is not None), None),
        num_seeds=len({r.seed for r in members}),
        l0=l0,
        best_lr=best_lr,
        best_loss=alive[best_lr] if best_lr is not None else None,
        lr_sensitivity=measured.value,
        interval=measured.interval,
        note=measured.note,
        fails_from=_fails_from(points),
        points=points,
    )


def _outcome(run: RunFacts, l0: float | None, best_lr: float | None, best: float | None) -> Outcome:
    if not run.judged:
        return "unfinished"
    if run.status == "diverged" or run.final_loss is None or not math.isfinite(run.final_loss):
        return "diverged"
    if l0 is None or best_lr is None or best is None or not run_fails(run.final_loss, best=best, l0=l0):
        return "trained"
    return "broken" if run.lr > best_lr else "slow"


def _point(
    lr: float, runs: Sequence[RunFacts], mean: float | None, l0: float | None, outcomes: Mapping[str, Outcome]
) -> Point:
    judged = [r for r in runs if r.judged]
    ends = [outcomes[r.run_id] for r in judged]
    num_diverged, num_broken = ends.count("diverged"), ends.count("broken")
    losses = [value for r in judged if (value := _capped(r, l0)) is not None]
    logits = [r.peak_logit for r in runs if r.peak_logit is not None]
    if not judged:
        verdict = "unknown"
    elif 2 * (num_diverged + num_broken) >= len(judged):
        verdict = "fails"
    else:
        verdict = "slow" if 2 * ends.count("slow") >= len(judged) else "trained"
    return Point(
        lr=lr,
        loss=mean,
        low=min(losses, default=None),
        high=max(losses, default=None),
        num_runs=len(runs),
        num_judged=len(judged),
        num_diverged=num_diverged,
        num_broken=num_broken,
        verdict=verdict,
        peak_logit=max(logits, default=None),
    )


def _fails_from(points: Sequence[Point]) -> float | None:
    onset = None
    for point in reversed(points):
        if point.verdict == "fails":
            onset = point.lr
        elif point.verdict != "unknown":
            break
    return onset


class _Sensitivity(NamedTuple):
    value: float | None
    interval: tuple[float, float] | None
    note: str


def _sensitivity(ladder: Mapping[float, Sequence[RunFacts]], l0: float | None) -> _Sensitivity:
    """LR sensitivity of the seed means, or the reason why there is none."""
    open_rates = [lr for lr, runs in ladder.items() if not any(r.judged for r in runs)]
    if len(open_rates) == len(ladder):
        return _Sensitivity(None, None, "no run has ended yet")
    if l0 is None:
        return _Sensitivity(None, None, "no run has recorded its initial loss")
    if open_rates:
        return _Sensitivity(None, None, f"{len(open_rates)} of {len(ladder)} rates have no finished run")
    if len(ladder) < 2:
        return _Sensitivity(None, None, "one rate only")
    rows = [
        LossRow(members[0].arm, lr, None if r.status == "diverged" else r.final_loss)
        for lr, members in ladder.items()
        for r in members
        if r.judged
    ]
    finite = [row.loss for row in rows if row.loss is not None and math.isfinite(row.loss)]
    if not finite:
        return _Sensitivity(None, None, "every run diverged")
    if min(finite) > l0:
        return _Sensitivity(None, None, "every run ended above its initial loss")
    waiting = sum(not r.judged for runs in ladder.values() for r in runs)
    note = f"{waiting} of {sum(map(len, ladder.values()))} runs not in yet" if waiting else ""
    interval = None
    if all(sum(r.judged for r in runs) >= 2 for runs in ladder.values()):
        found = bootstrap_sensitivity(rows, l0)[0]
        interval = (found.low, found.high)
    return _Sensitivity(sensitivity_table(rows, l0)[0].lr_sensitivity, interval, note)


def _capped(run: RunFacts, l0: float | None) -> float | None:
    """min(loss, l0), a diverged run counting as l0; None where neither is known."""
    if run.status == "diverged" or run.final_loss is None or not math.isfinite(run.final_loss):
        return l0
    return run.final_loss if l0 is None else min(run.final_loss, l0)


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None
