"""Runs that die and go on: the same bits, the same decisions, nothing lost, nothing done twice."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from aftershock.guard import shelf
from aftershock.guard.events import read_events, standing
from aftershock.guard.guard import Guard
from aftershock.guard.policies.ladder import Ladder
from aftershock.guard.witness import steps_after


class Killed(Exception):
    """The process is gone."""


class Ema:
    """An average of the weights, as users write it."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.average = model, [p.detach().clone() for p in model.parameters()]

    def update(self) -> None:
        for own, p in zip(self.average, self.model.parameters(), strict=True):
            own.lerp_(p.detach(), 0.1)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.average = [t.clone() for t in state["average"]]


class Ended(NamedTuple):
    """What is left of a run."""

    guard: Guard
    tensors: list[Tensor]
    losses: list[float]


def _run(
    folder: Path,
    *,
    die_at: int | None = None,
    faults: Mapping[int, float] | None = None,
    epochs: int = 2,
    lr: float = 1e-2,
    meddle: Callable[[Guard, nn.Module], None] | None = None,
    loader: Callable[[TensorDataset], Any] | None = None,
    seed: int = 0,
    audit: bool = False,
    save_at: int | None = None,
    **settings: Any,
) -> Ended:
    """Train on shuffled batches of random numbers with dropout; `die_at`: after that many calls of `step`."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the global generator is what a snapshot has to hold
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.01 * step))
    ema = Ema(model)
    x = torch.randn(640, 8, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(x, x.sum(1, keepdim=True))

    def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        x = x + random.gauss(0, 0.01) + float(np.random.randn()) * 0.01  # noqa: NPY002
        return (model(x) - y).square().mean()

    settings = {"snapshot_every": 10, "save_every": 10, "resume": True, "clip_norm": 1.0} | settings
    with Guard(
        model,
        optimizer,
        scheduler=scheduler,
        ema=ema,
        folder=folder,
        audit=loss_of if audit else None,
        **settings,
    ) as guard:
        if meddle is not None:
            meddle(guard, model)
        batches = DataLoader(data, batch_size=8, shuffle=True) if loader is None else loader(data)
        losses = []
        for calls, batch in enumerate(guard.batches(batches, epochs=epochs)):
            loss = loss_of(batch) * (faults or {}).get(guard.batch_id - 1, 1.0)
            loss.backward()
            outcome = guard.step(loss)
            losses.append(loss.item())
            if outcome.taken:
                ema.update()
            if calls + 1 == save_at:
                guard.save()
            if calls + 1 == die_at:
                raise Killed
        tensors = [*model.state_dict().values(), *ema.average]
        states = [optimizer.state[p] for p in model.parameters() if p in optimizer.state]
        tensors += [state[key] for state in states for key in sorted(state)]
        return Ended(guard, [t.detach().clone() for t in tensors], losses)


def _die(folder: Path, at: int, **settings: Any) -> None:
    with pytest.raises(Killed):
        _run(folder, die_at=at, **settings)


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _kinds(folder: Path) -> list[str]:
    return [event.kind for event in standing(read_events(folder)) if event.kind not in ("attached", "resumed")]


@pytest.mark.parametrize("at", [1, 37, 80, 81])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, at: int) -> None:
    """round trip: dropout, batch norm, shuffling, EMA, schedule, three generators; in, at and after an epoch's end."""
    whole = _run(tmp_path / "whole")
    _die(tmp_path / "cut", at)
    cut = _run(tmp_path / "cut")
    assert _same(cut.tensors, whole.tensors)
    assert cut.losses == whole.losses[-len(cut.losses) :]
    assert cut.guard.report() == whole.guard.report()
    assert len(cut.losses) == 160 - (at - 1) // 10 * 10  # a snapshot comes with the next fetch


@pytest.mark.parametrize(
    ("at", "mode"), [(71, "restart"), (73, "restart"), (90, "restart"), (73, "in_place"), (79, "in_place")]
)
def test_a_rewind_is_done_once_or_again(tmp_path: Path, at: int, mode: str) -> None:
    """round trip: killed before, right after and long after a rewind; same bits, events and count of attempts."""
    faults = {70: math.nan, 71: math.nan, 72: math.nan}
    whole = _run(tmp_path / "whole", faults=faults, mode=mode)
    _die(tmp_path / "cut", at, faults=faults, mode=mode)
    cut = _run(tmp_path / "cut", faults=faults, mode=mode)
    assert _kinds(tmp_path / "whole").count("rewind") == 1
    assert [k for k in _kinds(tmp_path / "cut") if k != "audited"] == _kinds(tmp_path / "whole")
    assert _same(cut.tensors, whole.tensors)
    assert cut.guard.policy.state_dict() == whole.guard.policy.state_dict()
    assert cut.guard.skips.ranges[0][:2] == whole.guard.skips.ranges[0][:2]
    text = (tmp_path / "cut" / "skip.yaml").read_text()
    assert text.count("start:") == 1


