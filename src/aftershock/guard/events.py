"""The guard's events: one line of JSON for each thing it saw or did, on the disk before the next step is taken.

    {"schema": 1, "time": 1.7e9, "kind": "skip", "step": 812, "batch_id": 815, "data": {"reason": "loss spike"}}

Also one line on the console (`logging.getLogger("aftershock.guard")`) and a call to the user's tracker. Nothing is
written per step. Must not import the guard, the recorder or a policy.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from aftershock.config import nearest
from aftershock.store import folder as fs

if TYPE_CHECKING:
    from aftershock.store.writer import RunWriter

EventKind = Literal[
    "attached",
    "resumed",
    "skip",
    "skip_list",
    "scale_lr",
    "rewind",
    "stop",
    "nonfinite",
    "alarm",
    "policy",
    "snapshot_refused",
    "incident",
    "recovered",
    "recurred",
    "disagreement",
    "audit",
    "audited",
    "not_saved",
    "dry_run_skip",
    "dry_run_scale_lr",
    "dry_run_rewind",
    "dry_run_stop",
    "dry_run_policy",
]

KINDS: dict[EventKind, str] = {
    "attached": "the guard watches this run",
    "resumed": "the run goes on",
    "skip": "this step was not taken",
    "skip_list": "batches of the skip list are left out",
    "scale_lr": "learning rates are scaled",
    "rewind": "the run went back to an earlier state",
    "stop": "the run is stopped",
    "nonfinite": "loss or gradient is not finite",
    "alarm": "a signal left its normal range; nothing was done",
    "policy": "the policy changed something",
    "snapshot_refused": "no snapshot was taken: the state is not finite",
    "incident": "an incident is recorded",
    "recovered": "the run has recovered",
    "recurred": "the trouble came back",
    "disagreement": "the ranks do not agree",
    "audit": "the resumed run is not the one that was saved",
    "audited": "the resumed run does what the saved one did",
    "not_saved": "a snapshot could not be written to disk",
    "dry_run_skip": "would not have taken this step",
    "dry_run_scale_lr": "would have scaled the learning rates",
    "dry_run_rewind": "would have gone back to an earlier state",
    "dry_run_stop": "would have stopped the run",
    "dry_run_policy": "would have changed something",
}
"""Every kind there is, in the words of its console line."""

CALM: frozenset[EventKind] = frozenset({"attached", "resumed", "recovered", "skip_list", "audited"})
"""Kinds that are no trouble: logged as INFO, all others as WARNING."""

CONSOLE_CHARS = 120
"""Longest value on the console; the file has all of it."""

_log = logging.getLogger("aftershock.guard")


class Event(NamedTuple):
    """One line of events.jsonl. `step` counts accepted optimizer steps; `time` is in seconds since 1970."""

    kind: EventKind
    step: int
    batch_id: int
    time: float
    data: dict[str, Any]


class EventLog:
    """Appends events to `folder`/events.jsonl, and tells the console and the user's tracker.

    - `folder`: made when missing; None keeps no file
    - `mirror`: called with one flat mapping an event (kind, step, batch_id and the data), as in `wandb.log`
    - `writer`: a run folder's writer, whose events.jsonl gets the same events under the name `guard/<kind>`
    - `primary`: False on all ranks but one: they write and say nothing

    Each append opens, locks and syncs the file, so a kill -9 loses no event, nothing needs closing, and several logs
    of one folder do not harm each other. A full disk or a failing tracker never reaches training: the console says so
    once, and the lines wait in memory for the next event or `flush`.
    Raises ValueError when `folder` is a run folder that a writer holds now: it has an events.jsonl of its own.

    Example:
        log = EventLog(Path("runs/a/guard"))
        log.event("skip", 812, 815, reason="loss spike")
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        mirror: Callable[[Mapping[str, Any]], object] | None = None,
        writer: RunWriter | None = None,
        primary: bool = True,
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self._mirrors: dict[str, Callable[[Mapping[str, Any]], object]] = {}
        if mirror is not None:
            self._mirrors["tracker"] = mirror
        if writer is not None:
            self._mirrors["run folder"] = _to_writer(writer)
        self._primary = primary
        self._waiting: list[bytes] = []
        self._failed: set[str] = set()
        self.count = 0
        """Events in the file, those of earlier processes included; those that wait for room too."""
        if self.folder is None or not primary:
            return
        if (self.folder / fs.CONFIG).exists() and fs.is_locked(self.folder):
            raise ValueError(f"{self.folder} is a run being written; give the guard a folder of its own inside it")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _locked(self.folder / fs.EVENTS) as lines:
                lines.sync()
            self.count = (self.folder / fs.EVENTS).read_bytes().count(b"\n")
        except (PermissionError, NotADirectoryError, FileExistsError, IsADirectoryError) as error:
            raise ValueError(f"{self.folder}: cannot hold events ({error.strerror}); choose another place") from None

    def event(self, kind: EventKind, step: int, batch_id: int, **data: Any) -> None:
        """Record that something happened; on the disk when this returns. `data`: numbers, text, lists, mappings.

        Raises ValueError on a kind that does not exist and on data that JSON cannot hold.
        """
        if kind not in KINDS:
            raise ValueError(f"event kind {kind!r} unknown{nearest(kind, KINDS)}")
        stored = fs.plain(data, f"event {kind}")
        if not self._primary:
            return
        record = {"schema": fs.SCHEMA, "time": time.time(), "kind": kind, "step": int(step), "batch_id": int(batch_id)}
        self.count += 1
        if self.folder is not None:
            self._waiting.append((fs.to_json(record | {"data": stored}) + "\n").encode())
            self._append()
        _log.log(logging.INFO if kind in CALM else logging.WARNING, "%s", sentence(kind, step, batch_id, data))
        flat = {"kind": kind, "step": int(step), "batch_id": int(batch_id)} | data
        for name, mirror in self._mirrors.items():
            self._tell(name, mirror, flat)

    def flush(self) -> None:
        """Write the lines that a full disk held back. Raises OSError when there still is no room."""
        if self._waiting:
            assert self.folder is not None
            with fs.disk_errors(self.folder):
                self._write()

    def _append(self) -> None:
        try:
            self.flush()
            self._failed.discard("disk")
        except OSError as error:
            if "disk" not in self._failed:
                _log.error("events wait in memory until they can be written: %s", error)
            self._failed.add("disk")

    def _write(self) -> None:
        assert self.folder is not None
        with _locked(self.folder / fs.EVENTS) as lines:
            lines.append(b"".join(self._waiting))
            self._waiting.clear()
            lines.sync()

    def _tell(self, name: str, mirror: Callable[[Mapping[str, Any]], object], flat: Mapping[str, Any]) -> None:
        try:
            mirror(flat)
        except Exception as error:  # a tracker may raise anything; training must not see it
            if name not in self._failed:
                _log.error("the %s took no event, further errors are not shown: %r", name, error)
            self._failed.add(name)


