"""The writer against a hostile world: killed, blocked, starved, reopened."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from aftershock.lab.recipe import RunConfig
from aftershock.store import RunReader, RunWriter
from aftershock.store import folder as fs

Start = Callable[[str, Path], "subprocess.Popen[str]"]
CONFIG = {"optim": {"lr": 0.1}, "seed": 0}
STAT = "grad/head/rms"

WRITE_FOR_EVER = """
run = RunWriter.open(folder, config={"optim": {"lr": 0.1}, "seed": 0}, flush_every=1)
for step in range(1_000_000):
    run.stats(step, ["grad/head/rms"], np.array([float(step)]))
    run.flush()
    run.scalars(step, {"loss/train/ce": float(step)})
    run.event("mark", step)
    print(step)
"""

FILL_THE_DISK = """
run = RunWriter.open(folder, config={}, flush_every=1)
run.scalars(0, {"loss/train/ce": 0.0})
run.stats(0, ["grad/head/rms"], np.zeros(1))
run.flush()
print("ready")
sys.stdin.readline()
"""


def test_contract_config_and_environment_before_the_first_row(tmp_path: Path) -> None:
    config = RunConfig(seed=3)
    with RunWriter.open(tmp_path / "a" / "r1", config=config, tags={"arm": "x"}, env={"data": {"digest": "f"}}) as run:
        assert run.segment == 0
        reader = RunReader(tmp_path / "a" / "r1")
        assert reader.run_id == "r1"
        assert reader.config == yaml.safe_load(yaml.safe_dump(reader.config))
        assert reader.config["seed"] == 3
        assert reader.env["schema"] == fs.SCHEMA
        assert reader.env["tags"] == {"arm": "x"}
        assert reader.env["data"] == {"digest": "f"}
        assert reader.status == "running"
    assert RunReader(tmp_path / "a" / "r1").status == "interrupted"


def test_round_trip_of_everything(tmp_path: Path) -> None:
    values = {"loss/train/ce": 1 / 3, "grad/all/norm": float("inf"), "loss/eval/ce": float("nan")}
    weight = torch.randn(3, 4)
    with RunWriter.open(tmp_path / "r", config=CONFIG) as run:
        run.scalars(0, values)
        run.scalars(0, {"optim/all/lr": float(np.float32(0.5))})
        run.scalars(2, {"optim/all/lr": 0.25})
        run.event("diverged", 2, norm=float("-inf"), why={"a": [1, 2]})
        run.stats(0, [STAT, "update/head/rms"], np.array([1.5, np.nan]))
        run.snapshot(2, {"w": weight.T, "view": weight[0], "count": torch.tensor(3)})
        run.close("diverged", {"final_loss": float("nan"), "steps": 3, "l": [np.float64("inf"), 1.0]})
    read = RunReader(tmp_path / "r")
    assert read.status == "diverged"
    assert read.summary == {"final_loss": None, "steps": 3, "l": [None, 1.0]}
    assert read.scalar_names() == sorted([*values, "optim/all/lr"])
    for name, value in values.items():
        steps, columns = read.scalars(name)
        np.testing.assert_array_equal(steps, [0])
        np.testing.assert_array_equal(columns[name], [value])
    both = read.scalars("optim/all/lr", "loss/train/ce")
    np.testing.assert_array_equal(both.steps, [0, 2])
    np.testing.assert_array_equal(both.values["optim/all/lr"], [0.5, 0.25])
    np.testing.assert_array_equal(both.values["loss/train/ce"], [1 / 3, np.nan])
    (event,) = read.events()
    assert event._replace(time=0.0) == (0, 2, "diverged", 0.0, {"norm": float("-inf"), "why": {"a": [1, 2]}})
    np.testing.assert_array_equal(read.stats("update/*")["update/head/rms"].values, [np.nan])
    assert read.snapshots() == [2]
    loaded = read.load_snapshot(2)
    assert torch.equal(loaded["w"], weight.T)
    assert torch.equal(loaded["view"], weight[0])
    assert loaded["count"].item() == 3
    assert not list((tmp_path / "r").rglob("*.tmp"))


@pytest.mark.parametrize("acknowledged", [1, 7, 20])
def test_planted_kill_9_loses_no_acknowledged_row(tmp_path: Path, start: Start, acknowledged: int) -> None:
    """Killed after step n was acknowledged: rows 0..n are there, whole, and the next writer goes on."""
    child = start(WRITE_FOR_EVER, tmp_path / "r")
    assert child.stdout is not None
    assert child.stderr is not None
    last = -1
    while last < acknowledged:
        line = child.stdout.readline()
        assert line, child.stderr.read()
        last = int(line)
    assert RunReader(tmp_path / "r").status == "running"
    child.send_signal(signal.SIGKILL)
    last = max([last, *map(int, child.stdout.read().split())])
    child.wait()
    read = RunReader(tmp_path / "r")
    assert read.status == "interrupted"
    for steps, values in (
        (read.scalars("loss/train/ce").steps, read.scalars("loss/train/ce").values["loss/train/ce"]),
        read.stats()[STAT],
    ):
        assert len(steps) in (last + 1, last + 2)
        np.testing.assert_array_equal(steps, np.arange(len(steps)))
        np.testing.assert_array_equal(values, np.arange(len(steps), dtype=float))
    assert [event.step for event in read.events()][: last + 1] == list(range(last + 1))
    with RunWriter.open(tmp_path / "r", config=CONFIG) as run:
        assert run.segment == 1
        run.scalars(last, {"loss/train/ce": -1.0})
        run.close("finished", {})
    again = RunReader(tmp_path / "r")
    assert again.scalars("loss/train/ce").steps[-1] == last
    assert again.scalars("loss/train/ce").values["loss/train/ce"][-1] == -1.0


def test_planted_folder_being_written_by_another_process(tmp_path: Path, start: Start) -> None:
    child = start(WRITE_FOR_EVER, tmp_path / "r")
    assert child.stdout is not None
    child.stdout.readline()
    words = f"{tmp_path / 'r'} is being written by process {child.pid}; wait for it or choose another folder"
    with pytest.raises(ValueError, match=words):
        RunWriter.open(tmp_path / "r", config=CONFIG)
    assert child.poll() is None


def test_planted_leftovers_of_a_killed_writer(tmp_path: Path) -> None:
    """A torn last line in both JSONL files and stray .tmp files everywhere: ignored, then cleared."""
    with RunWriter.open(tmp_path / "r", config=CONFIG) as run:
        run.scalars(0, {"a": 1.0})
        run.stats(0, [STAT], np.ones(1))
        run.event("mark", 0)
    strays = [
        tmp_path / "r" / name for name in ("done.json.1.tmp", "stats/part-0-9.parquet.1.tmp", "snapshots/s.1.tmp")
    ]
    for stray in strays:
        stray.write_bytes(b"half")
    for name in (fs.SCALARS, fs.EVENTS):
        with (tmp_path / "r" / name).open("ab") as file:
            file.write(b'{"segment":0,"step":1,"val')
    read = RunReader(tmp_path / "r")
    assert read.scalars("a").steps.tolist() == [0]
    assert read.stats()[STAT].steps.tolist() == [0]
    assert len(read.events()) == 1
    assert read.snapshots() == []
    with RunWriter.open(tmp_path / "r", config=CONFIG) as run:
        run.scalars(1, {"a": 2.0})
        run.event("mark", 1)
    assert not any(stray.exists() for stray in strays)
    assert RunReader(tmp_path / "r").scalars("a").steps.tolist() == [0, 1]
    assert [event.segment for event in RunReader(tmp_path / "r").events()] == [0, 1]


def test_round_trip_in_the_middle_of_a_run(tmp_path: Path) -> None:
    """Segment 0 reaches step 9 with a snapshot of 5; segment 1 goes on from 6 and only reaches 7: its rows replace."""
    with RunWriter.open(tmp_path / "r", config=CONFIG) as run:
        for step in range(10):
            run.scalars(step, {"a": float(step), "old": 0.0})
            run.stats(step, [STAT], np.array([float(step)]))
            if step in (5, 8):
                run.snapshot(step, {"w": torch.full((2,), float(step))}, keep=2)
    weights = RunReader(tmp_path / "r").load_snapshot(5)["w"]
    with RunWriter.open(tmp_path / "r", config=CONFIG) as run:
        for step in (6, 7):
            run.scalars(step, {"a": -float(step)})
        run.stats(7, [STAT], np.array([-7.0]))
        run.snapshot(7, {"w": weights})
        run.close("finished", {})
    read = RunReader(tmp_path / "r")
    assert read.env["segment"] == 1
    assert [env["segment"] for env in read.env["previous"]] == [0]
    np.testing.assert_array_equal(read.scalars("a").values["a"], [0, 1, 2, 3, 4, 5, -6, -7])
    assert read.scalars("old").steps.tolist() == [0, 1, 2, 3, 4, 5]
    # statistics of step 6 are gone too: the segment as a whole started there
    assert read.stats()[STAT].steps.tolist() == [0, 1, 2, 3, 4, 5, 7]
    assert read.stats()[STAT].values[-1] == -7
    assert read.snapshots() == [5, 7], "that of step 8 was of the abandoned branch"


def test_equivalence_rewind_in_place_equals_reopening(tmp_path: Path) -> None:
    for name in ("reopened", "in_place"):
        run = RunWriter.open(tmp_path / name, config=CONFIG)
        for step in range(6):
            run.scalars(step, {"a": float(step)})
            run.stats(step, [STAT], np.array([float(step)]))
        if name == "in_place":
            assert run.new_segment() == 1
        else:
            run.abandon()
            run = RunWriter.open(tmp_path / name, config=CONFIG)
        for step in range(3, 5):
            run.scalars(step, {"a": -1.0})
            run.stats(step, [STAT], np.array([-1.0]))
        run.close("finished", {})
    one, two = RunReader(tmp_path / "reopened"), RunReader(tmp_path / "in_place")
    np.testing.assert_array_equal(one.scalars("a").values["a"], [0, 1, 2, -1, -1])
    np.testing.assert_array_equal(one.scalars("a").values["a"], two.scalars("a").values["a"])
    np.testing.assert_array_equal(one.stats()[STAT].values, two.stats()[STAT].values)
    assert one.env["segment"] == two.env["segment"] == 1


def test_contract_scalars_reach_the_disk_every_nth_call(tmp_path: Path) -> None:
    with RunWriter.open(tmp_path / "r", config=CONFIG, flush_every=3) as run:
        seen = []
        for step in range(7):
            run.scalars(step, {"a": 0.0})
            seen.append(len((tmp_path / "r" / fs.SCALARS).read_bytes().splitlines()))
    assert seen == [0, 0, 3, 3, 3, 6, 6]
    assert len(RunReader(tmp_path / "r").scalars("a").steps) == 7


def test_contract_an_exception_inside_flushes_and_leaves_it_unsealed(tmp_path: Path) -> None:

    def fail() -> None:
        with RunWriter.open(tmp_path / "r", config=CONFIG) as run:
            run.scalars(0, {"a": 1.0})
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    read = RunReader(tmp_path / "r")
    assert read.status == "interrupted"
    assert read.summary == {}
    assert read.scalars("a").steps.tolist() == [0]


def test_contract_sealed_runs_stay_sealed_and_failed_ones_may_be_tried_again(tmp_path: Path) -> None:
    for status in ("finished", "diverged"):
        RunWriter.open(tmp_path / status, config=CONFIG).close(status, {})
        with pytest.raises(ValueError, match=f"this run is {status} already"):
            RunWriter.open(tmp_path / status, config=CONFIG)
        assert RunReader(tmp_path / status).status == status
    RunWriter.open(tmp_path / "f", config=CONFIG).close("failed", {"error": "x"})
    with RunWriter.open(tmp_path / "f", config=CONFIG) as run:
        assert RunReader(tmp_path / "f").status == "running"
        assert run.segment == 1


def test_planted_other_config_names_the_keys(tmp_path: Path) -> None:
    config = RunConfig()
    RunWriter.open(tmp_path / "r", config=config).abandon()
    optim = dataclasses.replace(config.optim, lr=0.5)
    before = (tmp_path / "r" / fs.ENV).read_bytes()
    with pytest.raises(ValueError, match=r"another config: optim\.lr \(0\.01 there, 0\.5 now\); choose"):
        RunWriter.open(tmp_path / "r", config=dataclasses.replace(config, optim=optim))
    with pytest.raises(ValueError, match=r"seed \(0 there, absent now\)"):
        RunWriter.open(tmp_path / "r", config={})
    assert (tmp_path / "r" / fs.ENV).read_bytes() == before
    RunWriter.open(tmp_path / "r", config=config).abandon()


@pytest.mark.parametrize("name", [fs.ENV, fs.DONE])
def test_planted_newer_schema(tmp_path: Path, name: str) -> None:
    RunWriter.open(tmp_path / "r", config=CONFIG).close("failed", {})
    path = tmp_path / "r" / name
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 2}))
    with pytest.raises(ValueError, match=r"written by a newer aftershock \(schema 2, this one reads 1\); upgrade"):
        RunWriter.open(tmp_path / "r", config=CONFIG)
    assert not fs.is_locked(tmp_path / "r")


def _after_open(code: str) -> str:
    return (
        FILL_THE_DISK
        + "try:\n"
        + code
        + "\nexcept OSError as error:\n    print(error)\n"
        + ("try:\n    run.close('finished', {})\nexcept OSError as error:\n    print('close:', error)\n")
    )


SCALARS = "    for step in range(1, 1_000_000): run.scalars(step, {'loss/train/ce': float(step)})"
STATS = """
    names = [f"grad/blocks.{i}/rms" for i in range(1000)]
    values = np.random.default_rng(0).normal(size=1000)
    for step in range(1, 400):
        run.stats(step, names, values + step)
    run.flush()
