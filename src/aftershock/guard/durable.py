"""A guarded run on disk: its snapshots with the guard's own state, and all of it back after the process died.

    <folder>/snapshots/snap-<serial>-step-<step>/    see `disk`
    <folder>/stopped.json                            the guard has ended the run, and why

A rewind counts once the snapshot after it is written: killed before, the run resumes from before the trouble and
decides the same again; killed later, it goes on behind the rewind with every count it had. Must not import the guard.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from aftershock.guard import shelf
from aftershock.guard.disk import Snapshot, read_snapshot, restore
from aftershock.guard.recorder import FlightRecorder
from aftershock.guard.state import Kept
from aftershock.guard.team import Team
from aftershock.guard.tree import encode, join, split
from aftershock.store import folder as fs

_log = logging.getLogger("aftershock.guard")
STOPPED = "stopped.json"
EVERY = 1000
"""Accepted steps between snapshots on disk where nothing else is said."""


class Loaded(NamedTuple):
    """What a run goes on from: the snapshot's `path`, the guard's `own` state, and its random numbers if they fit."""

    path: Path
    snapshot: Snapshot
    own: dict[str, Any]
    rng: bool


class Durable:
    """The snapshots of one run on disk. With several processes all of them make each call, on one file system.

    - `every`: accepted steps between snapshots; `keep`: how many steps keep theirs (see `shelf.rotate`)

    Example:
        durable = Durable(Path("runs/a/guard"), recorder, every=1000, keep=4)
        if durable.due(step):
            durable.save(Kept(step, batch_id), guard.state_dict(), held=False)
    """

    def __init__(self, folder: Path, recorder: FlightRecorder, *, every: int, keep: int) -> None:
        if every < 1 or keep < 2:
            raise ValueError(f"save_every={every}, keep={keep}: give at least 1 and 2, one to fall back on")
        self.folder, self._top = folder / fs.SNAPSHOTS, folder
        self._recorder, self._every, self._keep = recorder, every, keep
        self._newest = -1
        self._told = False

    def due(self, step: int) -> bool:
        """Whether a snapshot should be written at `step`."""
        return self._newest < 0 or step - self._newest >= self._every

    def is_new(self, step: int) -> bool:
        """Whether there is something to save since the last time."""
        return step != self._newest

    def save(self, at: Kept, own: Mapping[str, Any], *, held: bool) -> Path:
        """Write the run as it stands. `held`: the recorder has just taken it. Raises OSError on a full disk."""
        oldest = min(self._recorder.healthy, default=at.step)
        since = next((row.batch_id for row in self._recorder.rows if row.step >= oldest), at.batch_id)
        path = self._recorder.save_now(
            self.folder, at, self._writable(own), keep=self._keep, held=held, batches_from=since
        )
        self._newest = at.step
        return path

    def newest(self) -> Path | None:
        """The newest snapshot that is intact. Raises ValueError when there are some and none is."""
        return shelf.newest(self.folder)

    def load(self, path: Path) -> Loaded:
        """Make the run what it was in the snapshot at `path`, refill the ring from the older ones; the guard's own
        state is only given."""
        training = self._recorder.training
        rng = shelf.world_of(path) == Team(alone=False).size
        snapshot = read_snapshot(path, training)
        if snapshot.guard is None:
            raise ValueError(f"{path} was not saved by a guard's save_every; restore it with disk.restore_from")
        restore(snapshot, training, rng=rng)
        own = join(snapshot.guard.plain["guard"], snapshot.guard.tensors, host=True)
        # What a killed process could not drop any more: the branch that was left.
        Team(alone=False).first(lambda: shelf.rotate(self.folder, step=snapshot.at.step, keep=self._keep))
        self._refill(snapshot)
        self._newest = snapshot.at.step
        return Loaded(path, snapshot, own, rng)

    def stop(self, reason: str) -> None:
        """The run is ended by the guard: a restart must not go on by itself."""
        record = {"schema": fs.SCHEMA, "reason": reason}
        Team(alone=False).first(
            lambda: fs.atomic_write(self._top / STOPPED, (json.dumps(record, indent=1) + "\n").encode())
        )

    def stopped(self) -> str | None:
        """Why the run was ended, None when it was not."""
        path = self._top / STOPPED
        return Team(alone=False).first(lambda: json.loads(path.read_bytes())["reason"] if path.exists() else None)

    def forget_stop(self) -> None:
        """Somebody decided that the run goes on."""
        Team(alone=False).first(lambda: (self._top / STOPPED).unlink(missing_ok=True))

    def _refill(self, snapshot: Snapshot) -> None:
        """The ring as it was, as far as the disk has it: the first snapshot of each step."""
        self._recorder.distrust(0)
        found = {}
        for path in Team(alone=False).first(lambda: shelf.listed(self.folder)):
            found.setdefault(int(path.name.rpartition("-")[2]), path)
        for step in sorted(step for step in found if step <= snapshot.at.step)[-self._recorder.slots :]:
            try:
                kept = read_snapshot(found[step], self._recorder.training)
            except (ValueError, OSError) as error:
                _log.warning("%s", error)
                continue
            self._recorder.adopt(kept.at, kept.state)
        self._recorder.adopt_log(snapshot)

    def _writable(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """The guard's state, less a loader's own that no file can hold: it is read past instead."""
        mark = own["stream"]["mark"]
        try:
            encode(split(mark, "loader", {}), "the loader's state_dict")
        except ValueError as error:
            if not self._told:
                _log.warning("a resumed run will read past the batches behind it: %s", error)
            self._told = True
            return {**own, "stream": {**own["stream"], "mark": None}}
        return dict(own)
