"""The ring keeps what it must, forgets what it should, and its memory stays bounded."""

from __future__ import annotations

from collections import UserDict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from aftershock.guard.disk import load_snapshot
from aftershock.guard.recorder import FlightRecorder
from aftershock.guard.state import Kept, StepRow, Training


def small() -> Training:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5))
    return Training(model, torch.optim.AdamW(model.parameters(), lr=0.1))


def train(training: Training, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = training.model(torch.randn(4, 3)).square().sum()
        loss.backward()
        training.optimizer.step()
        training.optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def weights(training: Training) -> Tensor:
    return torch.cat([p.detach().flatten() for p in training.params.values()]).clone()


def test_twenty_steps_again() -> None:
    """round trip: take, train, restore, train: the same losses, as often as wanted, from each snapshot."""
    training = small()
    recorder = FlightRecorder(training, slots=3)
    assert recorder.take(0, 0)
    first = train(training, 5)
    assert recorder.take(5, 7)
    second = train(training, 20)
    for _ in range(2):
        assert recorder.restore(5, rng=True) == Kept(5, 7)
        assert train(training, 20) == second
    assert recorder.restore(0, rng=True) == Kept(0, 0)
    assert train(training, 5) == first
    assert recorder.healthy == (0,)  # 5 lay on a branch that was left


def test_memory_is_used_again() -> None:
    """contract: once each slot has been filled, no snapshot takes new memory, and there are `slots` of them."""
    training = small()
    train(training, 1)
    recorder = FlightRecorder(training, slots=3)
    one = sum(tensor.nbytes for tensor in training.read().tensors.values())
    for step in range(3):
        recorder.take(step, step)
    places = {slot.buffers["model/0.weight"].data_ptr() for slot in recorder._ring.values()}
    for step in range(3, 12):
        recorder.take(step, step)
        recorder.distrust(9)
    assert {slot.buffers["model/0.weight"].data_ptr() for slot in recorder._ring.values()} <= places
    assert recorder.nbytes == 3 * one


@pytest.mark.parametrize("sick", [float("nan"), float("inf")])
def test_a_sick_state_is_never_kept(sick: float) -> None:
    """planted: nothing is kept and nothing is lost, however often it is tried."""
    training = small()
    recorder = FlightRecorder(training, slots=2)
    assert recorder.take(0, 0)
    good = weights(training)
    with torch.no_grad():
        training.params["0.weight"][1, 1] = sick
    for step in range(1, 6):
        assert not recorder.take(step, step)
    assert recorder.healthy == (0,)
    recorder.restore(0, rng=False)
    assert torch.equal(weights(training), good)
    assert recorder.take(1, 6)


def test_due() -> None:
    """contract: at once, then every `every` steps, and from the snapshot gone back to."""
    recorder = FlightRecorder(small(), every=10)
    assert recorder.due(3)
    recorder.take(3, 3)
    assert [step for step in range(4, 20) if recorder.due(step)] == list(range(13, 20))
    recorder.take(13, 13)
    recorder.restore(3, rng=False)
    assert recorder.due(13)
    assert not recorder.due(12)


def test_pins_and_distrust() -> None:
    """contract: a pinned snapshot outlives the ring and the verdict, but a sick one is not gone back to."""
    training = small()
    recorder = FlightRecorder(training, slots=3)
    for step in range(3):
        recorder.take(step, step)
    recorder.pin(1)
    for step in range(3, 8):
        recorder.take(step, step)
    assert recorder.healthy == (1, 6, 7)
    recorder.pin(6)
    with pytest.raises(ValueError, match="2 of 3 slots are pinned; unpin one before pinning step 7"):
        recorder.pin(7)
    recorder.distrust(6)
    assert recorder.healthy == (1,)
    assert not recorder.take(6, 9)  # the incident's own state of that step is not overwritten
    assert recorder.take(8, 10)
    recorder.restore(6, rng=False)  # for whoever studies it
    recorder.unpin(6)
    with pytest.raises(ValueError, match="no snapshot of step 6 is held; there are: 1"):
        recorder.restore(6, rng=False)
    recorder.unpin(1)
    assert recorder.healthy == (1,)


_acts = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.integers(0, 3)),
        st.tuples(st.just("sick"), st.just(0)),
        st.tuples(st.sampled_from(["restore", "distrust", "pin", "unpin"]), st.integers(0, 5)),
    ),
    max_size=30,
)


@given(_acts, st.integers(2, 4))
def test_whatever_happens(acts: list[tuple[str, int]], slots: int) -> None:
    """property: against a plain dict of what was kept: bounded, right bits, and healthy until distrusted."""
    model = nn.Linear(1, 1, bias=False)
    training = Training(model, torch.optim.SGD(model.parameters(), lr=0.1))
    recorder = FlightRecorder(training, slots=slots)
    step, value, truth = 0, 0.0, dict[int, float]()
    for act, number in acts:
        healthy = recorder.healthy
        if act in ("take", "sick"):
            step, value = step + number, value + 1
            with torch.no_grad():
                model.weight.fill_(float("nan") if act == "sick" else value)
            if recorder.take(step, step):
                assert act == "take"
                truth[step] = value
                assert recorder.healthy[-1] == step
            else:
                assert recorder.healthy == healthy
        elif not healthy:
            continue
        elif act == "distrust":
            recorder.distrust(step - number)
            assert recorder.healthy == tuple(s for s in healthy if s < step - number)
        else:
            chosen = healthy[number % len(healthy)]
            if act == "restore":
                assert recorder.restore(chosen, rng=False) == (chosen, chosen)
                assert model.weight.item() == truth[chosen]
                step = chosen
            elif act == "unpin":
                recorder.unpin(chosen)
            elif sum(slot.pinned for slot in recorder._ring.values()) + 1 < slots:
                recorder.pin(chosen)
        assert len(recorder._ring) + len(recorder._spare) <= slots
    for kept in reversed(recorder.healthy):
        recorder.restore(kept, rng=False)
        assert model.weight.item() == truth[kept]