"""
SNAPSHOT = """
    import torch
    run.snapshot(1, {"w": torch.randn(1000, 1000)})
"""
LIMIT = "    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"


def _check_full(read: RunReader, child: subprocess.Popen[str], words: str) -> list[str]:
    """The sentence, nothing lost, nothing half written; the lines the child printed."""
    out, err = child.communicate("go\n")
    assert child.returncode == 0, err
    lines = out.splitlines()
    assert f"{read.place.text}: no room left to write ({words}); what was written before is intact" in lines[0], out
    assert read.scalars("loss/train/ce").values["loss/train/ce"][0] == 0
    assert read.stats()[STAT].values.tolist() == [0.0]
    assert not list(Path(read.place.text).rglob("*.tmp"))
    assert Path(read.place.text, fs.SCALARS).read_bytes().endswith(b"\n")
    return lines


def _start_and_wait(start: Start, code: str, folder: Path) -> Any:
    child = start(code, folder)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


@pytest.mark.parametrize("code", [SCALARS, STATS, SNAPSHOT], ids=["scalars", "stats", "snapshot"])
def test_planted_file_size_limit(tmp_path: Path, start: Start, code: str) -> None:
    """RLIMIT_FSIZE: the kernel refuses to let a file grow, as a quota does."""
    child = _start_and_wait(start, _after_open(LIMIT + code), tmp_path / "r")
    read = RunReader(tmp_path / "r")
    _check_full(read, child, "file too large")


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mount.returncode != 0:
        pytest.skip(f"needs the right to mount a tmpfs: {mount.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("code", [SCALARS, STATS, SNAPSHOT], ids=["scalars", "stats", "snapshot"])
def test_planted_full_disk(tiny_disk: Path, start: Start, code: str) -> None:
    child = _start_and_wait(start, _after_open(code), tiny_disk / "r")
    lines = _check_full(RunReader(tiny_disk / "r"), child, "no space left on device")
    closed = RunReader(tiny_disk / "r").status
    assert closed == ("interrupted" if any(line.startswith("close:") for line in lines) else "finished")
    if code is SCALARS:
        assert closed == "interrupted"
        filled = RunReader(tiny_disk / "r").scalars("loss/train/ce")
        np.testing.assert_array_equal(filled.values["loss/train/ce"], np.arange(len(filled.steps), dtype=float))


def test_planted_full_disk_at_open(tiny_disk: Path) -> None:
    (tiny_disk / "ballast").write_bytes(b"x")
    with (tiny_disk / "ballast").open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    with pytest.raises(OSError, match=f"{tiny_disk / 'r'}: no room left to write"):
        RunWriter.open(tiny_disk / "r", config=CONFIG)
    os.unlink(tiny_disk / "ballast")
    RunWriter.open(tiny_disk / "r", config=CONFIG).close("finished", {})
    assert RunReader(tiny_disk / "r").status == "finished"


def test_planted_bad_calls(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="flush_every must be at least 1, got 0"):
        RunWriter.open(tmp_path / "r", config=CONFIG, flush_every=0)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot hold a run folder"):
        RunWriter.open(tmp_path / "file" / "r", config=CONFIG)
    with pytest.raises(ValueError, match="the config holds what YAML cannot"):
        RunWriter.open(tmp_path / "r", config={"a": object()})
    with pytest.raises(ValueError, match="env may not replace host, previous"):
        RunWriter.open(tmp_path / "r", config=CONFIG, env={"host": "x", "previous": 1})
    run = RunWriter.open(tmp_path / "r", config=CONFIG)
    with pytest.raises(ValueError, match="keep must be at least 1"):
        run.snapshot(0, {}, keep=0)
    with pytest.raises(ValueError, match="status 'done' is not one of finished, diverged, failed"):
        run.close("done", {})
    with pytest.raises(ValueError, match=r"event spike\.who"):
        run.event("spike", 0, who=object())
    run.close("finished", {})
    with pytest.raises(ValueError, match="this writer is closed"):
        run.scalars(1, {"a": 0.0})


def test_planted_lost_environment(tmp_path: Path) -> None:
    RunWriter.open(tmp_path / "r", config=CONFIG).abandon()
    (tmp_path / "r" / fs.ENV).unlink()
    with pytest.raises(ValueError, match=r"has scalars but no env\.json"):
        RunWriter.open(tmp_path / "r", config=CONFIG)
