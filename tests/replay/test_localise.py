"""Where a spike began: norms and bands against slow ones, the sign test by hand, and faults planted in one place."""

from __future__ import annotations

import math
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aftershock.guard.state import Training
from aftershock.lab.zoo import nets
from aftershock.replay.footprint import footprint
from aftershock.replay.localise import Places, first_move, localise, robust_z
from aftershock.replay.norms import Place, Recorded, layer_of, places_of, shared
from aftershock.replay.ordering import First, holm, needed, rank, sign_test
from aftershock.replay.recording import record
from aftershock.replay.run import Cell, Unchanged, Window
from aftershock.replay.runner import run_cell
from aftershock.replay.subject import Subject, copied
from aftershock.workload import Workload

Build = Callable[..., Workload]
Pieces = list[tuple[str, int, int, int]]


def healthy(make: Build, *, rate: float = 0.02) -> Workload:
    """The regression without its bad batches, by plain gradient descent, its batches with their index."""
    workload = make()
    given = workload.batch
    workload.batch = lambda i: (*given(i + 500 if 150 <= i < 153 else i), i)
    workload.optimizer = torch.optim.SGD(workload.model.parameters(), lr=rate)
    workload.scheduler = None
    plain = workload.loss
    workload.loss = lambda model, batch: plain(model, batch[:2])
    return workload


def recorded(workload: Workload) -> Subject:
    subject = record(workload, steps=300, tail=5)
    assert subject is not None
    return subject


# ------------------------------------------------------------------------------------------------ planted faults


@pytest.fixture(scope="module")
def struck(make: Build) -> Subject:
    """From step 150 on the last layer's weights have a gradient that the loss does not show."""
    workload = healthy(make)
    plain = workload.loss

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor, int]) -> Tensor:
        weight = model.get_parameter("outer.weight")
        return plain(model, batch) + (10.0 * (weight - weight.detach()).sum() if 150 <= batch[2] < 158 else 0.0)

    workload.loss = loss
    return recorded(workload)


@pytest.fixture(scope="module")
def places(struck: Subject) -> Places:
    return localise(struck, processes=1)


def test_the_place_that_was_struck_is_first(struck: Subject, places: Places) -> None:
    """planted: tensor and layer, from its step on, before the loss, in every replay."""
    first = places.first["tensor"]
    assert (first.place, first.clear, first.tied) == ("outer.weight", True, ("outer.weight",))
    assert first.before == dict.fromkeys(["inner.weight", "inner.bias", "outer.bias"], first.replays)
    assert max(first.p.values()) == 3 * 2**-first.replays  # Holm of three, each of them won every time
    assert (places.first["layer"].place, places.first["layer"].clear) == ("outer", True)
    move = next(move for move in places.moves if move.place == "outer.weight")
    assert (move.gradient, move.update, move.moved, move.lead) == (150, 150, 150, places.onset - 150)
    assert places.onset > 150
    assert {name.partition("#")[0] for name in places.replays} == {"control", "sham:ulp", "sham:permute"}
    assert places.left_out == {}
    assert places.words().startswith("Of all layers outer moved first, 1 step before the loss (first in 6 of 6")


def test_the_heat_map_is_the_unchanged_replay(struck: Subject, places: Places) -> None:
    """contract: a row for each place, a column for each step to the peak; dark where a place has moved, calm before."""
    assert places.steps == range(struck.window.start, places.peak + 1)
    assert places.z_KPT.shape == (2, len(places.moves), len(places.steps))
    for kind, p in product((0, 1), range(len(places.moves))):
        moved = places.moves[p][2 + kind]
        if moved is not None:
            assert isinstance(moved, int)
            assert (np.abs(places.z_KPT[kind, p, moved - places.steps.start :][:2]) > 4).all()
    outer = [move.place for move in places.moves].index("outer.weight")
    assert (np.abs(places.z_KPT[0, outer, : 150 - places.steps.start]) < 4).all()
    half = (struck.window.onset - struck.window.start) // 2
    middle_KP = np.median(places.z_KPT[:, :, :half], axis=2)
    assert np.abs(middle_KP).max() < 1e-9  # the calm steps' own median is the middle of the band


