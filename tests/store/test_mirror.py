"""Mirrors at memory:// and file:// URLs: reading back, increments, atomicity, failure, going on elsewhere."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from aftershock.store import RunReader, RunRef, RunWriter, Study, mirror, write_manifest
from aftershock.store import folder as fs
from aftershock.store.place import Place

STAT = "grad/head/rms"


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    where = f"memory://{uuid.uuid4().hex}" if request.param == "memory" else f"file://{tmp_path / 'mirror'}"
    yield f"{where}/r"
    if request.param == "memory":
        fsspec.filesystem("memory").rm(where.removeprefix("memory:/"), recursive=True)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "PAUSE_S", 0.01)


def _wait(condition: Any, what: str) -> None:
    """20 s: a mirror pushes within milliseconds here, so only a hang or a bug takes longer."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.01)


def _same(one: RunReader, two: RunReader) -> None:
    assert (one.run_id, one.config, one.env, one.status, one.summary) == (
        two.run_id,
        two.config,
        two.env,
        two.status,
        two.summary,
    )
    assert one.events() == two.events()
    np.testing.assert_array_equal(one.scalars().values["a"], two.scalars().values["a"])
    for name in one.stat_names():
        np.testing.assert_array_equal(one.stats()[name], two.stats()[name])
    assert one.snapshots() == two.snapshots()
    for step in one.snapshots():
        assert torch.equal(one.load_snapshot(step)["w"], two.load_snapshot(step)["w"])


def test_round_trip_live_then_sealed(tmp_path: Path, url: str) -> None:
    run = RunWriter.open(tmp_path / "r", config={"lr": 0.1}, mirror=url)
    run.scalars(0, {"a": float("nan")})
    run.stats(0, [STAT], np.ones(1))
    run.event("mark", 0, x=float("inf"))
    run.flush()
    _wait(lambda: Place(url).read(f"{fs.STATS}/part-0-0.parquet") and Place(url).read(fs.CONFIG), "the first push")
    live = RunReader(url)
    assert live.status == "running"
    for step in (1, 2, 3):
        run.scalars(step, {"a": float(step)})
        run.stats(step, [STAT], np.ones(1))
        run.snapshot(step, {"w": torch.full((2,), float(step))})
    run.close("finished", {"final_loss": 1.0})
    _same(RunReader(tmp_path / "r"), RunReader(url))
    assert Place(url).list(fs.STATS) == ["part-0-0-3.parquet"], "merged parts are gone there too"
    assert Place(url).list(fs.SNAPSHOTS) == ["step-2.safetensors", "step-3.safetensors"]
    assert Place(url).list("") == sorted([fs.CONFIG, fs.DONE, fs.ENV, fs.EVENTS, fs.SCALARS, fs.SNAPSHOTS, fs.STATS]), (
        "no lock, no heartbeat, no .tmp"
    )


def test_contract_push_sends_only_what_changed_and_done_last(tmp_path: Path, url: str) -> None:
    with RunWriter.open(tmp_path / "r", config={}) as run:
        run.scalars(0, {"a": 1.0})
        copy = mirror.Mirror(tmp_path / "r", url)
        run.flush()
        assert sorted(copy.push()) == sorted([fs.CONFIG, fs.ENV, fs.EVENTS, fs.SCALARS])
        assert copy.push() == []
        run.scalars(1, {"a": 1.0})
        run.flush()
        assert copy.push() == [fs.SCALARS]
        run.stats(1, [STAT], np.ones(1))
        run.close("finished", {})
    assert copy.push() == ["stats/part-0-1-1.parquet", fs.DONE]


def test_round_trip_fetch_and_go_on_elsewhere(tmp_path: Path, url: str) -> None:
    with RunWriter.open(tmp_path / "here" / "r", config={"lr": 0.1}, mirror=url) as run:
        run.scalars(0, {"a": 0.0})
        run.stats(0, [STAT], np.ones(1))
        run.snapshot(0, {"w": torch.ones(2)})
    with pytest.raises(ValueError, match="holds a run already, and .* is new; fetch that run first"):
        RunWriter.open(tmp_path / "there" / "r", config={"lr": 0.1}, mirror=url)
    assert RunReader(url).scalars("a").steps.tolist() == [0]
    mirror.fetch(url, tmp_path / "elsewhere" / "r")
    _same(RunReader(url), RunReader(tmp_path / "elsewhere" / "r"))
    with RunWriter.open(tmp_path / "elsewhere" / "r", config={"lr": 0.1}, mirror=url) as run:
        assert run.segment == 1
        run.scalars(1, {"a": 1.0})
        run.close("finished", {})
    assert RunReader(url).scalars("a").values["a"].tolist() == [0.0, 1.0]
    assert RunReader(url).status == "finished"
    mirror.fetch(url, tmp_path / "last" / "r")
    RunWriter.open(tmp_path / "here" / "r", config={"lr": 0.1}).abandon()
    with pytest.raises(ValueError, match="by a copy of this run that .* does not know"):
        RunWriter.open(tmp_path / "here" / "r", config={"lr": 0.1}, mirror=url)  # both copies had a segment 1
    with pytest.raises(ValueError, match="holds a run already; choose a folder"):
        mirror.fetch(url, tmp_path / "last" / "r")
    with pytest.raises(ValueError, match="no run here"):
        mirror.fetch(url + "x", tmp_path / "none")


