"""What a model believes at a spike, against slow loops, and on spikes whose answer was planted."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from aftershock.guard.digest import checksum, of_rng
from aftershock.replay import predictions
from aftershock.replay.loop import take_steps
from aftershock.replay.recording import record
from aftershock.replay.subject import Subject
from aftershock.replay.thinking import Point, _verdict, thinking
from aftershock.workload import Workload

SIZE, ROWS, LENGTH = 12, 16, 8
PLANTED = range(100, 106)
"""Steps at which the model is not itself."""

Plant = Callable[["Net"], None]


class Pair(NamedTuple):
    inputs_BT: Tensor
    targets_BT: Tensor


class Net(nn.Module):
    """The next token from this one, by a table; dropout and batch norm, so that random numbers and modes count."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.drop = nn.Embedding(SIZE, 16), nn.BatchNorm1d(16), nn.Dropout(0.1)
        self.head = nn.Linear(16, SIZE)

    def forward(self, inputs_BT: Tensor) -> Tensor:
        x_BTD = self.norm(self.table(inputs_BT).transpose(1, 2)).transpose(1, 2)
        return self.head(self.drop(x_BTD))


def _chain(seed: int, length: int, rows: int = ROWS) -> Tensor:
    """Each token is followed by one of three, the first of them mostly; some tokens are rare."""
    random = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(SIZE, (rows,), generator=random)]
    for _ in range(length - 1):
        draw = torch.rand(rows, generator=random)
        step = torch.where(draw < 0.92, 1, torch.where(draw < 0.97, 3, 4))
        tokens.append((tokens[-1] * tokens[-1] + step) % SIZE)
    return torch.stack(tokens, 1)


def _batch(index: int) -> Pair:
    tokens = _chain(index, LENGTH + 1)
    targets = tokens[:, 1:].clone()
    targets[0, 3] = -100  # one place without a target
    return Pair(tokens[:, :-1], targets)


def _loss(model: nn.Module, batch: Pair) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten(), ignore_index=-100)


def _unigram(model: Net) -> None:
    counts = torch.bincount(torch.cat([b[b >= 0] for b in (_batch(i).targets_BT for i in range(100))]), minlength=SIZE)
    model.head.weight.zero_()
    model.head.bias.copy_((counts + 1).float().log())


def _uniform(model: Net) -> None:
    model.head.weight.zero_()
    model.head.bias.zero_()


def _permuted(model: Net) -> None:
    model.head.weight.copy_(model.head.weight.roll(1, 0))
    model.head.bias.copy_(model.head.bias.roll(1, 0))


def _broken(model: Net) -> None:
    model.head.bias[0] = math.nan


def _build(plant: Plant | None, *, batch: Callable[[int], Any] = _batch, loss: Any = _loss) -> Workload:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    kept: list[Tensor] = []

    @torch.no_grad()
    def rate(step: int) -> float:
        if plant is not None and step == PLANTED.start:
            kept[:] = [p.detach().clone() for p in model.parameters()]
            plant(model)
        if plant is not None and step == PLANTED.stop:
            for p, old in zip(model.parameters(), kept, strict=True):
                p.copy_(old)
        return 1.0

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    return Workload(model=model, optimizer=optimizer, batch=batch, loss=loss, scheduler=scheduler)


def _record(workload: Workload) -> Subject:
    """The recording, with the spike where it was planted."""

    def label(losses: Sequence[float]) -> list[tuple[int, int, int]]:
        inside = [step for step in PLANTED if step < len(losses)]
        worst = max(inside, key=lambda step: (math.isnan(losses[step]), losses[step]), default=0)
        return [(PLANTED.start, worst, min(PLANTED.stop, len(losses)))] if inside else []

    subject = record(workload, steps=112, tail=0, label=label)
    assert subject is not None
    assert subject.recorded[subject.window.peak] > 2 * subject.recorded[95] or math.isnan(subject.recorded[100])
    return subject


def _like(subject: Subject, **changes: Any) -> Subject:
    own: dict[str, Any] = {name: vars(subject)[name] for name in ("workload", "states", "recorded", "window")}
    return Subject(**(own | changes))


