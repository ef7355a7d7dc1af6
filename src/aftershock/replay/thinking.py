"""What the model believed before, during and after a spike: nothing at all, or something else?

    found = thinking(subject)
    print(found.verdict)

An unchanged replay stops at a handful of steps, and each time the model predicts the targets of the same calm batches.
Legend: B sequences, T positions, V vocabulary or classes, N predictions, C pairs seen. Must not import the lab.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from aftershock.replay.edits.data import calm
from aftershock.replay.loop import parts, take_steps
from aftershock.replay.predictions import Asking, Counts, Logits, Targets, View, reading
from aftershock.replay.run import Window
from aftershock.replay.subject import Subject

BINS = 15
"""Of the calibration error (Guo et al. 2017)."""
COUNTED = 200
"""Steps before the first suspect batch whose targets make the unigram and bigram model."""
LEAST, SHOWN = 5, 8
"""Occurrences from which a token's mean loss says something, and how many tokens are named."""
HALF = 0.5

Kind = Literal["nothing", "something else", "much the same", "mixed", "not finite", "unknown"]


class Bucket(NamedTuple):
    """Mean loss of the `count` predictions with low <= x < high; nats."""

    low: int
    high: int
    loss: float
    count: int


class Change(NamedTuple):
    """How much a target's mean loss differs from before the spike, over `count` occurrences; nats."""

    token: int
    text: str
    change: float
    count: int


class Point(NamedTuple):
    """The model as it stands before step `step`, on the calm batches; means over predictions, in nats.

    p is the model's distribution, y the target, p0 the distribution before the spike:

    - `finite`: share of predictions whose p is finite; the means are over these
    - `loss`: -ln p(y). `entropy`: -sum p ln p
    - `calibration`: expected calibration error: predictions sorted by their confidence c = max p into 15 bins
      (b/15, (b+1)/15], the sum of (n_b / N) |share right in b - mean c in b| (Naeini et al. 2015; Guo et al. 2017)
    - `from_unigram`, `from_bigram`: KL(p || q) = sum p ln(p / q), with q(y) = (count of y + 1) / (N + V), and
      q(y | z) = (count of z y + 1) / (count of z + V) after the target z before it
    - `from_before`: KL(p0 || p). `agreement`: share of predictions whose most likely token is that of before
    - `by_frequency`: the loss by how often the target was counted; `by_position`: by place in the sequence
    - `damaged`, `improved`: targets with at least 5 occurrences whose mean loss rose and fell most
    """

    name: str
    step: int
    finite: float
    loss: float
    entropy: float
    calibration: float
    from_unigram: float
    from_bigram: float
    from_before: float
    agreement: float
    by_frequency: tuple[Bucket, ...]
    by_position: tuple[Bucket, ...]
    damaged: tuple[Change, ...]
    improved: tuple[Change, ...]


class Thinking(NamedTuple):
    """What was believed. `points`: "before" (no suspect batch was trained on), "onset", "peak", "half-way" down,
    "after"; two of one step are equal but for the name. `notes`: what is left out, and what speaks against it.

    `kind`, from entropy H, KL to the unigram K and agreement A at the worst point of the spike, `judged`: the one of
    onset, peak and half-way with the highest loss on the calm batches. (At the peak itself a bad batch has only been
    met, not been trained on.) With 0 for before and U for the unigram:

    - "nothing": H > H0, and H >= H0 + (H_U - H0) / 2 with K < K0, or H >= H0 + (ln V - H0) / 2: it fell back towards
      the frequencies, or towards no preference at all
    - "something else": H < H0 + (H_U - H0) / 2 and A < 1/2: as sure as before, of other things
    - "much the same": neither, and A >= 1/2; "mixed": neither, and A < 1/2
    - "not finite": some prediction is not a number; "unknown": the peak was not reached in time
    """

    kind: Kind
    verdict: str
    judged: str
    points: tuple[Point, ...]
    unigram_entropy: float
    vocabulary: int
    num_predictions: int
    num_counted: int
    notes: tuple[str, ...]

    def at(self, name: str) -> Point | None:
        """The point of this name, None where it was left out."""
        return next((point for point in self.points if point.name == name), None)


