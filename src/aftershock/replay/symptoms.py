"""What the recorded numbers say before any counterfactual: what moved first, how fast, and what struck from outside.

    symptoms(subject, controls.results[0].rows)

Reads rows; takes no step. Must not import the runner.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

from aftershock.guard.policies.moments import betas_of
from aftershock.guard.tree import Ref
from aftershock.numerics import median_mad
from aftershock.replay.loop import Taken
from aftershock.replay.subject import Subject

Struck = Literal["weights", "gradient", "rate", "optimizer", "batch", "none"]
"""What was otherwise in the recorded run than in an unchanged replay, at the first step on which they differ:

- weights: the loss, though every update before it was the same: weights changed between two steps
- gradient: the gradient of the same loss; rate: the schedule's rate of the same gradient
- optimizer: the update from the same gradient at the same rate: moments or settings
- batch: the data, by its digest; none: nothing, the record came out again
"""
CALM = 60
"""Steps before the onset that say what a gradient and an update usually are."""
LATE = 3
"""Of these so many before the onset are left out, since the spike may begin in them."""
MOVED_SIGMAS = 5.0
LEAST_RISE = math.log(2.0)
"""A norm has moved when it left its band by 5 robust sigmas of its log and at least doubled."""
LEAST_SIGMA = 0.05
SUDDEN_SHARE, SUDDEN_STEPS = 0.5, 2
"""A spike is sudden when half its height is reached within 2 steps of the onset."""
JUMP = 1.5
"""A rate has jumped that is so many times its calm median."""
BEFORE = 6
"""Steps before the onset in which what made the spike is looked for."""
AHEAD = 2
"""A gradient that moved so many steps before the loss is no doing of one batch."""
STALE = 3.0
"""A second moment is stale that is so many times the squared gradients it should follow."""
RECENT = 20
"""Steps before the suspect snapshot whose gradients it is set against."""
SAME = 1e-4
"""Relative difference up to which a norm that a guard measured in its own way is the same."""


class Symptoms(NamedTuple):
    """Steps and factors are None where the rows do not hold what they need.

    - `struck`, `at`: see `Struck`, and its step
    - `sudden`: whether half the height was reached within 2 steps
    - `rate_factor`: highest rate about the onset over the calm median
    - `update_moved`, `grad_moved`: first step about the onset at which the norm had left its calm band
    - `ahead`: gradient and update had both moved `AHEAD` steps or more before the loss left its band
    - `overflowed`: a gradient about the onset was not finite though its own loss was
    - `update_first`: the update moved, and the gradient had not: rate or optimizer rather than data
    - `lag`: see `second_moment_lag`
    """

    struck: Struck
    at: int | None
    sudden: bool | None
    rate_factor: float | None
    update_moved: int | None
    grad_moved: int | None
    update_first: bool | None
    ahead: bool | None
    overflowed: bool | None
    lag: float | None = None

    @property
    def stale(self) -> bool | None:
        """Whether Adam's second moment stood well above the squared gradients, and so could only fall."""
        return None if self.lag is None else self.lag >= STALE

    @property
    def rate_jumped(self) -> bool | None:
        """Whether the rate rose at the onset by more than a schedule does."""
        return None if self.rate_factor is None else self.rate_factor >= JUMP


def symptoms(subject: Subject, replayed: Mapping[int, Taken] | None = None) -> Symptoms:
    """What the rows of the record say, set against those of an unchanged replay where there is one."""
    rows = subject.rows
    struck, at = ("none", None) if replayed is None else what_struck(subject, replayed)
    grad = _moved({step: row.grad_norm for step, row in rows.items()}, subject)
    update = _moved({step: row.update_norm for step, row in rows.items()}, subject)
    known = any(math.isfinite(row.update_norm) for row in rows.values())
    first = ahead = overflowed = None
    if known:
        about = range(subject.window.onset - BEFORE, subject.window.onset + 1)
        near = [rows[step] for step in about if step in rows]
        overflowed = any(math.isfinite(row.loss) and not math.isfinite(row.grad_norm) for row in near)
        ahead = max(math.inf if s is None else s for s in (grad, update)) <= subject.window.onset - AHEAD
        first = update is not None and (grad is None or grad > update)
    lag = second_moment_lag(subject)
    return Symptoms(struck, at, _sudden(subject), _rate_factor(subject), update, grad, first, ahead, overflowed, lag)