@pytest.fixture(scope="module")
def permuted() -> Subject:
    return _record(_build(_permuted))


@pytest.mark.parametrize(
    ("plant", "kind", "words"),
    [
        (_unigram, "nothing", "believed nothing much any more: entropy"),
        (_uniform, "nothing", "believed nothing much any more: entropy"),
        (_permuted, "something else", "something else, rather than nothing"),
        (_broken, "not finite", "100% of its predictions are no numbers"),
    ],
)
def test_the_verdict_is_what_was_planted(plant: Plant, kind: str, words: str) -> None:
    """planted: the head's bias as the unigram logits; all tokens alike; the vocabulary permuted; a NaN."""
    found = thinking(_record(_build(plant)))
    assert found.kind == kind
    assert words in found.verdict
    before, peak = found.at("before"), found.at(found.judged)
    assert before is not None
    assert peak is not None
    assert (before.from_before, before.agreement, before.finite) == (0.0, 1.0, 1.0)
    if plant is _uniform:
        assert peak.entropy > math.log(SIZE) - 0.1  # a step or two of training lie between
    if plant is _unigram:
        assert peak.from_unigram < 0.1 * before.from_unigram


def test_bad_data_leave_the_model_much_the_same() -> None:
    """planted: the batches are wrong, not the model; the clean case of the others."""

    def batch(index: int) -> Pair:
        inputs, targets = _batch(index)
        return Pair(inputs, (targets + 5) % SIZE if index in range(100, 102) else targets)

    found = thinking(_record(_build(None, batch=batch)))
    assert (found.kind, found.notes) == ("much the same", ())


@pytest.mark.parametrize(
    ("entropy", "from_unigram", "agreement", "kind"),
    [
        (2.1, 0.9, 0.9, "nothing"),  # half-way from 1 to the unigram's 3 is 2, and its KL has fallen from 1
        (2.1, 1.1, 0.9, "much the same"),
        (2.1, 1.1, 0.4, "mixed"),
        (2.6, 1.1, 0.4, "nothing"),  # half-way from 1 to ln V = 4
        (1.9, 0.9, 0.4, "something else"),
        (1.9, 0.9, 0.5, "much the same"),
        (0.9, 0.9, 0.4, "something else"),
    ],
)
def test_the_rule(entropy: float, from_unigram: float, agreement: float, kind: str) -> None:
    """oracle: each side of each bound; of the point with the highest loss in the spike."""
    calm = Point("", 0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0, (), (), (), ())
    worst = calm._replace(loss=2.0, entropy=entropy, from_unigram=from_unigram, agreement=agreement)
    points = dict.fromkeys(("before", "onset", "peak", "half-way"), calm) | {"after": calm._replace(loss=9.0)}
    for name in ("onset", "peak", "half-way"):
        found = _verdict(points | {name: worst._replace(name=name)}, 3.0, 4.0)
        assert (found[0], found[2]) == (kind, name)


def test_a_replay_without_the_spike_says_so(permuted: Subject) -> None:
    """planted: what struck the recorded run is not in the replay; the clean case is every other test."""
    found = thinking(_like(permuted, workload=_build(None)))
    assert found.notes == ("this replay does not have the spike: what it shows is a calm run",)


class Slow(NamedTuple):
    """One prediction."""

    p: list[float]
    target: int
    previous: int
    place: int


