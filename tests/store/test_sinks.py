"""The queue in front of the trackers: order, names, faults that never reach training; specs and missing packages."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from aftershock.store import RunReader, RunWriter, sinks
from aftershock.store.sinks import RunInfo, SinkQueue, sink_from_spec


class Recorder:
    """A sink that remembers its calls, and fails where it is told to."""

    def __init__(self, fails: str = "") -> None:
        self.calls: list[tuple[object, ...]] = []
        self.fails = fails

    def open(self, run: RunInfo) -> None:
        self._note("open", run)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._note("log", dict(metrics), step)

    def event(self, kind: str, step: int, data: Mapping[str, object]) -> None:
        self._note("event", kind, step, dict(data))

    def artifact(self, path: Path, name: str) -> None:
        self._note("artifact", name, path.exists())

    def close(self, status: str) -> None:
        self._note("close", status)

    def _note(self, *call: object) -> None:
        if call[0] == self.fails:
            raise ConnectionError(f"{call[0]} refused")
        self.calls.append((*call, threading.current_thread() is threading.main_thread()))


def test_contract_calls_in_order_names_and_thread(tmp_path: Path) -> None:
    sink = Recorder()
    with RunWriter.open(tmp_path / "r", config={"lr": 0.1}, tags={"arm": "x"}, sinks=[sink]) as run:
        run.scalars(0, {"loss/train/ce": 2.0})
        run.stats(0, ["grad/head/rms"], np.array([0.5], dtype=np.float32))
        run.event("spike", 0, size=3)
        run.new_segment()
        run.scalars(0, {"loss/train/ce": 1.0})
        run.close("finished", {})
    info = RunInfo(
        run_id="r", config={"lr": 0.1}, tags={"arm": "x"}, segment=0, resumed_from=None, folder=tmp_path / "r"
    )
    assert sink.calls == [
        ("open", info, False),
        ("log", {"aftershock/loss/train/ce": 2.0, sinks.STEP: 0.0, sinks.SEGMENT: 0.0}, 0, False),
        ("log", {"aftershock/grad/head/rms": 0.5, sinks.STEP: 0.0, sinks.SEGMENT: 0.0}, 0, False),
        ("event", "spike", 0, {"size": 3}, False),
        ("log", {"aftershock/loss/train/ce": 1.0, sinks.STEP: 0.0, sinks.SEGMENT: 1.0}, 0, False),
        ("artifact", "config.yaml", True, False),
        ("artifact", "events.jsonl", True, False),
        ("close", "finished", False),
    ]


def test_contract_a_resumed_run_says_from_where(tmp_path: Path) -> None:
    sink = Recorder()
    for _ in range(2):
        sink = Recorder()
        with RunWriter.open(tmp_path / "r", config={}, sinks=[sink]) as run:
            run.scalars(7, {"a": 1.0})
        assert sink.calls[-1] == ("close", "interrupted", False)
    info = sink.calls[0][1]
    assert isinstance(info, RunInfo)
    assert (info.segment, info.resumed_from) == (1, 7)


@pytest.mark.parametrize("fails", ["open", "log", "event", "artifact", "close"])
def test_planted_fault_is_logged_once_and_harms_nobody(
    tmp_path: Path, fails: str, caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = Recorder(fails), Recorder()
    with caplog.at_level(logging.WARNING), RunWriter.open(tmp_path / "r", config={}, sinks=[bad, good]) as run:
        for step in range(3):
            run.scalars(step, {"a": 1.0})
            run.event("mark", step)
        run.close("finished", {})
    assert [f"{fails} refused" in record.message for record in caplog.records] == [True]
    assert len(good.calls) == 1 + 3 + 3 + 2 + 1
    if fails == "open":
        assert bad.calls == [], "a sink that never opened is left alone"
    assert len(RunReader(tmp_path / "r").scalars("a").steps) == 3


def test_planted_slow_tracker_does_not_hold_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The tracker hangs for ever: training goes on, what it misses is said, closing gives up on it."""
    monkeypatch.setattr(sinks, "QUEUE_LENGTH", 4)
    monkeypatch.setattr(sinks, "CLOSE_S", 0.05)
    stuck = threading.Event()

    class Stuck(Recorder):
        def open(self, run: RunInfo) -> None:
            stuck.wait()

    with caplog.at_level(logging.WARNING), RunWriter.open(tmp_path / "r", config={}, sinks=[Stuck()]) as run:
        for step in range(100):
            run.scalars(step, {"a": 1.0})
        run.close("finished", {})
    stuck.set()
    text = caplog.text
    assert "miss rows" in text
    assert "did not finish" in text
    assert len(RunReader(tmp_path / "r").scalars("a").steps) == 100


def test_contract_higher_ranks_are_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "_is_rank_zero", lambda: False)
    sink = Recorder()
    info = RunInfo(run_id="r", config={}, tags={}, segment=0, resumed_from=None, folder=tmp_path)
    queue = SinkQueue([sink], info)
    queue.start()
    queue.log({"a": 1.0}, 0, 0)
    queue.close("finished")
    assert sink.calls == []


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("tensorbord:x", "unknown kind 'tensorbord'; did you mean 'tensorboard'"),
        ("wandb", "say where to, as in wandb:NAME"),
        ("mlflow:", "say where to"),
    ],
)
def test_planted_bad_specs(spec: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sink_from_spec(spec)


def test_planted_missing_package_gives_the_pip_line() -> None:
    with pytest.raises(ValueError, match=r"nosuch is not installed .*pip install 'aftershock\[nosuch\]'"):
        sinks.require("no_such_package_anywhere", "nosuch")