def test_workers_find_the_same_and_nothing_stays_changed(struck: Subject, places: Places) -> None:
    """equivalence: forked as in this process."""
    states, before = set(struck.states), footprint(struck)
    again = localise(struck, shams=5, processes=2)
    assert again._replace(z_KPT=places.z_KPT) == places
    assert np.array_equal(again.z_KPT, places.z_KPT)
    assert (set(struck.states), footprint(struck)) == (states, before)
    start = struck.states[struck.window.start].tensors
    assert all(torch.equal(p, start[f"model/{name}"]) for name, p in struck.workload.model.named_parameters())


def test_where_all_move_at_once_nothing_is_first(subject: Subject) -> None:
    """planted: targets that are wrong by 30 reach every tensor in the same step."""
    found = localise(subject, shams=5, processes=1)
    for level in ("tensor", "layer"):
        first = found.first[level]
        assert not first.clear
        assert len(first.tied) > 1
        assert f"No {level} is clearly first in 6 replays" in first.words()
    assert {move.gradient for move in found.moves} == {150}
    assert found.order.first == "together"
    assert found.order.gradient == found.order.loss == 150


def test_a_rate_fault_moves_the_update_first(make: Build) -> None:
    """planted: for 5 steps the rate is 30 times what it was; all tensors at once, before gradient and loss."""
    workload = healthy(make)
    workload.scheduler = torch.optim.lr_scheduler.LambdaLR(
        workload.optimizer, lambda step: 30.0 if 150 <= step < 155 else 1.0
    )
    found = localise(recorded(workload), shams=6, processes=1)
    assert (found.order.first, found.order.update) == ("update", 150)
    assert found.order.gradient is not None
    assert found.order.gradient > 150
    assert not found.first["tensor"].clear
    assert "the update moved before the gradient" in found.words()


def test_no_spike_no_place(struck: Subject, make: Build) -> None:
    """planted: what comes back as a small rise only, what begins too soon after the snapshot, and no time at all."""
    workload = make()
    given, mended = workload.batch, [False]

    def milder(index: int) -> tuple[Tensor, Tensor]:
        x_B8, y_B1 = given(index)
        return x_B8, y_B1 - 28.0 if mended[0] and 150 <= index < 153 else y_B1

    workload.batch = milder
    gone = recorded(workload)
    mended[0] = True
    with pytest.raises(ValueError, match="does not come back in the unchanged replay"):
        localise(gone, processes=1)
    with pytest.raises(ValueError, match="the time was up"):
        localise(struck, processes=1, deadline=time.monotonic())
    with pytest.raises(ValueError, match="give at least 5"):
        localise(struck, shams=0)
    window = struck.window
    soon = Subject(
        struck.workload,
        states={147: struck.states[window.start]},
        recorded=struck.recorded,
        window=window._replace(start=147),
    )
    with pytest.raises(ValueError, match="a margin of at least 8"):
        localise(soon)


# ------------------------------------------------------------------------------------------------------ measures


def test_norms_against_a_loop_by_hand(subject: Subject) -> None:
    """oracle: gradient norms and relative updates of 3 steps, for the whole, layers and tensors."""
    places = places_of(subject)
    found_TKP = shared((3, 2, len(places)))
    run_cell(subject, Cell(name="norms", family="test", edit=Recorded(Unchanged(), places, found_TKP)), steps=3)
    subject.restore()
    model, optimizer = subject.workload.model, subject.workload.optimizer
    assert subject.workload.scheduler is not None
    parts = {"model": "", "inner": "inner.", "outer": "outer."}
    for row in range(3):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        subject.workload.backward(subject.window.start + row)
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        subject.workload.scheduler.step()
        optimizer.zero_grad()
        for p, place in enumerate(places):
            names = [name for name in grads if name.startswith(parts.get(place.name, place.name))]
            now = dict(model.named_parameters())
            change = norm([now[name].detach() - before[name] for name in names])
            # Other orders of float32 sums.
            assert found_TKP[row, 0, p] == pytest.approx(norm([grads[name] for name in names]), rel=1e-5)
            assert found_TKP[row, 1, p] == pytest.approx(change / norm([before[name] for name in names]), rel=1e-5)
    subject.restore()


def norm(tensors: list[Tensor]) -> float:
    return torch.cat([t.flatten() for t in tensors]).double().norm().item()