def _slow(subject: Subject, step: int, *, batches: int) -> list[Slow]:
    """Every prediction on the calm batches, with the model as it stands before `step`."""
    subject.restore()
    for _ in take_steps(subject.run(), subject.window.start, step):
        pass
    model, last = subject.workload.model, subject.window.onset - 2
    found: list[Slow] = []
    modes = [module.training for module in model.modules()]
    model.eval()
    for at in range(last - batches, last):
        inputs, targets = subject.batch(at)
        logits = model(inputs).detach().double()
        for b in range(ROWS):
            for t in range(LENGTH):
                if targets[b, t] < 0:
                    continue
                total = sum(math.exp(z) for z in logits[b, t].tolist())
                p = [math.exp(z) / total for z in logits[b, t].tolist()]
                found.append(Slow(p, int(targets[b, t]), int(targets[b, t - 1]) if t else -1, t))
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    return found


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("name", ["peak", "after"])
def test_every_measure_is_that_of_a_slow_loop(permuted: Subject, name: str) -> None:
    """oracle: where all is wrong and where most is right; in float64, the fast one starts from float32 logits."""
    found = thinking(permuted, batches=3)
    point = found.at(name)
    assert point is not None
    now, old = _slow(permuted, point.step, batches=3), _slow(permuted, permuted.window.onset - 2, batches=3)
    steps = range(max(0, permuted.window.onset - 2 - 200), permuted.window.onset - 2)
    rows = [row for step in steps for row in permuted.batch(step).targets_BT.tolist()]
    single = Counter(y for row in rows for y in row if y >= 0)
    double = Counter((a, b) for row in rows for a, b in pairwise(row) if a >= 0 and b >= 0)
    total = sum(single.values())
    assert (found.num_counted, found.vocabulary, found.num_predictions) == (total, SIZE, len(now))
    unigram = [(single[y] + 1) / (total + SIZE) for y in range(SIZE)]
    after = [sum(double[z, y] for y in range(SIZE)) for z in range(SIZE)]
    bigram = [[(double[z, y] + 1) / (after[z] + SIZE) for y in range(SIZE)] for z in range(SIZE)]
    loss = [-math.log(one.p[one.target]) for one in now]
    bins: dict[int, list[tuple[float, bool]]] = {}
    for one in now:
        top = max(range(SIZE), key=lambda y, p=one.p: p[y])
        bins.setdefault(math.ceil(one.p[top] * 15), []).append((one.p[top], top == one.target))
    calibration = sum(abs(sum(right for _, right in b) - sum(c for c, _ in b)) for b in bins.values()) / len(now)
    expected = {
        "loss": _mean(loss),
        "entropy": _mean([-sum(a * math.log(a) for a in one.p) for one in now]),
        "calibration": calibration,
        "from_unigram": _mean([_kl(one.p, unigram) for one in now]),
        "from_bigram": _mean([_kl(one.p, bigram[one.previous]) for one in now if one.previous >= 0]),
        "from_before": _mean([_kl(a.p, b.p) for a, b in zip(old, now, strict=True)]),
        "agreement": _mean([a.p.index(max(a.p)) == b.p.index(max(b.p)) for a, b in zip(old, now, strict=True)]),
    }
    # Logits and log-probabilities are float32: 6e-8 of numbers up to about 10, added up over 12 tokens.
    assert {name: getattr(point, name) for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-5)
    for buckets, value in (
        (point.by_frequency, lambda one: single[one.target]),
        (point.by_position, lambda one: one.place),
    ):
        assert sum(bucket.count for bucket in buckets) == len(now)
        for low, high, mean, count in buckets:
            inside = [x for x, one in zip(loss, now, strict=True) if low <= value(one) < high]
            assert (mean, count) == (pytest.approx(_mean(inside), rel=1e-5), len(inside))  # as above
    _check_changes(point, loss, [-math.log(one.p[one.target]) for one in old], [one.target for one in now])


def _check_changes(point: Point, now: list[float], old: list[float], targets: list[int]) -> None:
    gaps: dict[int, list[float]] = {}
    for a, b, target in zip(now, old, targets, strict=True):
        gaps.setdefault(target, []).append(a - b)
    means = {token: _mean(gap) for token, gap in gaps.items() if len(gap) >= 5}
    worst = sorted((token for token in means if means[token] > 0), key=lambda token: -means[token])[:8]
    best = sorted((token for token in means if means[token] < 0), key=lambda token: means[token])[:8]
    assert [one.token for one in point.damaged] == worst
    assert [one.token for one in point.improved] == best
    for one in (*point.damaged, *point.improved):
        assert (one.change, one.count) == (
            pytest.approx(means[one.token], rel=1e-4),
            len(gaps[one.token]),
        )  # a difference
        assert one.text == repr(one.token)
    assert len(worst) + len(best) > 2


