"""What is known of one incident, as a value, and the files it is read from.

    incidents/<step>-<kind>/
      incident.md  incident.json  signals.csv  batches.json  batches.safetensors  snapshot/

Must not import the guard, the recorder or a policy.
"""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from aftershock.guard import batchfile
from aftershock.guard.events import Event
from aftershock.signals.detect.combine import Cause, Moved
from aftershock.store import folder as fs

FOLDER = "incidents"
RECORD, SIGNALS, BATCHES, TENSORS, SNAPSHOT, PAGE = (
    "incident.json",
    "signals.csv",
    "batches.json",
    "batches.safetensors",
    "snapshot",
    "incident.md",
)

Status = Literal["open", "recovered", "recurred", "stopped", "interrupted"]
"""open: going on; recurred: it came back at the same place; interrupted: the process ended before the outcome."""


class Row(NamedTuple):
    """One judged step: `step` accepted steps before it, and its numbers; nan where one was not measured.

    `batch_id` is that of its first batch: with accumulation the step's others come before the next row's.
    `taken` is False where the optimizer did not step.
    """

    step: int
    batch_id: int
    loss: float
    grad_norm: float = math.nan
    update_norm: float = math.nan
    lr: float = math.nan
    taken: bool = True


class Point(NamedTuple):
    """A moment of the run on both clocks."""

    step: int
    batch_id: int


class Incident(NamedTuple):
    """All that is known of one incident; `actions` are what was done, in order, `moved` the signals by onset.

    `start` is where the kept snapshot stands, None where none was kept or it had to make room: see `snapshot`.
    `fingerprint` is what the user gave to tell later whether code or config have changed.
    """

    folder: Path
    number: int
    kind: str
    status: Status
    at: Point
    onset: Point
    peak: Row | None
    end: Point | None
    moved: tuple[Moved, ...]
    cause: Cause
    actions: tuple[Event, ...]
    start: Point | None
    surroundings: dict[str, Any]
    fingerprint: dict[str, Any]
    rows: tuple[Row, ...] = ()

    @property
    def snapshot(self) -> Path | None:
        """The folder of the snapshot to replay from, None where there is none."""
        path = self.folder / SNAPSHOT
        return path if self.start is not None and path.is_dir() else None

    @property
    def batch_ids(self) -> tuple[int, ...]:
        """Ids of the batches whose copies are here."""
        return tuple(int(name) for name, entry in _batches(self.folder).items() if "tree" in entry)

    @property
    def trained(self) -> tuple[Row, ...]:
        """The steps taken from the snapshot on until something else was done than taking steps, in order.

        A skipped step is none of them; the first rewind ends them, since what follows starts from another state.
        """
        if self.start is None:
            return ()
        found: list[Row] = []
        for row in self.rows:
            if not row.taken or row.batch_id < self.start.batch_id or row.step < self.start.step:
                continue
            if found and row.step <= found[-1].step:
                break
            found.append(row)
        return tuple(found)

    def batch(self, batch_id: int) -> Any:
        """The copy of a batch, as the loader gave it. Raises ValueError when it was not kept."""
        entry = _batches(self.folder).get(str(batch_id), {})
        path = self.folder / TENSORS
        if "tree" not in entry or not path.exists():
            raise ValueError(
                f"{self.folder}: no copy of batch {batch_id} (there are {_listed(self.batch_ids)}); "
                "take it from the data by its id"
            )
        return batchfile.unpack(entry["tree"], batchfile.load_tensors(path))


def read_incident(folder: Path) -> Incident:
    """One incident's folder. Raises ValueError when it holds none, or a newer aftershock wrote it."""
    path = Path(folder)
    if not (path / RECORD).exists():
        raise ValueError(f"{path} holds no {RECORD}; give one of the folders below {FOLDER}/")
    record = json.loads((path / RECORD).read_bytes())
    fs.check_schema(record.get("schema"), str(path / RECORD))
    data = fs.unspell(record)
    rows = _rows(path / SIGNALS)
    return Incident(
        folder=path,
        number=data["number"],
        kind=data["kind"],
        status=data["status"],
        at=Point(**data["at"]),
        onset=Point(**data["onset"]),
        peak=None if data["peak"] is None else Row(**data["peak"]),
        end=None if data["end"] is None else Point(**data["end"]),
        moved=tuple(Moved(**m) for m in data["moved"]),
        cause=data["cause"],
        actions=tuple(Event(**e) for e in data["actions"]),
        start=None if data["start"] is None else Point(**data["start"]),
        surroundings=data["surroundings"],
        fingerprint=data["fingerprint"],
        rows=rows,
    )


def read_incidents(folder: Path) -> list[Incident]:
    """All incidents below a guard's folder, oldest first. A folder left without record by a killed process is none."""
    found = [read_incident(path.parent) for path in (Path(folder) / FOLDER).glob(f"*/{RECORD}")]
    return sorted(found, key=lambda incident: incident.number)


def to_record(incident: Incident) -> dict[str, Any]:
    """What incident.json holds: all but the rows, which are in signals.csv."""
    fields = incident._asdict() | {"schema": fs.SCHEMA, "written": time.time()}
    for name in ("folder", "rows"):
        del fields[name]
    for name in ("at", "onset", "peak", "end", "start"):
        fields[name] = None if fields[name] is None else fields[name]._asdict()
    fields["moved"] = [m._asdict() for m in incident.moved]
    fields["actions"] = [e._asdict() for e in incident.actions]
    return {"schema": fields.pop("schema"), **fields}


def to_table(rows: Sequence[Row]) -> str:
    """What signals.csv holds."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(Row._fields)
    writer.writerows([repr(value) for value in row] for row in rows)  # repr: the shortest text that reads back the same
    return out.getvalue()


def _rows(path: Path) -> tuple[Row, ...]:
    if not path.exists():
        return ()
    with path.open(newline="") as file:
        return tuple(
            Row(
                int(r["step"]),
                int(r["batch_id"]),
                *(float(r[name]) for name in Row._fields[2:-1]),
                taken=r["taken"] == "True",
            )
            for r in csv.DictReader(file)
        )


def _batches(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / BATCHES
    return json.loads(path.read_bytes())["batches"] if path.exists() else {}


def _listed(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids)) or "none"