def thinking(
    subject: Subject,
    *,
    logits: Logits | None = None,
    targets: Targets | None = None,
    decode: Callable[[Sequence[int]], str] | None = None,
    batches: int = 4,
    deadline: float = math.inf,
) -> Thinking:
    """Replay unchanged up to the end of the spike and ask the model on the way what it believes.

    - `logits(model, batch)`: [B, T, V] or [B, V] of a micro-batch; `targets(batch)`: [B, T] or [B], aligned with them
      (of a language model: the next tokens), below 0 where there is none. By default for dicts with "labels", as
      models of Hugging Face take them (shifted by one for their causal models), and for pairs (inputs, targets)
    - `decode`: ids to text, as a tokenizer's; without it bytes for a vocabulary of 256, else the number
    - `batches`: steps before the first suspect batch whose batches are asked about, dropout off
    - `deadline`: of `time.monotonic()`; points not reached by then are left out

    Neither state, random numbers nor modes are touched by the asking. The workload is left at the last point.
    Raises ValueError for batches below 1, where no calm step lies between snapshot and onset, and where it cannot be
    told what the model predicts.

    Example:
        found = thinking(subject, decode=tokenizer.decode)
        print(found.verdict, found.at("peak"))
    """
    window, notes = subject.window, list[str]()
    steps = calm(window)
    if batches < 1 or not steps:
        raise ValueError(
            f"batches={batches} of the {len(steps)} calm steps between snapshot and spike were to be asked about; give "
            "at least 1, and a recording whose snapshot lies further before the onset (margin)"
        )
    subject.restore()
    model = subject.workload.model
    asked = [part for step in steps[-batches:] for part in _parts(subject, step)]
    ask = Asking(model, asked, *reading(model, asked[0], logits, targets))
    counts = Counts([target for step in _counted(subject) for target in map(ask.targets, _parts(subject, step))], ask)
    notes += ask.notes
    wanted = {
        "before": steps.stop,
        "onset": window.onset,
        "peak": window.peak,
        "half-way": _half_way(subject, window),
        "after": window.end,
    }
    views, came_back = _views(subject, ask, counts, sorted(set(wanted.values())), deadline)
    left_out = [name for name, step in wanted.items() if step not in views]
    notes += [f"left out, since there was no time or no batch: {', '.join(left_out)}"] if left_out else []
    points = tuple(
        _point(name, step, views[step], views[steps.stop], ask, counts, decode)
        for name, step in wanted.items()
        if step in views
    )
    notes += [] if came_back else ["this replay does not have the spike: what it shows is a calm run"]
    kind, words, judged = _verdict({point.name: point for point in points}, counts.entropy, math.log(ask.vocabulary))
    totals = (counts.entropy, ask.vocabulary, ask.num, int(counts.total))
    return Thinking(kind, words, judged, points, *totals, tuple(notes))


# --------------------------------------------------------------------------------------------- steps and their batches


def _views(
    subject: Subject, ask: Asking, counts: Counts, steps: Sequence[int], deadline: float
) -> tuple[dict[int, View], bool]:
    """By step, as far as time and batches reach; the first is what the others are compared with. And whether the loss
    rose as in the recording, as far as it got."""
    found: dict[int, View] = {}
    run, at, base, highest = subject.run(), subject.window.start, subject.baseline, -math.inf
    for step in steps:
        if subject.stop is not None and step > subject.stop:
            break
        for taken in take_steps(run, at, step):
            at, highest = taken.step + 1, max(highest, base.excess(taken.loss))
            if time.monotonic() >= deadline:
                break
        if at < step or time.monotonic() >= deadline:
            break
        found[step] = ask.view(counts, next(iter(found.values()), None))
    return found, highest >= base.threshold or at <= subject.window.peak


def _half_way(subject: Subject, window: Window) -> int:
    """The first step after the peak whose recorded excess is at most half the peak's; of one that was not finite, the
    first that is; where the record does not tell, the middle."""
    base = subject.baseline
    excess = {step: base.excess(loss) for step, loss in subject.recorded.items() if window.peak <= step < window.end}
    peak = excess.get(window.peak, math.nan)
    for step in range(window.peak + 1, window.end):
        here = excess.get(step, math.inf)
        if math.isfinite(here) and (math.isinf(peak) or here <= HALF * peak):
            return step
    return (window.peak + 1 + window.end) // 2


def _counted(subject: Subject) -> range:
    """Calm steps whose targets are counted; before the snapshot only where the workload has their batches."""
    steps = calm(subject.window)
    first = max(0, steps.stop - COUNTED)
    return range(first if subject.stop is None else max(steps.start, first), steps.stop)


def _parts(subject: Subject, step: int) -> list[Any]:
    return parts(subject.workload, subject.batch(step), subject.index_of(step))


# ------------------------------------------------------------------------------------------------ points and verdict