def test_points_and_buckets(permuted: Subject) -> None:
    """contract: in order of time; buckets widen tenfold with frequency and twofold with position."""
    found = thinking(permuted, decode=lambda ids: f"<{ids[0]}>")
    window = permuted.window
    assert [point.name for point in found.points] == ["before", "onset", "peak", "half-way", "after"]
    steps = [point.step for point in found.points]
    assert steps == sorted(steps)
    assert (steps[0], steps[1], steps[2], steps[4]) == (window.onset - 2, window.onset, window.peak, window.end)
    first = found.points[0]
    assert [bucket[:2] for bucket in first.by_position] == [(0, 1), (1, 2), (2, 4), (4, 8)]
    assert all(bucket.high in (1, 10 * bucket.low) for bucket in first.by_frequency)
    assert found.points[2].damaged[0].text == f"<{found.points[2].damaged[0].token}>"
    assert found.points[4].agreement > 0.9
    assert found.notes == ()


def test_asking_touches_nothing(permuted: Subject) -> None:
    """equivalence: the replay ends with the bits, random numbers and modes of one that nobody asked."""
    model = permuted.workload.model
    modes = [module.training for module in model.modules()]
    states = []
    for ask in (True, False):
        if ask:
            thinking(permuted)
        else:
            permuted.restore()
            for _ in take_steps(permuted.run(), permuted.window.start, permuted.window.end):
                pass
        tensors = permuted.training.read().tensors
        states.append(({name: checksum(tensor) for name, tensor in tensors.items()}, of_rng()))
    assert states[0] == states[1]
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


def test_large_vocabularies_are_asked_in_part(permuted: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """equivalence: in small pieces the same numbers; a bound on memory takes evenly spread predictions and says so."""
    whole = thinking(permuted, batches=2)
    monkeypatch.setattr(predictions, "CHUNK", 7 * SIZE)
    assert thinking(permuted, batches=2) == whole
    monkeypatch.setattr(predictions, "CELLS", 10 * SIZE)
    part = thinking(permuted, batches=2)
    assert part.num_predictions == 10
    assert part.notes == (f"10 of {whole.num_predictions} predictions are asked for, evenly spread",)
    assert sum(bucket.count for bucket in part.points[0].by_position) == 10


def test_a_classifier_has_no_positions() -> None:
    """contract: pairs of [B, D] and [B]: bigrams and positions are left out, and that is said."""

    def batch(index: int) -> tuple[Tensor, Tensor]:
        random = torch.Generator().manual_seed(index)
        x_BD = torch.randn(16, 4, generator=random)
        return x_BD, x_BD.argmax(1) if index not in range(100, 103) else x_BD.argmin(1)

    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    workload = Workload(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
        batch=batch,
        loss=lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
    )
    found = thinking(_record(workload))
    assert found.kind == "much the same"
    assert found.notes == ("no sequences: nothing by position, and no bigram",)
    assert found.points[0].by_position == ()
    assert math.isnan(found.points[0].from_bigram)
    assert found.points[0].by_frequency[0].count > 0


def test_points_out_of_time_are_left_out(permuted: Subject) -> None:
    """contract: and then the verdict is not known."""
    found = thinking(permuted, deadline=0.0)
    assert (found.kind, found.points) == ("unknown", ())
    assert "before, onset, peak, half-way, after" in found.notes[-1]


def test_a_spike_without_calm_steps_before_it_is_refused(permuted: Subject) -> None:
    """planted: with what to give."""
    with pytest.raises(ValueError, match="at least 1"):
        thinking(permuted, batches=0)
    window = permuted.window._replace(start=permuted.window.onset)
    states = {window.start: permuted.states[permuted.window.start]}
    with pytest.raises(ValueError, match="0 calm steps"):
        thinking(_like(permuted, states=states, window=window))


def test_own_functions_say_what_is_predicted(permuted: Subject) -> None:
    """equivalence: dicts, and functions that read them, give what pairs give by themselves."""
    subject = _like(permuted, batch=lambda i: {"pair": _batch(i)})
    subject.workload = dataclasses.replace(subject.workload, loss=lambda model, batch: _loss(model, batch["pair"]))
    found = thinking(
        subject, logits=lambda model, batch: model(batch["pair"][0]), targets=lambda batch: batch["pair"][1]
    )
    assert found == thinking(permuted)