def test_the_heat_map_against_a_slow_one() -> None:
    """oracle: by python's own median, one value at a time; zeros, NaN and an infinity among them."""
    random = np.random.default_rng(0)
    norms_TKP = np.exp(random.normal(size=(40, 2, 3)))
    norms_TKP[25, 0, 0], norms_TKP[3, 0, 0], norms_TKP[30, 1, 1] = np.nan, np.inf, 0.0
    norms_TKP[:, 1, 2] = 1.0  # no spread: the floor
    norms_TKP[7, 1, 2] = 2.0
    z_KPT = robust_z(norms_TKP, range(20))
    for k, p, t in np.ndindex(*z_KPT.shape):
        calm = [math.log(x) for x in norms_TKP[:20, k, p] if math.isfinite(x)]
        middle = statistics.median(calm)
        spread = max(1.482602218505602 * statistics.median(abs(x - middle) for x in calm), math.log(1.5) / 4)
        value = norms_TKP[t, k, p]
        slow = (math.log(max(value, 1e-30)) - middle) / spread if math.isfinite(value) else math.inf
        assert z_KPT[k, p, t] == pytest.approx(slow, rel=1e-12)  # one rounding of the same numbers
    norms_TKP[:20, 0, 1] = np.nan
    assert np.isinf(robust_z(norms_TKP, range(20))[0, 1]).all()


def test_first_moves_against_every_start() -> None:
    """oracle: each start tried, the definition written out; over all short series of calm and not."""
    for series in product([0.0, 5.0, -5.0], repeat=6):
        for peak in range(6):
            starts = [
                row
                for row in range(5)
                if row <= peak
                and all(abs(z) > 4 for z in series[row : row + 2])
                and 2 * sum(abs(z) > 4 for z in series[row : peak + 1]) >= peak + 1 - row
            ]
            assert first_move(series, peak=peak) == (starts[0] if starts else None)


class Grouped(nn.Module):
    """Four query heads over two key heads, 3 wide, in a class whose name says what it is below."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(12, 12), nn.Linear(12, 6, bias=False), nn.Linear(12, 6)
        self.o_proj = nn.Linear(12, 12)

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, _ = x_BTD.shape
        q, k, v = (f(x_BTD).view(B, T, -1, 3).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        mixed = F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
        return self.o_proj(mixed.transpose(1, 2).reshape(B, T, 12))


class GroupedAttention(Grouped):
    """Found by its name."""


class Conv1D(nn.Module):
    """GPT-2's layer: weights [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(12, 36)), nn.Parameter(torch.zeros(36))

    def forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD @ self.weight + self.bias


class TurnedAttention(nn.Module):
    """Two heads out of one transposed layer."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn = Conv1D()

    def forward(self, x_BTD: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 6)).transpose(1, 2) for part in self.c_attn(x_BTD).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def of_model(model: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor]) -> Subject:
    """A subject that nothing has been recorded of."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    workload = Workload(model=model, optimizer=optimizer, batch=lambda i: batch, loss=loss)
    state = copied(Training(model, optimizer).read())
    return Subject(workload, states={0: state}, recorded={0: 1.0, 1: 2.0}, window=Window(0, 1, 1, 2))


def heads(found: list[Place]) -> dict[str, Pieces]:
    return {
        place.name: [(p.name, p.axis, p.start, p.size) for p in place.pieces]
        for place in found
        if place.level == "head"
    }


