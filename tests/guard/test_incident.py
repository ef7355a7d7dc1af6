"""Incidents on disk: what a person and a replay find there, and what a killed or starved process leaves."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aftershock.guard.disk import restore_from
from aftershock.guard.events import Event
from aftershock.guard.incident import IncidentFile, Point, Row, fingerprint, read_incident, read_incidents
from aftershock.guard.recorder import FlightRecorder
from aftershock.guard.state import StepRow, Training
from aftershock.guard.surroundings import surroundings
from aftershock.signals.detect.combine import Moved
from aftershock.store import folder as fs

MOVED = (Moved("loss", "spike", 12, 13), Moved("update_norm", "spike", 11, 12))
MEASURED = ("loss", "gradient", "update")


class Letters:
    """A tokenizer: 0 is a, 1 is b."""

    def decode(self, ids: Sequence[int]) -> str:
        if 25 in ids:
            raise KeyError("no such token")
        return "".join(chr(ord("a") + i) for i in ids)


def batch_of(batch_id: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch_id)
    return {"input_ids": torch.randint(0, 20, (3, 6), generator=generator)}


def recorded(steps: int = 14) -> FlightRecorder:
    """A run of `steps` steps that spikes at step 12, with snapshots each 5 steps; batch ids run 100 ahead."""
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    training = Training(model, torch.optim.AdamW(model.parameters()))
    recorder = FlightRecorder(training, slots=4, every=5)
    for step in range(steps):
        if recorder.due(step):
            recorder.take(step, 100 + step)
        go_on(recorder, step, 9.0 + step if step >= 12 else 2.0 + 0.001 * step)
        with torch.no_grad():
            model.weight += 1.0
    return recorder


def go_on(recorder: FlightRecorder, step: int, loss: float, batch_id: int | None = None) -> None:
    batch_id = 100 + step if batch_id is None else batch_id
    recorder.keep_batch(batch_id, batch_of(batch_id))
    recorder.note(StepRow(step=step, batch_id=batch_id, loss=loss, grad_norm=0.5, lr=0.1))


def action(kind: Any, step: int, **data: Any) -> Event:
    return Event(kind, step, 100 + step, 1.5, data)


def test_round_trip_of_everything_known(tmp_path: Path) -> None:
    """round trip: what was seen, done and became of it; losses keep their bits, NaN included."""
    recorder = recorded()
    recorder.take(13, 113)  # after the onset: no place to start from
    code = fingerprint("loss = 1", config={"lr": 0.1})
    files = IncidentFile(tmp_path, recorder, tensors=recorder.training.params.values(), code=code)
    folder = files.open("spike", at=Point(13, 113), moved=MOVED, measured=MEASURED)
    assert folder == tmp_path / "incidents" / "13-spike"
    assert read_incident(folder).status == "open"
    files.did(action("skip", 13, reason="loss spike"))
    go_on(recorder, 13, math.nan, 114)
    go_on(recorder, 14, 1 / 3, 115)
    files.close("recovered", Point(14, 115))

    incident = read_incident(folder)
    assert [m.signal for m in incident.moved] == ["update_norm", "loss"]
    assert incident.cause == "rate_or_state_fault"
    assert (incident.status, incident.at, incident.onset) == ("recovered", Point(13, 113), Point(11, 111))
    assert incident.end == Point(14, 115)
    assert incident.peak is not None
    assert incident.peak.batch_id == 114
    assert math.isnan(incident.peak.loss)
    assert incident.actions == (action("skip", 13, reason="loss spike"),)
    assert incident.start == Point(10, 110)
    assert incident.fingerprint == code
    assert incident.surroundings == surroundings(recorder.training.params.values())
    assert incident.surroundings["threads"] == torch.get_num_threads()
    assert [row.batch_id for row in incident.rows] == [*range(100, 116)]
    assert incident.rows[-1].loss == 1 / 3
    assert [(row.step, row.batch_id) for row in incident.trained] == [
        (10, 110),
        (11, 111),
        (12, 112),
        (13, 114),
        (14, 115),
    ]


def test_round_trip_of_the_snapshot_and_the_batches(tmp_path: Path) -> None:
    """round trip: a replay starts from the state before the onset, bit for bit, on the same batches."""
    recorder = recorded()
    folder = IncidentFile(tmp_path, recorder).open("spike", at=Point(13, 113), moved=MOVED, measured=MEASURED)
    incident = read_incident(folder)
    assert incident.snapshot is not None
    weight = recorder.training.params["weight"]
    live = weight.detach().clone()
    kept = restore_from(incident.snapshot, recorder.training, rng=True)
    assert kept.step == 10
    assert torch.equal(weight, live - 4.0)  # four steps of +1 since step 10: exact in float32
    assert incident.batch_ids == (110, 111, 112, 113)
    assert torch.equal(incident.batch(112)["input_ids"], batch_of(112)["input_ids"])
    with pytest.raises(ValueError, match="no copy of batch 99 .there are 110, 111, 112, 113"):
        incident.batch(99)


def test_contract_a_step_not_taken_is_in_the_signals(tmp_path: Path) -> None:
    """contract: the log has taken steps only; what the actions saw fills in the rest, each step once."""
    recorder = recorded(12)
    files = IncidentFile(tmp_path, recorder)
    folder = files.open("skip", at=Point(12, 112), moved=(), measured=MEASURED)
    files.did(action("nonfinite", 12, loss=math.inf, grad_norm=math.nan, update_norm=math.nan))
    files.did(action("skip", 12, loss=math.inf, grad_norm=math.nan, update_norm=math.nan, reason="not finite"))
    go_on(recorder, 12, 30.0, 113)
    files.did(Event("alarm", 12, 113, 1.5, {"loss": 30.0, "grad_norm": 0.5, "update_norm": 0.25}))
    files.did(Event("alarm", 13, 114, 1.5, {"loss": 4.0, "grad_norm": 0.5, "update_norm": 0.75}))
    go_on(recorder, 13, 4.0, 114)  # judged late: its row comes after the event
    files.close("recovered", Point(14, 115))
    incident = read_incident(folder)
    last = [(r.step, r.batch_id, r.loss, r.update_norm, r.taken) for r in incident.rows[-3:]]
    assert repr(last) == repr(
        [(12, 112, math.inf, math.nan, False), (12, 113, 30.0, 0.25, True), (13, 114, 4.0, 0.75, True)]
    )
    assert incident.peak is not None
    assert incident.peak.loss == math.inf
    assert [row.batch_id for row in incident.trained] == [110, 111, 113, 114]
    assert "Steps whose loss was not finite: 1." in (folder / "incident.md").read_text()


def test_contract_the_path_before_a_rewind_is_what_a_replay_repeats(tmp_path: Path) -> None:
    """contract: rows after a rewind belong to another path."""
    recorder = recorded()
    files = IncidentFile(tmp_path, recorder)
    folder = files.open("spike", at=Point(13, 113), moved=MOVED, measured=MEASURED)
    files.did(action("rewind", 13, to_step=10, reason="still spiking"))
    for step in (10, 11):
        go_on(recorder, step, 2.0, 110 + step)
    files.close("stopped", Point(12, 122))
    incident = read_incident(folder)
    assert [row.batch_id for row in incident.trained] == [110, 111, 112, 113]
    assert [row.batch_id for row in incident.rows][-3:] == [113, 120, 121]


def test_contract_signals_that_move_later_count_too(tmp_path: Path) -> None:
    """contract: the gradient moves a step later; known signals keep their onset, and the cause is named anew."""
    recorder = recorded()
    files = IncidentFile(tmp_path, recorder)
    files.also_moved(MOVED)  # none is open: nothing
    folder = files.open("spike", at=Point(12, 112), moved=MOVED[:1], measured=MEASURED)
    assert read_incident(folder).cause == "unknown"
    files.also_moved([Moved("update_norm", "spike", 12, 12), Moved("loss", "spike", 14, 14)])
    files.also_moved([Moved("grad_norm", "spike", 12, 12)])
    files.close("recovered", Point(20, 121))
    incident = read_incident(folder)
    assert incident.moved == (
        Moved("grad_norm", "spike", 12, 12),
        Moved("loss", "spike", 12, 14),
        Moved("update_norm", "spike", 12, 12),
    )
    assert incident.cause == "data_or_hardware"


def test_contract_rows_are_added_once(tmp_path: Path) -> None:
    """contract: extending twice adds nothing twice, and a ring that has rolled over adds what it has."""
    recorder = recorded()
    files = IncidentFile(tmp_path, recorder)
    folder = files.open("spike", at=Point(13, 113), moved=MOVED, measured=MEASURED)
    files.extend()
    for step in range(14, 14 + 512):
        go_on(recorder, step, math.nan)
    files.extend()
    files.extend()
    rows = read_incident(folder).rows
    assert [row.step for row in rows] == [*range(14 + 512)]
    with (folder / "signals.csv").open() as file:
        assert next(csv.reader(file)) == list(Row._fields)


def test_contract_worst_rows_come_with_their_text(tmp_path: Path) -> None:
    """contract: first tokens of each row, worst row first, NaN worst of all; undecodable rows say so."""
    recorder = recorded()
    bad = torch.tensor([[0, 1, 2], [25, 0, 0], [3, 4, -100]])
    recorder.keep_batch(113, (bad, "web"))
    files = IncidentFile(tmp_path, recorder, decoder=Letters(), num_tokens=2)
    losses = {113: [1.0, 7.5, math.nan]}
    folder = files.open("spike", at=Point(13, 113), moved=MOVED, measured=MEASURED, row_losses=losses)
    record = json.loads((folder / "batches.json").read_text(), parse_constant=pytest.fail)
    entry = record["batches"]["113"]
    assert [row["row"] for row in entry["worst_rows"]] == [2, 1, 0]
    assert [(row["row"], row.get("text")) for row in entry["texts"]] == [(2, "de"), (1, None), (0, "ab")]
    assert "no such token" in entry["texts"][1]["error"]
    assert record["batches"]["112"]["texts"][0]["text"] == Letters().decode(batch_of(112)["input_ids"][0, :2].tolist())


def test_contract_only_the_newest_keep_their_snapshots(tmp_path: Path) -> None:
    """contract: bounded disk use; records, signals and pages of all stay, and say that the snapshot had to go."""
    recorder = recorded()
    files = IncidentFile(tmp_path, recorder, keep=2)
    folders = [files.open("spike", at=Point(13, 113), moved=MOVED, measured=MEASURED) for _ in range(4)]
    assert [folder.name for folder in folders] == ["13-spike", "13-spike-2", "13-spike-3", "13-spike-4"]
    incidents = read_incidents(tmp_path)
    assert [incident.folder for incident in incidents] == folders
    assert [incident.snapshot is not None for incident in incidents] == [False, False, True, True]
    assert [(folder / "batches.safetensors").exists() for folder in folders] == [False, False, True, True]
    assert [incident.status for incident in incidents] == ["recurred", "recurred", "recurred", "open"]
    assert all(len(incident.rows) == 14 for incident in incidents)
    assert "make room" in (folders[0] / "incident.md").read_text()
    with pytest.raises(ValueError, match="no copy of batch"):
        incidents[0].batch(112)


def test_contract_the_page_reads_at_night(tmp_path: Path) -> None:
    """contract: what happened, was done, came of it and is to do, in order; its Python works as it stands."""
    recorder = recorded()
    files = IncidentFile(tmp_path, recorder)
    folder = files.open("spike", at=Point(13, 113), moved=MOVED, measured=MEASURED)
    assert "Nothing yet." in (folder / "incident.md").read_text()
    files.did(action("skip", 13, reason="loss spike"))
    files.close("recovered", Point(20, 121))
    page = (folder / "incident.md").read_text()
    assert page.isascii()
    parts = [
        "# spike at step 13, batch 113",
        "The run has recovered (step 20, 8 batches later).",
        "It began at step 11 (batch 111).",
        "the loss was 2.005 (median of 11 steps)",
        "At its worst, step 13 (batch 113), the loss was 22",
        "1. step 11: `update_norm` (spike)",
        "2. step 12: `loss` (spike)",
        "learning rate or optimizer state",
        "step 13, batch 113: this step was not taken: loss spike",
        "Nothing is urgent",
    ]
    places = [page.find(part) for part in parts]
    assert -1 not in places, [part for part in parts if part not in page]
    assert places == sorted(places)
    code = page.split("```python\n")[1].split("```")[0].replace("print(", "shown = (")
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["incident"].cause == "rate_or_state_fault"
    assert torch.equal(names["batch"]["input_ids"], batch_of(113)["input_ids"])


def test_planted_killed_process_leaves_a_readable_incident(tmp_path: Path) -> None:
    """planted: the record is there, the rest is not; the next process says that the outcome is unknown."""
    recorder = recorded()
    folder = IncidentFile(tmp_path, recorder).open("spike", at=Point(13, 113), moved=MOVED, measured=MEASURED)
    for name in ("signals.csv", "batches.json", "batches.safetensors", "incident.md"):
        (folder / name).unlink()
    (folder / "incident.json.99.tmp").write_text("{")
    (tmp_path / "incidents" / "20-spike").mkdir()  # killed before its record
    IncidentFile(tmp_path, recorder)
    (incident,) = read_incidents(tmp_path)
    assert (incident.status, incident.rows, incident.batch_ids) == ("interrupted", (), ())
    assert "ended before the outcome" in (folder / "incident.md").read_text()
    assert not list(folder.glob("*.tmp"))


def test_planted_full_disk_never_reaches_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """planted: no room at all; it is said, and once there is room the record is whole."""
    recorder = recorded()
    files = IncidentFile(tmp_path, recorder)

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(fs, "atomic_write", full)
        folder = files.open("spike", at=Point(13, 113), moved=MOVED, measured=MEASURED)
    assert any("no room left" in record.getMessage() for record in caplog.records)
    files.close("recovered", Point(14, 114))
    assert read_incident(folder).status == "recovered"


def test_contract_other_ranks_take_the_same_names_and_write_no_record(tmp_path: Path) -> None:
    """contract: their part of the snapshot only."""
    recorder = recorded()
    first, second = IncidentFile(tmp_path, recorder), IncidentFile(tmp_path / "b", recorder, primary=False)
    here = first.open("spike", at=Point(13, 113), moved=MOVED, measured=MEASURED)
    there = second.open("spike", at=Point(13, 113), moved=MOVED, measured=MEASURED)
    second.close("recovered", Point(14, 114))
    assert there.name == here.name
    assert [path.name for path in there.iterdir()] == ["snapshot"]


def test_contract_without_a_healthy_snapshot_the_rest_is_kept(tmp_path: Path) -> None:
    """contract: nothing to replay from, and the page says so."""
    recorder = recorded()
    recorder.distrust(0)
    folder = IncidentFile(tmp_path, recorder).open("nonfinite", at=Point(13, 113), moved=(), measured=MEASURED)
    incident = read_incident(folder)
    assert (incident.start, incident.snapshot, incident.trained, incident.cause) == (None, None, (), "unknown")
    assert incident.batch_ids == (113,)
    assert "no snapshot" in (folder / "incident.md").read_text()


def test_planted_bad_calls_are_refused(tmp_path: Path) -> None:
    """planted: each says what to do."""
    recorder = recorded()
    with pytest.raises(ValueError, match="keep must be at least 1"):
        IncidentFile(tmp_path, recorder, keep=0)
    with pytest.raises(ValueError, match="num_tokens must be at least 1"):
        IncidentFile(tmp_path, recorder, num_tokens=0)
    files = IncidentFile(tmp_path, recorder)
    with pytest.raises(ValueError, match="one lower-case word"):
        files.open("../x", at=Point(1, 1), moved=(), measured=())
    with pytest.raises(ValueError, match="no incident is open"):
        files.close("recovered", Point(1, 1))
    with pytest.raises(ValueError, match="'open' is not one of"):
        files.close("open", Point(1, 1))
    with pytest.raises(ValueError, match=r"holds no incident.json"):
        read_incident(tmp_path)