def sentence(kind: EventKind, step: int, batch_id: int, data: Mapping[str, Any]) -> str:
    """The console's line.

    >>> sentence("skip", 812, 815, {"reason": "loss spike", "loss": 9.25})
    'step 812, batch 815: this step was not taken: loss spike (loss 9.25)'
    """
    reason = f": {data['reason']}" if data.get("reason") else ""
    rest = ", ".join(f"{name} {_short(value)}" for name, value in data.items() if name != "reason")
    return f"step {step}, batch {batch_id}: {KINDS[kind]}{reason}" + (f" ({rest})" if rest else "")


def read_events(folder: Path) -> list[Event]:
    """All events of a guard's folder, oldest first; none when it has no file yet. A line being written is left out.

    Raises ValueError when the file is not one of the guard's, or a newer aftershock wrote it.
    """
    path = Path(folder) / fs.EVENTS
    if not path.exists():
        return []
    events = []
    for record in fs.read_lines(path.read_bytes(), str(path)):
        fs.check_schema(record.get("schema"), str(path))
        missing = [name for name in ("kind", "step", "batch_id", "time", "data") if name not in record]
        if missing:
            raise ValueError(
                f"{path}: an event lacks {', '.join(missing)}; a run folder's events are read by RunReader"
            )
        data = fs.unspell(record["data"])
        events.append(Event(record["kind"], record["step"], record["batch_id"], record["time"], data))
    return events


def standing(events: Iterable[Event]) -> list[Event]:
    """The events of the run as it stands: what a killed process did after its last snapshot was done again, or undone.

    A "resumed" event tells how many `events` the snapshot it goes on from knew of; what came between is left out.
    """
    kept: list[tuple[int, Event]] = []
    for number, event in enumerate(events):
        known = event.data.get("events") if event.kind == "resumed" else None
        if known is not None:
            kept = [one for one in kept if one[0] < known]
        kept.append((number, event))
    return [event for _, event in kept]


def _to_writer(writer: RunWriter) -> Callable[[Mapping[str, Any]], object]:
    def tell(flat: Mapping[str, Any]) -> None:
        data = {name: value for name, value in flat.items() if name not in ("kind", "step")}
        writer.event(f"guard/{flat['kind']}", flat["step"], **data)

    return tell


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[fs.JsonLines]:
    """The file for one append. The lock is the kernel's: it goes with the process, and is held for an instant."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        lines = fs.JsonLines(path)
        try:
            yield lines
        finally:
            lines.close()
    finally:
        os.close(fd)


def _short(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= CONSOLE_CHARS else text[: CONSOLE_CHARS - 3] + "..."
