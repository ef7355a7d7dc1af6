"""The guard's events against a hostile world: killed, starved, mirrored to a broken tracker."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, get_args

import pytest

from aftershock.guard.events import CALM, KINDS, EventKind, EventLog, read_events, sentence
from aftershock.store import RunReader, RunWriter
from aftershock.store import folder as fs

WRITE_FOR_EVER = """
import sys
from pathlib import Path
from aftershock.guard.events import EventLog
log = EventLog(Path(sys.argv[1]))
for step in range(int(sys.argv[2]), 1_000_000):
    log.event("skip", step, step + 1, loss=float("nan"))
    print(step, flush=True)
"""


def test_round_trip_of_events_with_numbers_that_are_not_finite(tmp_path: Path) -> None:
    """round trip: NaN and infinities are spelled as in the store, and come back as numbers."""
    log = EventLog(tmp_path / "guard")
    log.event("nonfinite", 7, 9, loss=math.nan, grad_norm=math.inf, where=["blocks.0", -math.inf])
    log.event("rewind", 7, 10, to_step=5, skip=(9, 10), reason="loss spike")
    first, second = read_events(tmp_path / "guard")
    assert (first.kind, first.step, first.batch_id) == ("nonfinite", 7, 9)
    assert math.isnan(first.data["loss"])
    assert first.data["grad_norm"] == math.inf
    assert first.data["where"] == ["blocks.0", -math.inf]
    assert second.data == {"to_step": 5, "skip": [9, 10], "reason": "loss spike"}
    line = (tmp_path / "guard" / fs.EVENTS).read_bytes().splitlines()[0]
    assert json.loads(line, parse_constant=pytest.fail)["data"]["loss"] == "nan"


def test_planted_kills_lose_no_event(tmp_path: Path) -> None:
    """planted: kill -9 at an arbitrary moment, five times over in one folder; what was announced is in the file."""
    announced = -1
    for _ in range(5):
        command = [sys.executable, "-c", WRITE_FOR_EVER, str(tmp_path), str(announced + 1)]
        env = {"PYTHONPATH": str(Path(__file__).parents[2] / "src"), "PATH": "/usr/bin:/bin"}
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=env) as child:
            assert child.stdout is not None
            for line in child.stdout:
                announced = int(line)
                if announced % 20 == 19:
                    break
            os.kill(child.pid, signal.SIGKILL)
            announced = max([announced, *map(int, child.stdout.read().split())])
        steps = [event.step for event in read_events(tmp_path)]
        assert steps[: announced + 1] == list(range(announced + 1))
        announced = steps[-1]  # one more may be in the file than was announced


def test_planted_torn_line_is_cut_and_the_log_goes_on(tmp_path: Path) -> None:
    """planted: half a line, as a power cut leaves it."""
    EventLog(tmp_path).event("skip", 1, 1)
    with (tmp_path / fs.EVENTS).open("ab") as file:
        file.write(b'{"schema": 1, "ki')
    assert [event.step for event in read_events(tmp_path)] == [1]
    EventLog(tmp_path).event("skip", 2, 2)
    assert [event.step for event in read_events(tmp_path)] == [1, 2]


def test_contract_two_logs_of_one_folder_do_not_harm_each_other(tmp_path: Path) -> None:
    """contract: a guard made anew in a notebook, the old one still there."""
    logs = [EventLog(tmp_path), EventLog(tmp_path)]
    for step in range(6):
        logs[step % 2].event("alarm", step, step)
    assert [event.step for event in read_events(tmp_path)] == list(range(6))


def test_contract_logs_that_write_at_the_same_time_lose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """contract: a second log comes while the first has opened the file and not written yet; it has to wait."""
    append = fs.JsonLines.append
    second = threading.Thread(target=lambda: EventLog(tmp_path).event("alarm", 2, 2))

    def slow(lines: fs.JsonLines, data: bytes) -> None:
        if threading.current_thread() is not second:
            second.start()
            second.join(timeout=0.3)  # time enough to write over us, if nothing held it back
        append(lines, data)

    log = EventLog(tmp_path)
    monkeypatch.setattr(fs.JsonLines, "append", slow)
    log.event("alarm", 1, 1)
    second.join()
    assert [event.step for event in read_events(tmp_path)] == [1, 2]


@pytest.mark.parametrize("kind", get_args(EventKind))
def test_contract_every_kind_has_words_and_one_console_line(
    kind: EventKind, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """contract: closed list of kinds, each told once."""
    with caplog.at_level(logging.INFO, logger="aftershock.guard"):
        EventLog(tmp_path).event(kind, 3, 4, reason="why")
    assert [record.getMessage() for record in caplog.records] == [f"step 3, batch 4: {KINDS[kind]}: why"]
    assert caplog.records[0].levelno == (logging.INFO if kind in CALM else logging.WARNING)
    assert list(KINDS) == list(get_args(EventKind))


def test_contract_console_line_is_short() -> None:
    """contract: a long list stays in the file."""
    text = sentence("alarm", 1, 2, {"ids": list(range(1000)), "loss": 1 / 3})
    assert len(text) < 250
    assert text.endswith("..., loss 0.3333)")


def test_planted_unknown_kind_and_data_are_refused(tmp_path: Path) -> None:
    """planted: what was got and what there is; nothing is written."""
    log = EventLog(tmp_path)
    with pytest.raises(ValueError, match="'rewnd' unknown.*rewind"):
        log.event(cast(EventKind, "rewnd"), 1, 1)
    with pytest.raises(ValueError, match="event skip.thing: object cannot be stored"):
        log.event("skip", 1, 1, thing=object())
    assert read_events(tmp_path) == []


def test_contract_mirrors_get_each_event_once(tmp_path: Path) -> None:
    """contract: a tracker's callable gets a flat mapping, a run folder's writer an event of its own."""
    seen: list[Mapping[str, Any]] = []
    with RunWriter.open(tmp_path / "run", config={}) as writer:
        log = EventLog(tmp_path / "run" / "guard", mirror=seen.append, writer=writer)
        log.event("scale_lr", 5, 6, factor=0.5)
    assert seen == [{"kind": "scale_lr", "step": 5, "batch_id": 6, "factor": 0.5}]
    (event,) = RunReader(tmp_path / "run").events()
    assert (event.kind, event.step, event.data) == ("guard/scale_lr", 5, {"batch_id": 6, "factor": 0.5})
    assert len(read_events(tmp_path / "run" / "guard")) == 1


def test_planted_broken_tracker_never_reaches_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """planted: a tracker that raises, said once; the file has every event."""

    def broken(_: Mapping[str, Any]) -> None:
        raise RuntimeError("no network")

    log = EventLog(tmp_path, mirror=broken)
    for step in range(3):
        log.event("skip", step, step)
    assert len(read_events(tmp_path)) == 3
    assert sum("no network" in record.getMessage() for record in caplog.records) == 1


def test_planted_full_disk_holds_events_back_and_loses_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """planted: no space for two events, then space again; order and number are kept."""
    log = EventLog(tmp_path)
    log.event("skip", 0, 0)

    def full(_: fs.JsonLines, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(fs.JsonLines, "append", full)
        log.event("skip", 1, 1)
        log.event("skip", 2, 2)
        with pytest.raises(OSError, match="no room left"):
            log.flush()
    assert [event.step for event in read_events(tmp_path)] == [0]
    log.event("skip", 3, 3)
    assert [event.step for event in read_events(tmp_path)] == [0, 1, 2, 3]
    assert sum("wait in memory" in record.getMessage() for record in caplog.records) == 1


def test_contract_other_ranks_write_and_say_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """contract: they still check what they are given."""
    seen: list[Mapping[str, Any]] = []
    log = EventLog(tmp_path, mirror=seen.append, primary=False)
    log.event("skip", 1, 1)
    assert (seen, list(tmp_path.iterdir()), caplog.records) == ([], [], [])
    with pytest.raises(ValueError, match="unknown"):
        log.event(cast(EventKind, "nothing"), 1, 1)


def test_contract_without_a_folder_the_console_still_speaks(caplog: pytest.LogCaptureFixture) -> None:
    """contract: no file, nothing hidden."""
    EventLog(None).event("skip", 1, 2, reason="loss spike")
    assert [record.getMessage() for record in caplog.records] == [
        "step 1, batch 2: this step was not taken: loss spike"
    ]


def test_planted_folder_of_a_live_run_is_refused(tmp_path: Path) -> None:
    """planted: both would write events.jsonl; a place below it is fine, and so is the folder once the run is over."""
    with RunWriter.open(tmp_path, config={}) as run:
        with pytest.raises(ValueError, match="a folder of its own"):
            EventLog(tmp_path)
        EventLog(tmp_path / "guard").event("skip", 1, 1)
        run.close("finished", {})
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="choose another place"):
        EventLog(tmp_path / "file")


def test_planted_foreign_or_newer_file_is_named(tmp_path: Path) -> None:
    """planted: a run folder's events, and those of a later layout."""
    assert read_events(tmp_path) == []
    (tmp_path / fs.EVENTS).write_text('{"schema": 1, "kind": "diverged", "step": 3}\n')
    with pytest.raises(ValueError, match="lacks batch_id, time, data"):
        read_events(tmp_path)
    (tmp_path / fs.EVENTS).write_text('{"schema": 99}\n')
    with pytest.raises(ValueError, match="newer aftershock"):
        read_events(tmp_path)