def test_a_fault_after_the_restart_can_go_back_before_it(tmp_path: Path) -> None:
    """equivalence: the ring is refilled from the disk, so the rewind goes where it would have gone."""
    faults = {62: math.nan, 63: math.nan, 64: math.nan}
    whole = _run(tmp_path / "whole", faults=faults, policy=Ladder(max_skips=3, margin=25))
    _die(tmp_path / "cut", 61, faults=faults, policy=Ladder(max_skips=3, margin=25))
    cut = _run(tmp_path / "cut", faults=faults, policy=Ladder(max_skips=3, margin=25))
    assert _same(cut.tensors, whole.tensors)
    assert cut.guard.recorder.healthy == whole.guard.recorder.healthy


def test_a_stopped_run_stays_stopped(tmp_path: Path) -> None:
    """contract: a restarted process does not run into the same wall; a person can let it go on."""
    faults = {50: math.nan, 51: math.nan, 52: math.nan}
    first = _run(tmp_path, faults=faults, policy=Ladder(attempts=1))
    assert first.guard.stopped is not None
    again = _run(tmp_path, faults=faults, policy=Ladder(attempts=1))
    assert again.guard.stopped is not None
    assert again.losses == []
    assert _same(again.tensors, first.tensors)
    past = _run(tmp_path, resume="past_stop", policy=Ladder(attempts=1))
    assert past.guard.stopped is None
    assert len(past.losses) > 0


def test_what_lies_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """contract: the last `keep` and none that is not finite; a full disk is told and training goes on."""
    ended = _run(tmp_path / "a", keep=3)
    names = [path.name.rpartition("-")[2] for path in shelf.listed(tmp_path / "a" / "snapshots")]
    assert names == ["140", "150", "160"]
    assert all(not t.isnan().any() for t in ended.tensors)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr("aftershock.guard.recorder.write_snapshot", full)
    there = _run(tmp_path / "b", epochs=1)
    assert len(there.losses) == 80
    assert "not_saved" in _kinds(tmp_path / "b")


def test_a_new_run_does_not_replace_an_old_one(tmp_path: Path) -> None:
    """contract: without resume the snapshots of another run are not rotated out."""
    _run(tmp_path, epochs=1)
    with pytest.raises(ValueError, match="resume=True to go on"):
        _run(tmp_path, resume=False)