def second_moment_lag(subject: Subject) -> float | None:
    """sum(v_hat) at the suspect snapshot over the mean of |g|^2 (as clipped) in the `RECENT` steps before it.

    About 1 where v follows the gradients. Far above 1 they have shrunk faster than v decays: from there on v falls, and
    the effective rate rises, whatever the gradients do (arXiv 2506.04805). None where no second moment can lag (no
    Adam, AMSGrad), where it is sharded over ranks, or no gradient norm is known.
    """
    state = subject.states[subject.window.start]
    limit = math.inf if subject.workload.clip_norm is None else subject.workload.clip_norm
    recent = range(subject.window.start - RECENT, subject.window.start)
    norms = [min(subject.rows[step].grad_norm, limit) for step in recent if step in subject.rows]
    squares = [norm**2 for norm in norms if math.isfinite(norm)]
    total, found = 0.0, False
    for group in state.plain["group"]:
        for name in group["params"]:
            held = state.plain["optimizer"].get(name, {})
            v = held.get("exp_avg_sq") if isinstance(held, dict) else None
            if v is None:
                continue
            if "max_exp_avg_sq" in held or v.piece is not None:
                return None
            step = held["step"]
            count = float(state.tensors[step.name]) if isinstance(step, Ref) else float(step)
            total += state.tensors[v.name].double().sum().item() / (1 - betas_of(group)[1] ** count)
            found = True
    mean = sum(squares) / len(squares) if squares else 0.0
    return total / mean if found and mean > 0 else None


def what_struck(subject: Subject, replayed: Mapping[int, Taken]) -> tuple[Struck, int | None]:
    """The first thing in which an unchanged replay differs from the record, in the order in which a step computes."""
    for step in sorted(replayed):
        now, then = replayed[step], subject.rows.get(step)
        recorded = subject.recorded.get(step)
        if recorded is not None and not _same(now.loss, recorded, 0.0):
            return "weights", step
        if then is None:
            continue
        if not _same(now.grad_norm, then.grad_norm, SAME):
            return "gradient", step
        if not _same(now.lr, then.lr, SAME):
            return "rate", step
        if not _same(now.update_norm, then.update_norm, SAME):
            return "optimizer", step
    return "none", None


def _same(now: float, then: float, tolerance: float) -> bool:
    """Whether two measurements agree; one that was not made cannot differ."""
    if math.isnan(then) or math.isnan(now):
        return math.isnan(now) == math.isnan(then) or (tolerance > 0 and math.isnan(then))
    return now == then or abs(now - then) <= tolerance * abs(then)


def _sudden(subject: Subject) -> bool | None:
    base, window = subject.baseline, subject.window
    near = [subject.recorded.get(window.onset + i) for i in range(SUDDEN_STEPS)]
    known = [base.excess(loss) for loss in near if loss is not None]
    if not known:
        return None
    return max(known) >= SUDDEN_SHARE * base.height if math.isfinite(base.height) else math.inf in known


def _rate_factor(subject: Subject) -> float | None:
    window = subject.window
    calm = [row.lr for step, row in subject.rows.items() if window.onset - CALM <= step < window.onset - BEFORE]
    calm = [lr for lr in calm if lr > 0]  # nan is not
    about = [subject.rows[s].lr for s in range(window.onset - BEFORE, window.onset + 1) if s in subject.rows]
    about = [lr for lr in about if lr > 0]
    return max(about) / median_mad(calm).median if calm and about else None


def _moved(norms: Mapping[int, float], subject: Subject) -> int | None:
    """The first step about the onset at which a norm is out of its calm band, up to the spike's peak."""
    window = subject.window
    calm = [x for step, x in norms.items() if window.onset - CALM <= step < window.onset - LATE and 0 < x < math.inf]
    if len(calm) < BEFORE:
        return None
    median, mad = median_mad([math.log(x) for x in calm])
    bar = median + max(MOVED_SIGMAS * max(mad, LEAST_SIGMA), LEAST_RISE)
    for step in range(window.onset - BEFORE, window.peak + 1):
        x = norms.get(step)
        if x is not None and (not math.isfinite(x) or (x > 0 and math.log(x) > bar)):
            return step
    return None
