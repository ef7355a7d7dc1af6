"""Incidents on disk: one folder for each, from which a person learns what happened and a replay can start.

incident.json is written first and replaced whole each time more is known, so a killed process leaves a readable folder.
Must not import the guard or a policy.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from aftershock.guard import batchfile
from aftershock.guard.events import Event
from aftershock.guard.incidentpage import page
from aftershock.guard.incidentrecord import (
    BATCHES,
    FOLDER,
    PAGE,
    RECORD,
    SIGNALS,
    SNAPSHOT,
    TENSORS,
    Incident,
    Point,
    Row,
    Status,
    read_incident,
    read_incidents,
    to_record,
    to_table,
)
from aftershock.guard.surroundings import fingerprint, surroundings
from aftershock.signals.detect.combine import Moved, name_cause
from aftershock.signals.detect.roles import Role
from aftershock.store import folder as fs

if TYPE_CHECKING:
    from torch import Tensor

    from aftershock.guard.recorder import FlightRecorder

__all__ = ["Incident", "IncidentFile", "Point", "Row", "Status", "fingerprint", "read_incident", "read_incidents"]

_log = logging.getLogger("aftershock.guard")


class IncidentFile:
    """Writes the incidents of one guarded run below `folder`/incidents; at most one is open at a time.

    - `recorder`: where rows, batches and the snapshot come from
    - `tensors`: live ones, which tell the devices in use
    - `keep`: how many incidents, the newest, keep snapshot and batches; records and signals stay for ever
    - `decoder`: any tokenizer with `decode(ids)`; the first `num_tokens` of each row become readable
    - `code`: what `fingerprint(...)` gave

    - `primary`: False on all ranks but one: they save their part of the snapshot and write nothing else

    Every rank makes the same calls. A full disk never reaches training: the console says what could not be written.

    Example:
        files = IncidentFile(Path("runs/a/guard"), recorder)
        files.open("spike", at=Point(812, 815), moved=moved, measured={"loss", "gradient"})
        files.did(event)
        files.close("recovered", Point(820, 829))
    """

    def __init__(
        self,
        folder: Path,
        recorder: FlightRecorder,
        *,
        tensors: Iterable[Tensor] = (),
        keep: int = 3,
        decoder: batchfile.Decoder | None = None,
        num_tokens: int = 64,
        code: Mapping[str, Any] | None = None,
        primary: bool = True,
    ) -> None:
        if keep < 1:
            raise ValueError(f"incidents keep must be at least 1, got {keep}: a replay needs a snapshot to start from")
        if num_tokens < 1:
            raise ValueError(f"incidents num_tokens must be at least 1, got {num_tokens}")
        self.folder = Path(folder) / FOLDER
        self._recorder = recorder
        self._tensors = tuple(tensors)
        self._keep, self._decoder, self._num_tokens = keep, decoder, num_tokens
        self._code = dict(code or {})
        self._open: Incident | None = None
        self._last: Row | None = None
        self._measured: tuple[Role, ...] = ()
        self._primary = primary
        # Read once, here: later one rank could see what another has just made, and their names would differ.
        self._names = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        if not primary:
            return
        with self._survive("incidents"):
            self.folder.mkdir(parents=True, exist_ok=True)
            fs.clear_temporary(self.folder)
            for old in read_incidents(Path(folder)):
                if old.status == "open":
                    self._write(old._replace(status="interrupted"))

    @property
    def current(self) -> Incident | None:
        """The open incident."""
        return self._open

    def open(
        self,
        kind: str,
        *,
        at: Point,
        moved: Iterable[Moved],
        measured: Collection[Role],
        start: int | None = None,
        state: bool = True,
        row_losses: Mapping[int, Sequence[float]] | None = None,
    ) -> Path:
        """Begin an incident and write all that is known; returns its folder. Closes one that is still open as recurred.

        `at`: where it was noticed; `measured`: the roles that were watched, since what did not move counts only then;
        `start`: step of the snapshot that a replay is to begin from, by default the newest healthy one at or before the
        onset; `state`: whether to write that snapshot now (see `keep_state`); `row_losses`: losses by row, for batches
        by id.
        """
        if not re.fullmatch(r"[a-z0-9_]+", kind):
            raise ValueError(f"incident kind must be one lower-case word, got {kind!r}")
        if self._open is not None:
            self.close("recurred", at)
        first = _ordered(moved)
        self._measured = tuple(measured)
        rows = tuple(map(_row, self._recorder.rows))
        onset_step = min([m.onset for m in first] + [at.step])
        onset = _point(rows, onset_step, at)
        first_step = start if start is not None else self._start(onset_step)
        incident = Incident(
            folder=self._free_folder(f"{at.step}-{kind}"),
            number=1 + max((old.number for old in read_incidents(self.folder.parent)), default=0),
            kind=kind,
            status="open",
            at=at,
            onset=onset,
            peak=_peak(rows, onset),
            end=None,
            moved=first,
            cause=name_cause(first, measured),
            actions=(),
            start=None if first_step is None or not state else _point(rows, first_step, onset),
            surroundings=surroundings(self._tensors),
            fingerprint=self._code,
            rows=rows,
        )
        self._open, self._last = incident, rows[-1] if rows else None
        with self._survive(incident.folder.name):
            if self._primary:
                incident.folder.mkdir(parents=True, exist_ok=True)
            self._write(incident)
            self._keep_batches(incident, row_losses or {})
        self._save(incident)
        return incident.folder

    def keep_state(self) -> None:
        """Write the snapshot that a replay of the open incident begins from, and the batches since, unless done.

        To be called before the run goes back: that forgets the batches' order and the newer snapshots.
        """
        incident = self._open
        if incident is None or incident.start is not None:
            return
        rows = _joined(incident.rows, self._new_rows())
        onset = _point(rows, min([m.onset for m in incident.moved] + [incident.at.step]), incident.at)
        first_step = self._start(onset.step)
        start = None if first_step is None else _point(rows, first_step, onset)
        incident = self._open = incident._replace(rows=rows, onset=onset, start=start)
        with self._survive(incident.folder.name):
            self._keep_batches(incident, {})
        self._save(incident)

    def did(self, event: Event) -> None:
        """Add what was done to the open incident, on the disk when this returns; nothing where none is open.

        `loss`, `grad_norm` and `update_norm` in its data become a row: a step that was not taken is in no log.
        """
        if self._open is not None:
            rows = _with_action(_joined(self._open.rows, self._new_rows()), event)
            peak = _peak(rows, self._open.onset)
            self._open = self._open._replace(actions=(*self._open.actions, event), rows=rows, peak=peak)
            with self._survive(self._open.folder.name):
                self._write(self._open, rows_too=False)

    def also_moved(self, moved: Iterable[Moved]) -> None:
        """Add signals that moved since the open incident began, which may change its cause; written with what follows.

        A signal known already with the same verdict keeps its first onset. Nothing where none is open.
        """
        if self._open is None:
            return
        known = {(m.signal, m.kind): m for m in self._open.moved}
        for new in moved:
            old = known.get((new.signal, new.kind), new)
            known[new.signal, new.kind] = new._replace(onset=min(old.onset, new.onset), last=max(old.last, new.last))
        merged = _ordered(known.values())
        self._open = self._open._replace(moved=merged, cause=name_cause(merged, self._measured))

    def extend(self) -> None:
        """Add the rows since the last call, and judge the peak anew."""
        if self._open is None:
            return
        rows = _joined(self._open.rows, self._new_rows())
        self._open = self._open._replace(rows=rows, peak=_peak(rows, self._open.onset))
        with self._survive(self._open.folder.name):
            self._write(self._open)

    def close(self, status: Status, at: Point) -> None:
        """Say what came of the open incident. Raises ValueError when none is open, or `status` is no outcome."""
        if status not in get_args(Status) or status == "open":
            raise ValueError(f"incident outcome {status!r} is not one of recovered, recurred, stopped, interrupted")
        if self._open is None:
            raise ValueError("no incident is open; open one first")
        self._open = self._open._replace(status=status, end=at)
        self.extend()
        self._open = None

    def _start(self, onset: int) -> int | None:
        return max((step for step in self._recorder.healthy if step <= onset), default=None)

    def _save(self, incident: Incident) -> None:
        with self._survive(incident.folder.name):
            if incident.start is not None:  # by every rank, whatever went wrong above: shards are saved together
                # The batches lie beside it, once.
                self._recorder.save(incident.folder / SNAPSHOT, incident.start.step, keep=1, batches_from=math.inf)
        with self._survive(incident.folder.name):
            self._prune()
            self._write(incident)

    def _new_rows(self) -> tuple[Row, ...]:
        rows = list(map(_row, self._recorder.rows))
        marks = [i for i, row in enumerate(rows) if repr(row) == repr(self._last)]  # by text, so that nan equals nan
        new = rows[marks[-1] + 1 :] if marks else rows
        self._last = rows[-1] if rows else self._last
        return tuple(new)

    def _keep_batches(self, incident: Incident, row_losses: Mapping[int, Sequence[float]]) -> None:
        if not self._primary:
            return
        first = incident.onset.batch_id if incident.start is None else incident.start.batch_id
        seen = [row.batch_id for row in incident.rows] + list(self._recorder.batch_ids)
        ids = sorted({batch_id for batch_id in seen if batch_id >= first} | {incident.at.batch_id})
        entries: dict[str, dict[str, Any]] = {}
        tensors: dict[str, Tensor] = {}
        for batch_id in ids:
            entry = entries[str(batch_id)] = {}
            losses = row_losses.get(batch_id)
            if losses is not None:
                entry["worst_rows"] = batchfile.worst_rows(losses)
            if batch_id not in self._recorder.batch_ids:
                continue
            batch = self._recorder.batch(batch_id)
            packed = batchfile.pack(batch, str(batch_id))
            entry["tree"] = packed.tree
            tensors |= packed.tensors
            if self._decoder is not None:
                entry["texts"] = batchfile.texts(batch, self._decoder, num_tokens=self._num_tokens, losses=losses)
        if tensors:
            batchfile.save_tensors(incident.folder / TENSORS, tensors)
        record = {"schema": fs.SCHEMA, "batches": fs.plain(entries, "batches")}
        fs.atomic_write(incident.folder / BATCHES, (json.dumps(record, indent=1) + "\n").encode())

    def _free_folder(self, name: str) -> Path:
        numbered = [name, *(f"{name}-{i}" for i in range(2, len(self._names) + 3))]
        free = next(n for n in numbered if n not in self._names)
        self._names.add(free)
        return self.folder / free

    def _prune(self) -> None:
        if not self._primary:
            return
        for old in read_incidents(self.folder.parent)[: -self._keep]:
            if old.snapshot is not None or (old.folder / TENSORS).exists():
                shutil.rmtree(old.folder / SNAPSHOT, ignore_errors=True)
                (old.folder / TENSORS).unlink(missing_ok=True)
                self._write(old)

    def _write(self, incident: Incident, *, rows_too: bool = True) -> None:
        if not self._primary:
            return
        record = fs.plain(to_record(incident), "incident")
        fs.atomic_write(incident.folder / RECORD, (json.dumps(record, indent=1) + "\n").encode())
        if rows_too:
            fs.atomic_write(incident.folder / SIGNALS, to_table(incident.rows).encode())
        fs.atomic_write(incident.folder / PAGE, page(incident).encode())

    @contextlib.contextmanager
    def _survive(self, what: str) -> Iterator[None]:
        try:
            with fs.disk_errors(self.folder):
                yield
        except OSError as error:
            _log.error("%s could not be written whole: %s", what, error)


def _ordered(moved: Iterable[Moved]) -> tuple[Moved, ...]:
    return tuple(sorted(moved, key=lambda m: (m.onset, m.signal)))


def _row(row: Any) -> Row:
    numbers = row._asdict()
    return Row(**{name: numbers[name] for name in Row._fields if name in numbers})


def _joined(rows: tuple[Row, ...], new: Iterable[Row]) -> tuple[Row, ...]:
    """`rows` and then `new`; a step that an action has made a row of already is the same row."""
    found = list(rows)
    for row in new:
        places = [i for i, old in enumerate(found) if old[:2] == row[:2] and not old.taken]
        if places:
            update = found[places[-1]].update_norm
            found[places[-1]] = row._replace(update_norm=update) if math.isnan(row.update_norm) else row
        else:
            found.append(row)
    return tuple(found)


def _with_action(rows: tuple[Row, ...], event: Event) -> tuple[Row, ...]:
    """`rows` with what the event says of its step."""
    numbers = {name: float(event.data[name]) for name in ("loss", "grad_norm", "update_norm") if name in event.data}
    places = [i for i, row in enumerate(rows) if row[:2] == (event.step, event.batch_id)]
    if not places:
        return (*rows, Row(event.step, event.batch_id, taken=False, **numbers)) if "loss" in numbers else rows
    at = places[-1]
    row = rows[at]
    if math.isnan(row.update_norm) and "update_norm" in numbers:
        row = row._replace(update_norm=numbers["update_norm"])
    row = row._replace(taken=row.taken and event.kind != "skip")
    return (*rows[:at], row, *rows[at + 1 :])


def _point(rows: Sequence[Row], step: int, otherwise: Point) -> Point:
    """Where the run was when it last came to `step`; one that was skipped and tried again begins with the first try."""
    came = [i for i, row in enumerate(rows) if row.step == step and (i == 0 or rows[i - 1].step != step)]
    return Point(step, rows[came[-1]].batch_id) if came else Point(step, otherwise.batch_id)


def _peak(rows: Sequence[Row], onset: Point) -> Row | None:
    """The worst loss since the onset; one that is not a number is worse than any number."""
    since = [row for row in rows if row.batch_id >= onset.batch_id]
    return max(since, key=lambda r: math.inf if math.isnan(r.loss) else r.loss, default=None)