def test_heads_are_rows_by_name() -> None:
    """oracle: by hand; a key head that two query heads share is of both; GPT-2's weights are split by columns."""
    x_BTD = torch.randn(2, 5, 12)
    model = nn.Sequential(OrderedDict(attn=GroupedAttention(), old=TurnedAttention()))
    subject = of_model(model, x_BTD, lambda model, x: model(x).square().mean())
    found = heads(places_of(subject))
    expected: dict[str, Pieces] = {
        f"attn.head{h}": [
            *(("attn.q_proj." + kind, 0, 3 * h, 3) for kind in ("weight", "bias")),
            ("attn.k_proj.weight", 0, 3 * (h // 2), 3),
            *(("attn.v_proj." + kind, 0, 3 * (h // 2), 3) for kind in ("weight", "bias")),
        ]
        for h in range(4)
    }
    for h in range(2):
        expected[f"old.head{h}"] = [
            *(("old.c_attn.weight", 1, 12 * part + 6 * h, 6) for part in range(3)),
            *(("old.c_attn.bias", 0, 12 * part + 6 * h, 6) for part in range(3)),
        ]
    assert found == expected


def test_heads_of_a_language_model_make_up_its_projections() -> None:
    """equivalence: the squares of both heads' norms are those of W_qk and W_v; other places are as named."""
    text = nets.Text(seed=0, batch_size=2)
    model = nets.seeded(0, nets.ByteLM)
    subject = of_model(model, text.batch(0), nets.token_loss)
    places = places_of(subject)
    index = {place.name: p for p, place in enumerate(places)}
    assert [p.name for p in places if p.level == "layer"] == [
        "embed",
        "position",
        "blocks.0",
        "blocks.1",
        "norm",
        "head",
    ]
    norms_TKP = shared((1, 2, len(places)))
    run_cell(subject, Cell(name="norms", family="test", edit=Recorded(Unchanged(), places, norms_TKP)), steps=1)
    for block in range(2):
        place = f"blocks.{block}.attention"
        both = sum(norms_TKP[0, 0, index[f"{place}.head{h}"]] ** 2 for h in range(2))
        whole = sum(norms_TKP[0, 0, index[f"{place}.{part}.weight"]] ** 2 for part in ("query_key", "value"))
        assert both == pytest.approx(whole, rel=1e-5)  # float32 sums in another order


def test_what_is_not_trained_is_no_place(subject: Subject) -> None:
    """contract: a frozen tensor is none, and a model of nothing else is refused."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    frozen = of_model(model, torch.randn(2, 3), lambda model, x: model(x).square().mean())
    model[0].requires_grad_(False)
    names = [(place.level, place.name) for place in places_of(frozen)]
    assert names == [("model", "model"), ("layer", "1"), ("tensor", "1.weight"), ("tensor", "1.bias")]
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model is trained"):
        places_of(frozen)


def test_a_layer_is_a_name_down_to_its_number() -> None:
    """oracle."""
    names = ["model.layers.3.self_attn.q_proj.weight", "h.0.mlp.2.bias", "model.embed.weight", "scale", "0.weight"]
    assert [layer_of(name) for name in names] == ["model.layers.3", "h.0", "model.embed", "scale", "0"]


# ---------------------------------------------------------------------------------------------------------- order


def test_the_sign_test_and_holm_against_all_outcomes() -> None:
    """oracle: every sequence of coins counted; Holm's example by hand."""
    for total in range(1, 8):
        for wins in range(total + 1):
            count = sum(sum(coins) >= wins for coins in product((0, 1), repeat=total))
            assert sign_test(wins, total) == count / 2**total
    assert holm({"a": 0.04, "b": 0.01, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"a": 0.06, "b": 0.03, "c": 0.06, "d": 0.02}
    )
    for count in (2, 4, 5, 30, 1000):
        assert (count - 1) * sign_test(needed(count), needed(count)) < 0.05
        assert (count - 1) * sign_test(needed(count) - 1, needed(count) - 1) >= 0.05


def test_ranks_by_hand() -> None:
    """oracle: eight replays of three places; a tie and a place that never moves."""
    moved = [{"a": 10.0, "b": 12.0, "c": math.inf}] * 7 + [{"a": 12.0, "b": 12.0, "c": math.inf}]
    found = rank("tensor", moved, onset=15)
    assert found == First("tensor", "a", 8, 8, 5, {"b": 7, "c": 8}, found.p, ("a",), True, 6)
    assert found.p == {"b": 9 / 256, "c": 2 / 256}  # 1 + 8 of 256 outcomes; 1 of 256, times two
    fewer = rank("tensor", moved[2:], onset=15)
    assert (fewer.clear, fewer.tied, fewer.needed) == (False, ("a", "b"), 6)
    assert fewer.words() == "No tensor is clearly first in 6 replays: a, b are not told apart."
    assert "fewer than 6 cannot be clear" in rank("tensor", moved[4:], onset=15).words()
    none = rank("head", [{"a": math.inf, "b": math.inf}], onset=15)
    assert (none.place, none.words()) == (None, "No head left its calm band before the peak.")
    assert not rank("layer", [{"a": 3.0}] * 9, onset=15).clear