def _point(
    name: str,
    step: int,
    view: View,
    first: View,
    ask: Asking,
    counts: Counts,
    decode: Callable[[Sequence[int]], str] | None,
) -> Point:
    good = torch.isfinite(view.entropy_N)
    loss_N, flat = view.loss_N[good], [values[good] for values in ask.flat]
    target_N, place_N = flat[0], flat[2]
    changes = list(_changes(view.loss_N - first.loss_N, ask, decode))
    return Point(
        name=name,
        step=step,
        finite=good.double().mean().item(),
        loss=_mean(loss_N),
        entropy=_mean(view.entropy_N[good]),
        calibration=_calibration(view.confidence_N[good], view.top_N[good] == target_N),
        from_unigram=_mean(view.from_unigram_N[good]),
        from_bigram=_mean(view.from_bigram_N[good & (ask.flat.previous_N >= 0)]),
        from_before=_mean(view.from_before_N[good]),
        agreement=_mean((view.top_N == first.top_N)[good].double()),
        by_frequency=tuple(_buckets(counts.count_V[target_N].long(), loss_N, base=10)),
        by_position=tuple(_buckets(place_N, loss_N, base=2)) if ask.sequences else (),
        damaged=tuple(sorted((one for one in changes if one.change > 0), key=lambda one: -one.change)[:SHOWN]),
        improved=tuple(sorted((one for one in changes if one.change < 0), key=lambda one: one.change)[:SHOWN]),
    )


def _changes(change_N: Tensor, ask: Asking, decode: Callable[[Sequence[int]], str] | None) -> Iterator[Change]:
    """Per token, over the predictions that are finite at both points."""
    good = torch.isfinite(change_N)
    target_N = ask.flat.target_N[good]
    count_V = torch.bincount(target_N, minlength=ask.vocabulary)
    sum_V = torch.zeros(ask.vocabulary, dtype=torch.float64).index_add_(0, target_N, change_N[good])
    for token in (count_V >= LEAST).nonzero().squeeze(1).tolist():
        text = _text(token, ask.vocabulary) if decode is None else decode([token])
        count = int(count_V[token])
        yield Change(token, text, sum_V[token].item() / count, count)


def _text(token: int, vocabulary: int) -> str:
    return repr(bytes([token])) if vocabulary == 256 else repr(token)


def _buckets(value_N: Tensor, loss_N: Tensor, *, base: int) -> Iterator[Bucket]:
    """[0, 1), [1, base), [base, base^2), ..: those that hold a prediction."""
    low, high = 0, 1
    while low <= (int(value_N.max()) if len(value_N) else -1):
        inside = (value_N >= low) & (value_N < high)
        if inside.any():
            yield Bucket(low, high, _mean(loss_N[inside]), int(inside.sum()))
        low, high = high, high * base


def _calibration(confidence_N: Tensor, right_N: Tensor) -> float:
    bin_N = (confidence_N * BINS).ceil().long().clamp(1, BINS) - 1
    gap = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bin_N, right_N.double() - confidence_N)
    return gap.abs().sum().item() / len(confidence_N) if len(confidence_N) else math.nan


def _mean(values: Tensor) -> float:
    return values.mean().item() if len(values) else math.nan


def _verdict(points: Mapping[str, Point], unigram: float, uniform: float) -> tuple[Kind, str, str]:
    """By the rule that `Thinking` states: the kind, one sentence, and the point it is of."""
    if "before" not in points or "peak" not in points:
        return "unknown", "Not known: the peak of the spike was not reached.", ""
    old = points["before"]
    spike = [points[name] for name in ("onset", "peak", "half-way") if name in points]
    new = max(spike, key=lambda point: (point.finite < 1, point.loss))
    at = f"At its worst ({new.name}, step {new.step})"
    if new.finite < 1:
        return "not finite", f"{at} {1 - new.finite:.0%} of its predictions are no numbers.", new.name
    half = old.entropy + HALF * (unigram - old.entropy)
    blank = old.entropy + HALF * (uniform - old.entropy)
    numbers = (
        f"entropy {old.entropy:.2f} -> {new.entropy:.2f} nats (unigram {unigram:.2f}, uniform {uniform:.2f}), KL to "
        f"the unigram {old.from_unigram:.2f} -> {new.from_unigram:.2f}, top choice as before in {new.agreement:.0%}"
    )
    back = new.entropy >= half and new.from_unigram < old.from_unigram
    if new.entropy > old.entropy and (back or new.entropy >= blank):
        return "nothing", f"{at} it believed nothing much any more: {numbers}.", new.name
    if new.agreement >= HALF:
        return "much the same", f"{at} it believed much the same as before: {numbers}.", new.name
    if new.entropy < half:
        return "something else", f"{at} it believed something else, rather than nothing: {numbers}.", new.name
    return "mixed", f"{at} it was both less sure and of another mind: {numbers}.", new.name
