"""Snapshots on disk: whole or not at all, checked when read, alone and by several ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from aftershock.guard.disk import Snapshot, load_snapshot, restore_from, write_snapshot
from aftershock.guard.recorder import FlightRecorder
from aftershock.guard.shelf import COMPLETE, newest, verify
from aftershock.guard.state import Kept, State, StepRow, Training
from aftershock.guard.tree import split

HERE = Path(__file__).parent
SOURCE = Path(__file__).parents[2] / "src"


def small() -> Training:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1)).bfloat16()
    model.register_buffer("phase", torch.full((2,), 1 + 2j, dtype=torch.complex128))
    model.register_buffer("none", torch.zeros(0, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return Training(model, optimizer, scheduler=torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 3, 6]))


def train(training: Training, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = training.model(torch.randn(4, 3, dtype=torch.bfloat16)).square().mean()
        loss.backward()
        training.optimizer.step()
        training.scheduler.step()  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
        training.optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def saved(folder: Path, *steps: int, keep: int = 3) -> list[Path]:
    """A snapshot of each step, all of one training."""
    recorder = FlightRecorder(small())
    paths = []
    for step in steps:
        recorder.take(step, step)
        paths.append(recorder.save(folder, step, keep=keep))
    return paths


def steps_in(folder: Path) -> list[int]:
    return [load_snapshot(path).at.step for path in sorted(folder.iterdir())]


@pytest.mark.parametrize("steps", [0, 5])
def test_another_process_goes_on_bit_for_bit(tmp_path: Path, steps: int) -> None:
    """round trip: into a new model and optimizer, before the first step and in the middle."""
    training = small()
    train(training, steps)
    recorder = FlightRecorder(training)
    recorder.take(steps, steps + 2)
    recorder.save(tmp_path, steps)
    expected = train(training, 20)
    other = small()
    assert restore_from(tmp_path, other) == Kept(steps, steps + 2)
    assert len(other.optimizer.state) == (6 if steps else 0)
    assert train(other, 20) == expected
    for one, two in zip(training.params.values(), other.params.values(), strict=True):
        assert torch.equal(one, two)


def test_log_and_batches_come_along(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """round trip: not finite rows included; a batch that no file can hold is left out, and that is said."""
    recorder = FlightRecorder(small())
    recorder.take(1, 1)
    rows = (StepRow(1, 1, float("nan"), float("inf"), 0.1), StepRow(2, 2, 0.1 + 0.2, -0.0, 1e-300))
    for row in rows:
        recorder.note(row)
    recorder.keep_batch(1, {"ids": torch.arange(3), 4: [np.ones(2), "text", (None, True)]})
    recorder.keep_batch(2, {"made_by": small})
    snapshot = load_snapshot(recorder.save(tmp_path, 1))
    assert repr(snapshot.rows) == repr(rows)
    batch = snapshot.batch(1)
    assert batch["ids"].tolist() == [0, 1, 2]
    assert batch[4][0].tolist() == [1, 1]
    assert batch[4][1:] == ["text", (None, True)]
    assert list(snapshot.batches) == [1]
    assert "batch 2/made_by: a function cannot be written to disk" in caplog.text


_tensors = st.builds(
    lambda dtype, shape, seed: torch.randint(
        0, 256, (*shape, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    ).view(dtype),
    st.sampled_from(
        [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.int64, torch.uint8]
        + [torch.complex64, torch.complex128, torch.uint32, torch.float8_e4m3fn]
    ),
    st.lists(st.integers(1, 3), max_size=2),
    st.integers(0, 9),
)


@settings(max_examples=10)  # each writes and syncs files
@given(st.dictionaries(st.text("ab/'.:", max_size=4), _tensors, max_size=4))
def test_any_tensors_come_back(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Any]) -> None:
    """property: any name, dtype and shape, the same bits (NaN payloads too)."""
    held: dict[str, Any] = {}
    plain = split(tensors, "extra", held)
    path = write_snapshot(tmp_path_factory.mktemp("any"), Snapshot(Kept(0, 0), State(held, plain), (), {}))
    back = load_snapshot(path).state
    assert back.plain == plain
    assert back.tensors.keys() == held.keys()
    for name, tensor in held.items():
        other = back.tensors[name]
        assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape)
        assert other.flatten().view(torch.uint8).equal(tensor.flatten().view(torch.uint8))


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    """contract: the newest `keep` steps, the first and last of each; going back drops the branch that was left."""
    saved(tmp_path, 10, 20, 30, 40)
    assert steps_in(tmp_path) == [20, 30, 40]
    saved(tmp_path, 25)
    assert steps_in(tmp_path) == [20, 25]
    saved(tmp_path, 25, keep=1)
    saved(tmp_path, 25, keep=1)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["snap-000005-step-25", "snap-000007-step-25"]
    saved(tmp_path, 0)
    assert steps_in(tmp_path) == [0]
    with pytest.raises(ValueError, match="keep is 0"):
        saved(tmp_path, 1, keep=0)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("how", [_cut, _flip, Path.unlink])
@pytest.mark.parametrize("name", [COMPLETE, "rank-0.json", "rank-0.safetensors"])
def test_damage_is_found_and_the_next_older_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, how: Any
) -> None:
    """planted: one byte less, one bit other, a file less."""
    older, newer = saved(tmp_path, 1, 2)
    how(newer / name)
    for read in (load_snapshot, verify, lambda path: restore_from(path, small())):
        with pytest.raises(ValueError, match=f"step-2 is damaged: {name} is .*use an older snapshot"):
            read(newer)
    assert newest(tmp_path) == older
    assert f"step-2 is damaged: {name}" in caplog.text
    assert restore_from(tmp_path, small()).step == 1
    (older / COMPLETE).unlink()
    with pytest.raises(ValueError, match="none of the 2 snapshots"):
        newest(tmp_path)
    saved(tmp_path, 3, keep=1)
    assert steps_in(tmp_path) == [3]


def test_where_there_is_none(tmp_path: Path) -> None:
    """contract: told apart from damage; of a newer format, told too; `before` leaves out what is too late."""
    assert newest(tmp_path / "nothing") is None
    with pytest.raises(ValueError, match="there is no snapshot in"):
        restore_from(tmp_path, small())
    with pytest.raises(ValueError, match="there is no such snapshot"):
        load_snapshot(tmp_path / "snap-000001-step-1")
    first, _ = saved(tmp_path, 1, 2)
    assert newest(tmp_path, before=2) == first
    assert newest(tmp_path, before=1) is None


def test_state_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    """planted: the error names the place, and the folder is as it was."""
    saved(tmp_path, 1)
    training = small()
    training.optimizer.param_groups[0]["hook"] = small
    recorder = FlightRecorder(training)
    recorder.take(2, 2)
    with pytest.raises(ValueError, match="state/group/0/hook: a function cannot be written"):
        recorder.save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["snap-000001-step-1"]


def test_a_full_disk_is_told_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """planted: what was there stays, the half written one goes."""
    saved(tmp_path, 1)

    def full(*args: Any) -> None:
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="no room left to write"):
        saved(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["snap-000001-step-1"]


def test_kill_9_at_any_point(tmp_path: Path) -> None:
    """planted: at every call to the system, and at random times from outside: a whole snapshot, never an older one."""
    env = os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", str(HERE / "kill_worker.py"), str(tmp_path), "6"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert told["calls"] > 10
    assert told["reached"] > 0


def _ranks(processes: int, folder: Path) -> list[dict[str, Any]]:
    env = os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if processes == 2 else []
    command = [sys.executable, *launch, str(HERE / "snapshot_worker.py"), str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{processes}.{rank}").read_text()) for rank in range(processes)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def both(folder: Path) -> list[dict[str, Any]]:
    return _ranks(2, folder)


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_ranks(both: list[dict[str, Any]], way: str) -> None:
    """round trip: in memory and on disk, each rank its own chance and extras; what one cannot do fails on both."""
    for rank, told in enumerate(ranks := [one[way] for one in both]):
        assert told["taken"] == [True, True]
        assert told["losses"] == told["again"] == told["resumed"]
        assert (told["at"], told["odd"], told["emptied"]) == ([3, 3], rank, 0)
        assert "a builtin_function_or_method cannot be written to disk" in told["unwritable"]
        assert "rank-1.safetensors is not as it was written" in told["damaged"]
        assert "none of the 1 snapshots" in told["none_left"]
    assert ranks[0]["losses"] != ranks[1]["losses"]
    assert ranks[0]["survivors"] == ["snap-000001-step-3"]
    # Under DDP both hold the same, which is written once: the second file has little but random numbers.
    assert (ranks[0]["sizes"][1] < ranks[0]["sizes"][0] - 2000) == (way == "ddp")


def test_sharded_by_two_read_by_one(both: list[dict[str, Any]], folder: Path) -> None:
    """equivalence: every parameter and moment in another layout; refused without a sharded model and with rng."""
    assert len(both) == 2
    with pytest.raises(ValueError, match="holds a sharded model"):
        load_snapshot(folder / "fsdp")
    told = _ranks(1, folder)[0]
    assert "written by 2 processes, here are 1; random numbers need rng=False" in told["words"]
    assert len(told["same"]) == 28  # 7 parameters with step and two moments each
    assert all(told["same"].values())
