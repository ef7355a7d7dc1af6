"""When an alarm is right: the definition by which every detector of the benchmark is judged, and the tally of one run.

Fixed before any detector was scored.

*Target.* A labelled spike with `onset`, `peak`, `end`, and the step it `opens`: the first step at which an alarm counts
for it. That is `HORIZON` steps before the onset of a spontaneous spike (or just after the end of the one before), and
the faulty step of a planted fault, which nobody can foresee.
*Episode.* An alarm, with all further ones less than `REFRACTORY` steps after it. An alarm that goes on is therefore
counted again every `REFRACTORY` steps: else a rule that never stops alarming had one false alarm a run.
*Caught at lead >= k.* The first episode from `opens` on begins at `peak - k` or before. True episodes are the first of
caught targets; further ones up to `end + GRACE` are neither true nor false.
*False at lead >= k.* An episode outside of all targets; and the first of a target when it comes later than `peak - k`.
*Left out.* A target that opens later than `peak - k` can be caught by nobody at that lead: it counts neither for recall
nor, if there is an alarm, against precision.
Recall = caught / targets that can be caught; precision = caught / (caught + false), both by lead.
*False alarms per 10,000 healthy steps*: episodes outside of all targets, over the steps there; no lead enters.

Must not import anything else of aftershock, nor numpy: the tally is a few comparisons per episode.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import NamedTuple

HORIZON = 32
"""Steps before the onset from which an alarm is a warning: fast precursors lead by 1 to 30 steps (survey of causes)."""
GRACE = 32
"""Steps after the end in which an alarm still speaks of the same spike."""
REFRACTORY = 16
"""Steps for which an alarm stands. At most half the horizon, so that an alarm that goes on is always seen in it."""
BUDGET = 1.0
"""False alarms per 10,000 healthy steps that a usable setting may have."""
LEADS = (0, 1, 2, 4, 8)
"""The k of "at lead >= k", in steps before the peak."""


class Target(NamedTuple):
    """What to warn of, in steps of its run: `opens` <= `onset` <= `peak` <= `end`."""

    opens: int
    onset: int
    peak: int
    end: int


class Tally(NamedTuple):
    """One detector on one run. `caught` and `false` by lead; `first` the first episode of each target, if any."""

    caught: tuple[int, ...]
    false: tuple[int, ...]
    quiet_false: int
    first: tuple[int | None, ...]


def episodes(alarms: Iterable[int]) -> list[int]:
    """First steps of the episodes that ascending alarm steps make.

    >>> episodes([3, 4, 18, 19, 40])
    [3, 19, 40]
    """
    starts: list[int] = []
    for step in alarms:
        if not starts or step >= starts[-1] + REFRACTORY:
            starts.append(step)
    return starts


def tally(starts: Sequence[int], targets: Sequence[Target]) -> Tally:
    """Judge the episodes that begin at `starts` (ascending) against the targets of a run, by the definition above.

    `targets` ascend, and each opens after the end of the one before.
    """
    opens = [target.opens for target in targets]
    first: list[int | None] = [None] * len(targets)
    quiet_false = 0
    for start in starts:
        index = bisect_right(opens, start) - 1
        if index < 0 or start > targets[index].end + GRACE:
            quiet_false += 1
        elif first[index] is None:
            first[index] = start
    caught, false = [], []
    for lead in LEADS:
        hits = late = 0
        for target, start in zip(targets, first, strict=True):
            if start is not None and catchable(target, lead):
                hits += start <= target.peak - lead
                late += start > target.peak - lead
        caught.append(hits)
        false.append(quiet_false + late)
    return Tally(tuple(caught), tuple(false), quiet_false, tuple(first))


def catchable(target: Target, lead: int) -> bool:
    """Whether an alarm at `lead` steps or more before the peak could count at all."""
    return target.opens <= target.peak - lead


def num_healthy_steps(targets: Sequence[Target], num_steps: int) -> int:
    """Steps of a run outside of all targets, their grace included."""
    busy, free_from = 0, 0
    for target in targets:
        start, stop = max(target.opens, free_from), min(target.end + GRACE + 1, num_steps)
        busy += max(0, stop - start)
        free_from = max(free_from, stop)
    return num_steps - busy