def test_planted_mirror_of_another_or_a_later_run(tmp_path: Path, url: str) -> None:
    for _ in range(2):
        RunWriter.open(tmp_path / "a" / "r", config={"lr": 0.1}, mirror=url).abandon()
    RunWriter.open(tmp_path / "b" / "r", config={"lr": 0.2}).abandon()
    with pytest.raises(ValueError, match="mirrors a run with another config"):
        RunWriter.open(tmp_path / "b" / "r", config={"lr": 0.2}, mirror=url)
    RunWriter.open(tmp_path / "c" / "r", config={"lr": 0.1}).abandon()
    with pytest.raises(ValueError, match=r"by a copy of this run that .* \(segment 1 there\)"):
        RunWriter.open(tmp_path / "c" / "r", config={"lr": 0.1}, mirror=url)
    assert not fs.is_locked(tmp_path / "c" / "r")


def test_contract_failed_run_tried_again_is_running_in_the_mirror(tmp_path: Path, url: str) -> None:
    RunWriter.open(tmp_path / "r", config={}, mirror=url).close("failed", {})
    assert RunReader(url).status == "failed"
    run = RunWriter.open(tmp_path / "r", config={}, mirror=url)
    _wait(lambda: RunReader(url).status == "running", "the stale done.json to go")
    run.close("finished", {})
    assert RunReader(url).status == "finished"


def test_round_trip_of_a_whole_study(tmp_path: Path, url: str) -> None:
    ref = RunRef(run_id="r0", size="s", arm="a", lr=0.1, seed=0)
    write_manifest(tmp_path / "s", name="n", title="t", runs=[ref])
    with RunWriter.open(tmp_path / "s" / "runs" / "r0", config={}) as run:
        run.scalars(0, {"a": 2.0})
        run.stats(0, [STAT], np.array([4.0]))
        run.close("finished", {"final_loss": 1.0})
    mirror.push(tmp_path / "s", url)
    here, there = Study(tmp_path / "s"), Study(url)
    assert here.rows() == there.rows()
    query = "select * from scalars join stats using (run_id, step) join runs using (run_id)"
    assert here.sql(query) == there.sql(query)
    assert len(there.sql(query)) == 1


def test_planted_broken_filesystem_never_reaches_training(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The mirror breaks, is said so once, heals, and is complete at the end."""
    run = RunWriter.open(tmp_path / "r", config={}, mirror=url)
    real, broken, tries = mirror.Mirror.push, [True], [0]

    def push(self: mirror.Mirror) -> list[str]:
        tries[0] += 1
        if broken[0]:
            raise ConnectionError("bucket gone")
        return real(self)

    monkeypatch.setattr(mirror.Mirror, "push", push)
    with caplog.at_level(logging.WARNING):
        while tries[0] < 3:
            run.scalars(tries[0], {"a": 1.0})
            run.flush()
            time.sleep(0.01)
        broken[0] = False
        run.close("finished", {})
    assert [record.message.count("bucket gone") for record in caplog.records] == [1]
    assert RunReader(url).status == "finished"


def test_planted_half_written_file_is_never_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the filesystem renames, an upload that dies half way leaves the old file."""
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / fs.CONFIG).write_text("old")
    copy = mirror.Mirror(tmp_path / "r", f"file://{tmp_path / 'm'}")
    copy.push()
    (tmp_path / "r" / fs.CONFIG).write_text("newer")

    def half(self: Any, source: str, target: str, **_: Any) -> None:
        Path(target).write_text("ne")
        raise ConnectionError

    monkeypatch.setattr(fsspec.filesystem("file").__class__, "put_file", half)
    with pytest.raises(ConnectionError):
        copy.push()
    assert (tmp_path / "m" / fs.CONFIG).read_text() == "old"
    assert Place(f"file://{tmp_path / 'm'}").list("") == [fs.CONFIG]


@pytest.mark.parametrize(
    ("bad", "words"),
    [("nosuch://bucket/r", "not a URL that fsspec can open"), ("file:///proc/r", "the mirror cannot be written")],
)
def test_planted_bad_urls_are_told_before_training(tmp_path: Path, bad: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RunWriter.open(tmp_path / "r", config={}, mirror=bad)
    assert not (tmp_path / "r" / fs.CONFIG).exists()
    with pytest.raises(ValueError, match="no such folder to mirror"):
        mirror.push(tmp_path / "none", "memory://x")


@pytest.mark.skipif(find_spec("s3fs") is not None, reason="s3fs is installed here")
def test_planted_url_whose_package_is_missing() -> None:
    with pytest.raises(ValueError, match="needs another package: .*s3fs"):
        Place("s3://bucket/r")
