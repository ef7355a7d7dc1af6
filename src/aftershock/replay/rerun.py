"""A run that its config alone builds again: its spike is found in the recorded losses, and recorded anew.

    found = retrain(run)
    print(found.words)

Whoever keeps such runs (the lab, which this room may not import) gives the `Rerun`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from aftershock.numerics import median_mad
from aftershock.replay.recording import MARGIN, REST, Label, Spike, follow, record
from aftershock.replay.subject import Subject
from aftershock.workload import Workload

FAR = 3 * MARGIN
"""Steps before the onset from which a recording has both of its snapshots."""
BEFORE = 50
"""Steps that a loss is compared with where nothing is a spike."""
SHOWN = 5
"""Spikes that are named."""


class Rerun(NamedTuple):
    """A recorded run that can be trained again.

    - `losses`: by step, as recorded; `steps`: how many it was to have; `label`: the rule that finds spikes
    - `build`: a fresh workload of it that stands before the given step or an earlier one, and before which
    - `notes`: why its losses may come out otherwise than recorded
    """

    name: str
    losses: Mapping[int, float]
    steps: int
    build: Callable[[int], tuple[Workload, int]]
    label: Label
    notes: tuple[str, ...]


class Retrained(NamedTuple):
    """The subject of the spike; in words which it is, and whether the recorded losses came out again.

    `first`: the first step whose loss did not, None where all have the recorded bits; `before`, `off`: the largest
    difference up to the onset, and anywhere; inf where one is finite and the other is not.
    """

    subject: Subject
    words: str
    first: int | None
    before: float
    off: float


def retrain(run: Rerun, *, step: int | None = None) -> Retrained:
    """Find the first spike in the recorded losses, or with `step` the one that is under way or begins there, and train
    the run again, from its newest snapshot that is early enough, until that spike is over.

    Where not every step was logged, spikes are looked for in the new losses alone. Raises ValueError, with what else
    can be asked, where there is no spike.
    """
    last = max(run.losses)
    known = [run.losses[at] for at in range(last + 1)] if len(run.losses) == last + 1 else None
    if step is not None and not 1 <= step < last:
        raise ValueError(f"--step {step} is not one of {run.name}, whose losses are of steps 0 to {last}")
    rule = run.label if step is None else _at(step, run.label)
    spikes = [] if known is None else [Spike(*spike) for spike in rule(known)]
    if known is not None and not spikes:
        raise ValueError(_calm(run.name, known, step))
    if spikes and not spikes[0].onset:
        raise ValueError(f"{run.name} spikes with its first step: nothing before it is healthy to start from")
    workload, first = run.build(max(0, spikes[0].onset - FAR) if known is not None else 0)
    # A run that broke ended at once; a little further on it shows whether the loss comes back.
    steps = max(run.steps, last + 1 + REST)
    subject = record(workload, steps=steps, label=rule, before=[] if known is None else known[:first])
    if subject is None:
        raise ValueError(_lost(run, spikes))
    base = subject.baseline
    if base.height <= base.band:
        raise ValueError(
            f"{run.name} rises at step {subject.window.onset}, but no higher than the {BEFORE} losses before it were: "
            "they are still falling, or it is their usual spread, and nothing says what is calm; --step N asks about a "
            "later rise"
        )
    gaps = {at: _gap(run.losses[at], new) for at, new in subject.recorded.items() if at >= first and at in run.losses}
    off = {at: gap for at, gap in gaps.items() if gap > 0}
    before = max((gap for at, gap in off.items() if at < subject.window.onset), default=0.0)
    found = Retrained(subject, "", min(off, default=None), before, max(off.values(), default=0.0))
    compared = _compared(run, found, start=first, count=len(gaps))
    if off:
        subject.notes += (compared,)
    spoken = f"{run.name}: {_which(subject, spikes)} {compared}"
    return found._replace(words=spoken)


def _at(step: int, label: Label) -> Label:
    """The rule's spike that is under way at `step`; where there is none, what begins there by hand."""

    def one(losses: Sequence[float]) -> list[Spike]:
        if len(losses) <= step:
            return []
        found = [Spike(*spike) for spike in label(losses)]
        under_way = [spike for spike in found if spike.onset <= step < spike.end]
        by_hand = follow(losses, step, 0)._replace(onset=step)
        return under_way or ([by_hand] if by_hand.end > by_hand.peak else [])

    return one


# --------------------------------------------------------------------------------------------------------- sentences


def _which(subject: Subject, spikes: Sequence[Spike]) -> str:
    window = subject.window
    peak = subject.recorded[window.peak]
    lasts = "to the end" if window.end > max(subject.recorded) else f"until step {window.end - 1}"
    words = f"a spike from step {window.onset} {lasts}, highest at step {window.peak} ({peak:.4g})."
    others = [str(spike.onset) for spike in spikes if spike.onset != window.onset]
    if others:
        more = ", .." if len(others) > SHOWN else ""
        words += f" Others begin at {', '.join(others[:SHOWN])}{more}: --step asks about one of them."
    return words


def _compared(run: Rerun, found: Retrained, *, start: int, count: int) -> str:
    since = f"Trained again from {'the start' if start == 0 else f'the snapshot of step {start}'}"
    if found.first is None:
        return f"{since}, all {count} recorded losses came out again, bit for bit."
    why = f" ({'; '.join(run.notes)})" if run.notes else ""
    return (
        f"{since}, the recorded losses did not come out again to the bit{why}: the first other one is at step "
        f"{found.first}, up to the onset they differ by {found.before:.2g} at most and after it by {found.off:.2g}. "
        "What is explained is the spike of this training"
    )


def _lost(run: Rerun, spikes: Sequence[Spike]) -> str:
    why = f": {'; '.join(run.notes)}" if run.notes else ""
    if not spikes:
        return f"{run.name} has no spike in the {run.steps} steps that were trained again; --step N asks about step N"
    return f"{run.name} spikes at step {spikes[0].onset} as recorded, and trained again it does not{why}"


def _calm(name: str, losses: Sequence[float], step: int | None) -> str:
    if step is not None:
        return f"{name}: from step {step} on the loss does not rise; give the step at which a rise begins"
    rises = {
        at: losses[at] - median_mad(losses[max(0, at - BEFORE) : at]).median
        for at in range(min(BEFORE, len(losses) // 2), len(losses))
    }
    if not rises or len(losses) < 2:
        return f"{name} has {len(losses)} losses, too few to have a spike"
    top = max(rises, key=lambda at: rises[at])
    by_hand = follow(losses, top, 0)
    ask = f"--step {top} asks about it all the same" if by_hand.end > by_hand.peak else "which is within their spread"
    return (
        f"{name}: no spike in its {len(losses)} losses. The highest above the median of the {BEFORE} before it is at "
        f"step {top}: {losses[top]:.4g}, {rises[top]:+.2g}; {ask}"
    )


def _gap(a: float, b: float) -> float:
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    if not (math.isfinite(a) and math.isfinite(b)):
        # Broken is broken: the lab's last loss of a run that ended stands for all of the kind.
        return 0.0 if not (math.isfinite(a) or math.isfinite(b)) else math.inf
    return abs(a - b)