def test_what_cannot_be_had(tmp_path: Path) -> None:
    """contract: refused at attach, in a sentence."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="give folder="):
        Guard(model, optimizer, resume=True)
    with pytest.raises(ValueError, match="'past_stop'"):
        Guard(model, optimizer, folder=tmp_path, resume="maybe")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="checkpoints of its own"):
        Guard.hooked(model, optimizer, folder=tmp_path, save_every=10)
    with pytest.raises(ValueError, match="one to fall back on"):
        Guard(model, optimizer, folder=tmp_path, save_every=10, keep=1)
    with pytest.raises(ValueError, match="save needs a place"):
        Guard(model, optimizer, folder=tmp_path).save()


def _audits(folder: Path) -> list[str]:
    return [e.data["reason"].partition(":")[0] for e in read_events(folder) if e.kind == "audit"]


def test_a_faithful_resume_is_said_to_be_one(tmp_path: Path) -> None:
    """contract: five recorded steps compared as the run takes them, and again ahead of it with a loss given."""
    _die(tmp_path / "a", 35)
    _run(tmp_path / "a")
    told = [e.data["reason"] for e in read_events(tmp_path / "a") if e.kind == "audited"]
    assert told == ["5 steps gave the recorded losses"]
    assert _audits(tmp_path / "a") == []
    whole = _run(tmp_path / "whole")
    for at in (31, 35):
        folder = tmp_path / f"b{at}"
        _die(folder, at)
        assert _same(_run(folder, audit=True).tensors, whole.tensors)  # the rehearsal leaves no trace
        told = [e.data["reason"] for e in read_events(folder) if e.kind == "audited"]
        assert told[0] == f"{1 if at == 31 else 5} steps gave the recorded losses"
        assert _audits(folder) == []


def _more_dropout(guard: Guard, model: nn.Module) -> None:
    model[3].p = 0.5  # pyright: ignore[reportIndexIssue, reportAttributeAccessIssue]


def _other_weights(guard: Guard, model: nn.Module) -> None:
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)


def _other_schedule(guard: Guard, model: nn.Module) -> None:
    guard.recorder.training.scheduler.base_lrs = [5e-3]  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]


def _other_order(data: TensorDataset) -> DataLoader[Any]:
    return DataLoader(data, batch_size=8, shuffle=False)


PLANTED: dict[str, tuple[dict[str, Any], str]] = {
    "dropout": ({"meddle": _more_dropout}, "unexplained"),
    "weights": ({"meddle": _other_weights}, "weights"),
    "scheduler": ({"meddle": _other_schedule}, "scheduler"),
    "order": ({"loader": _other_order}, "loader"),
    "config": ({"lr": 5e-3}, "settings_from_checkpoint"),
}


@pytest.mark.parametrize(
    ("fault", "audit"), [*((fault, False) for fault in PLANTED), ("dropout", True), ("order", True)]
)
def test_what_was_not_restored_is_named(tmp_path: Path, fault: str, audit: bool) -> None:
    """planted: one thing differs in the resumed process; it becomes an event with advice."""
    settings, expected = PLANTED[fault]
    _die(tmp_path, 36)
    _run(tmp_path, audit=audit, epochs=1, **settings)
    assert expected in _audits(tmp_path)
    assert all(e.data["advice"] for e in read_events(tmp_path) if e.kind == "audit")


def test_the_steps_after_a_snapshot_are_few(tmp_path: Path) -> None:
    """contract: eight lines beside each snapshot, not one a step."""
    _run(tmp_path, save_every=40, epochs=1)
    found = {path.name: len(steps_after(path, 0)) for path in shelf.listed(tmp_path / "snapshots")}
    assert found == {"snap-000001-step-0": 8, "snap-000002-step-40": 8, "snap-000003-step-80": 0}


def test_without_batches_the_caller_keeps_the_place(tmp_path: Path) -> None:
    """round trip: a loop over its own list, positioned by `guard.batch_id`."""

    def train(folder: Path, die_at: int | None) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        data = torch.randn(60, 8, 4, generator=torch.Generator().manual_seed(1))
        with Guard(model, optimizer, folder=folder, resume=True, save_every=10, snapshot_every=10) as guard:
            for i in range(guard.batch_id, 60):
                loss = (model(data[i]) - data[i].sum(1, keepdim=True)).square().mean()
                loss.backward()
                guard.step(loss)
                if i == die_at:
                    raise Killed
        return [p.detach().clone() for p in model.parameters()]

    whole = train(tmp_path / "whole", None)
    with pytest.raises(Killed):
        train(tmp_path / "cut", 33)
    assert _same(train(tmp_path / "cut", None), whole)


def test_a_damaged_snapshot_is_passed_over(tmp_path: Path) -> None:
    """planted: the newest has a flipped bit: the one before it is taken, and the run ends the same."""
    whole = _run(tmp_path / "whole")
    _die(tmp_path / "cut", 45)
    newest = shelf.listed(tmp_path / "cut" / "snapshots")[-1]
    file = newest / "rank-0.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    cut = _run(tmp_path / "cut")
    assert _same(cut.tensors, whole.tensors)
    assert len(cut.losses) == 130


def test_a_save_by_hand_counts(tmp_path: Path) -> None:
    """round trip: a job that is told to end saves after a step, and goes on from exactly there."""
    whole = _run(tmp_path / "whole")
    _die(tmp_path / "cut", 34, save_at=34)
    cut = _run(tmp_path / "cut")
    assert len(cut.losses) == 160 - 34
    assert _same(cut.tensors, whole.tensors)


def test_the_stop_file_says_why(tmp_path: Path) -> None:
    """round trip: a person can read it."""
    ended = _run(tmp_path, faults=dict.fromkeys((50, 51, 52), math.nan), policy=Ladder(attempts=1))
    assert ended.guard.stopped is not None
    assert json.loads((tmp_path / "stopped.json").read_text())["reason"] == ended.guard.stopped.reason