def test_a_changed_model_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """planted: snapshots from before a new param group cannot be gone back to, so they are not offered."""
    training = small()
    recorder = FlightRecorder(training)
    recorder.take(0, 0)
    model = training.model
    assert isinstance(model, nn.Sequential)
    model.append(nn.Linear(2, 2))
    training.optimizer.add_param_group({"params": model[2].parameters()})
    recorder.take(1, 1)
    assert recorder.healthy == (1,)
    assert "snapshot of step 0 cannot be gone back to" in caplog.text
    assert "2.weight" in training.params


def test_rows_are_the_last_ones() -> None:
    """contract: as many as asked for, oldest first."""
    recorder = FlightRecorder(small(), num_rows=3)
    rows = [StepRow(step, step + 10, 1.0 / (step + 1), 0.5, 0.1) for step in range(5)]
    for row in rows:
        recorder.note(row)
    assert recorder.rows == tuple(rows[-3:])


class Pair(NamedTuple):
    ids: Tensor
    text: str


def test_batches_of_any_shape_come_back() -> None:
    """round trip: nested, named, with text; changing the live batch or the copy changes nothing that is kept."""
    recorder = FlightRecorder(small())
    ids = torch.arange(4)
    assert recorder.keep_batch(3, {"pair": Pair(ids, "a"), "rows": [ids, (1, None)]})
    assert recorder.keep_batch(4, UserDict(ids=ids.clone()))
    ids.zero_()
    recorder.batch(3)["rows"][0].zero_()
    back = recorder.batch(3)
    assert back["pair"].ids.tolist() == back["rows"][0].tolist() == [0, 1, 2, 3]
    assert (back["pair"].text, back["rows"][1]) == ("a", (1, None))
    assert recorder.batch(4)["ids"].tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="batch 9 was not kept or has gone: there are 3 to 4"):
        recorder.batch(9)


def test_batches_stay_within_their_bytes() -> None:
    """contract: the newest stay, kept again is kept once, and one that is too large is refused and displaces none."""
    recorder = FlightRecorder(small(), batch_bytes=100)
    for batch_id in range(5):
        assert recorder.keep_batch(batch_id, torch.zeros(10))
    assert recorder.batch_ids == (3, 4)
    assert recorder.keep_batch(3, torch.ones(10))
    assert recorder.batch_ids == (4, 3)
    assert recorder.batch(3).sum() == 10
    assert not recorder.keep_batch(5, torch.zeros(26))
    assert recorder.batch_ids == (4, 3)


def test_its_own_state() -> None:
    """round trip: rows and batches through torch.save; the ring starts empty."""
    recorder = FlightRecorder(small())
    recorder.note(StepRow(1, 2, float("inf"), 3.0, 0.1))
    recorder.keep_batch(2, {"x": torch.arange(3)})
    recorder.take(1, 2)
    other = FlightRecorder(small())
    other.load_state_dict(recorder.state_dict())
    assert other.rows == recorder.rows
    assert other.batch(2)["x"].tolist() == [0, 1, 2]
    assert other.healthy == ()


def test_save_writes_the_ring_not_the_present(tmp_path: Path) -> None:
    """contract: state as it was taken, with the log and batches as they are now."""
    training = small()
    recorder = FlightRecorder(training)
    recorder.take(4, 9)
    then = weights(training)
    train(training, 2)
    recorder.note(StepRow(5, 10, 1.0, 2.0, 0.1, 0.01))
    recorder.keep_batch(10, [torch.ones(2)])
    saved = load_snapshot(recorder.save(tmp_path, 4))
    assert saved.at == Kept(4, 9)
    assert saved.rows == recorder.rows
    assert saved.batch(10)[0].tolist() == [1, 1]
    assert torch.equal(torch.cat([saved.state.tensors[f"model/{n}"].flatten() for n in training.params]), then)


@pytest.mark.parametrize("wrong", [{"slots": 1}, {"every": 0}, {"num_rows": 0}, {"batch_bytes": -1}])
def test_bad_settings(wrong: dict[str, Any]) -> None:
    """contract: refused with what was got."""
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        FlightRecorder(small(), **wrong)


@pytest.mark.gpu
def test_pinned_and_asynchronous_on_a_gpu() -> None:
    """round trip: on CUDA the copy is queued, and what is changed right after it is not in it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.Dropout(0.5)).cuda()
    training = Training(model, torch.optim.AdamW(model.parameters(), fused=True))
    recorder = FlightRecorder(training)

    def losses() -> list[float]:
        found = []
        for _ in range(5):
            loss = model(torch.randn(8, 256, device="cuda")).square().mean()
            loss.backward()
            training.optimizer.step()
            training.optimizer.zero_grad()
            found.append(loss.item())
        return found

    losses()
    assert recorder.take(5, 5)
    assert all(buffer.is_pinned() for name, buffer in recorder._ring[5].buffers.items() if name.startswith("model"))
    expected = losses()
    recorder.restore(5, rng=True)
    assert losses() == expected
