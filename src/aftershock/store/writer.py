"""One writer for one run folder: buffers scalars and statistics, writes events at once, keeps the last snapshots.

What is on disk when the process dies stays readable; what `close` has not sealed counts as interrupted.
Knows nothing of what trains. Must not import the reader.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from aftershock import config as configs
from aftershock.store import folder as fs
from aftershock.store import opening
from aftershock.store.snapshots import save_snapshot
from aftershock.store.stats import FLUSH_ROWS, StatsFile

if TYPE_CHECKING:
    import torch

    from aftershock.store.mirror import MirrorThread
    from aftershock.store.sinks import Sink, SinkQueue

STATUSES: tuple[str, ...] = ("finished", "diverged", "failed")
"""What done.json may say."""

FLUSH_SCALARS_S = 5.0
"""Slow steps must still show in a live view: scalars also go out when this old."""
FLUSH_STATS_S = 120.0
"""A flush of statistics costs a Parquet file; this bounds what a killed process loses of them."""
SYNC_S = 30.0
"""How often flushed scalars are also forced to the disk: a killed process loses none of them, a power cut this much."""


class RunWriter:
    """The one writer of a run folder. Make it with `RunWriter.open`.

    Example:
        with RunWriter.open("runs/a", config={"lr": 0.1}) as run:
            run.scalars(0, {"loss/train/ce": 5.5})
            run.stats(0, ["grad/head/rms"], np.array([0.1]))
            run.close("finished", {"final_loss": 5.5})
    """

    def __init__(
        self,
        path: Path,
        lock: fs.FolderLock,
        *,
        segment: int,
        flush_every: int,
        queue: SinkQueue | None,
        mirror: MirrorThread | None,
    ) -> None:
        """For `open` only: everything is checked and the lock is held."""
        self.folder = path
        self.segment = segment
        self._lock: fs.FolderLock | None = lock
        self._flush_every = flush_every
        self._queue = queue
        self._mirror = mirror
        self._stats = StatsFile(path, segment)
        self._events = fs.JsonLines(path / fs.EVENTS)
        self._scalars = fs.JsonLines(path / fs.SCALARS)
        self._rows: list[tuple[int, dict[str, float]]] = []
        self._flushed = self._stats_flushed = self._synced = time.monotonic()

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        config: Any,
        tags: Mapping[str, str] | None = None,
        sinks: Sequence[Sink] = (),
        mirror: str | None = None,
        flush_every: int = 50,
        env: Mapping[str, Any] | None = None,
    ) -> RunWriter:
        """Create or reopen a run folder; config and environment are on disk when this returns.

        `config` is a dataclass or a mapping; `env` adds keys to env.json (what the data is, say); `mirror` is the
        fsspec URL of this run's copy; scalars go out every `flush_every` calls.
        Reopening an interrupted or failed run starts the next segment. Raises ValueError when another process writes
        the folder, the config differs from the one there, the run is finished or diverged already, the folder is of a
        newer schema, or the mirror holds a run that this folder does not know.
        """
        if flush_every < 1:
            raise ValueError(f"flush_every must be at least 1, got {flush_every}")
        path = Path(folder)
        with fs.disk_errors(path):
            try:
                path.mkdir(parents=True, exist_ok=True)
                lock = fs.FolderLock(path)
            except (PermissionError, NotADirectoryError, FileExistsError) as error:
                raise ValueError(f"{path}: cannot hold a run folder ({error.strerror}); choose another place") from None
            try:
                return cls._open_locked(path, lock, config, tags or {}, sinks, mirror, flush_every, env or {})
            except BaseException:
                lock.release()
                raise

    @classmethod
    def _open_locked(
        cls,
        path: Path,
        lock: fs.FolderLock,
        config: Any,
        tags: Mapping[str, str],
        sinks: Sequence[Sink],
        mirror_url: str | None,
        flush_every: int,
        env: Mapping[str, Any],
    ) -> RunWriter:
        fs.clear_temporary(path)
        earlier = opening.read_env(path)
        text = opening.config_text(path, config)
        opening.check_config(path, text)
        mirror = _mirror(path, mirror_url, new_run=not earlier)
        opening.clear_failed(path)
        segment = opening.write_env(path, earlier, tags, env)["segment"]
        if not (path / fs.CONFIG).exists():
            fs.atomic_write(path / fs.CONFIG, text.encode())
        (path / fs.SNAPSHOTS).mkdir(exist_ok=True)
        queue = _queue(path, sinks, configs.to_dict(config), tags, segment)
        writer = cls(path, lock, segment=segment, flush_every=flush_every, queue=queue, mirror=mirror)
        if queue is not None:
            queue.start()
        if mirror is not None:
            mirror.start()
        return writer

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record named numbers of one step. A second call for a step adds to it, or replaces a value."""
        self._require_open()
        row = {name: float(value) for name, value in values.items()}
        self._rows.append((int(step), row))
        if self._queue is not None:
            self._queue.log(row, int(step), self.segment)
        if len(self._rows) >= self._flush_every or time.monotonic() - self._flushed > FLUSH_SCALARS_S:
            self._flush_scalars()

    def event(self, kind: str, step: int, **data: Any) -> None:
        """Record that something happened; on the disk when this returns. `data`: numbers, text, lists, mappings."""
        self._require_open()
        record = {"schema": fs.SCHEMA, "segment": self.segment, "step": int(step), "kind": kind, "time": time.time()}
        record["data"] = fs.plain(data, f"event {kind}")
        with fs.disk_errors(self.folder):
            self._events.append((fs.to_json(record) + "\n").encode())
            self._events.sync()
        if self._queue is not None:
            self._queue.event(kind, int(step), data)
        self._notify_mirror()

    def stats(self, step: int, names: Sequence[str], values: np.ndarray) -> None:
        """Record statistics `names[i]` = `values[i]` of one step; names read kind/place/stat, values are of shape [N].

        Raises ValueError when shapes or names are wrong, or `step` is before the previous one of this segment.
        """
        self._require_open()
        self._stats.add(int(step), names, values)
        if self._queue is not None:
            self._queue.log(dict(zip(names, map(float, values), strict=True)), int(step), self.segment)
        if self._stats.num_rows >= FLUSH_ROWS or time.monotonic() - self._stats_flushed > FLUSH_STATS_S:
            self._flush_stats()

    def snapshot(self, step: int, tensors: Mapping[str, torch.Tensor], keep: int = 2) -> None:
        """Write tensors as `snapshots/step-<step>.safetensors`, then drop all but the latest `keep`.

        Rows recorded before are on disk first, so a run resumed from here has no hole. Snapshots of later steps, left
        by a branch this segment has rewound, are dropped too.
        """
        self._require_open()
        if keep < 1:
            raise ValueError(f"snapshot keep must be at least 1, got {keep}")
        self.flush()
        with fs.disk_errors(self.folder):
            save_snapshot(self.folder, step=int(step), segment=self.segment, tensors=tensors, keep=keep)
        self._notify_mirror()

    def new_segment(self) -> int:
        """Start the next segment in place, after a rewind: its rows replace all earlier rows from its first step on."""
        self._require_open()
        self._flush_scalars(sync=True)
        with fs.disk_errors(self.folder):
            self._stats.merge()
            record = opening.read_env(self.folder)
            opening.replace_env(self.folder, record | {"segment": self.segment + 1})
            self._stats = StatsFile(self.folder, self.segment + 1)
        self.segment += 1
        return self.segment

    def flush(self) -> None:
        """Put everything buffered on the disk."""
        self._require_open()
        self._flush_scalars(sync=True)
        self._flush_stats()

    def close(self, status: str, summary: Mapping[str, Any]) -> None:
        """Seal the run: everything to disk, statistics merged, then done.json, then sinks, mirror and lock.

        `status` is one of `STATUSES`; non-finite numbers in `summary` become null. Raises OSError on a full disk: the
        run then stays unsealed, so it reads as interrupted.
        """
        self._require_open()
        if status not in STATUSES:
            raise ValueError(f"status {status!r} is not one of {', '.join(STATUSES)}")
        done = {"schema": fs.SCHEMA, "status": status, "summary": fs.plain(_finite(summary), "summary")}
        sealed = False
        try:
            self._flush_scalars(sync=True)
            with fs.disk_errors(self.folder):
                self._stats.merge()
                fs.atomic_write(self.folder / fs.DONE, (json.dumps(done, indent=1) + "\n").encode())
            sealed = True
        finally:
            self._release(status if sealed else "interrupted")

    def abandon(self) -> None:
        """Stop without sealing: buffers to disk, no done.json, so the run reads as interrupted and can be resumed."""
        self._require_open()
        try:
            self.flush()
        finally:
            self._release("interrupted")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """A writer that is still open is abandoned, whether the block ended by itself or by an exception."""
        if self._lock is None:
            return
        try:
            self.abandon()
        except OSError as second:
            if error is None:
                raise
            error.add_note(f"and the run folder could not be flushed: {second}")  # the first error is the one to see

    def _flush_scalars(self, *, sync: bool = False) -> None:
        now = time.monotonic()
        self._flushed = now
        with fs.disk_errors(self.folder):
            if self._rows:
                rows = ({"segment": self.segment, "step": step, "values": values} for step, values in self._rows)
                self._scalars.append("".join(fs.to_json(row) + "\n" for row in rows).encode())
                self._rows.clear()
            if sync or now - self._synced > SYNC_S:
                self._scalars.sync()
                self._synced = now
        self._notify_mirror()

    def _flush_stats(self) -> None:
        self._stats_flushed = time.monotonic()
        with fs.disk_errors(self.folder):
            self._stats.flush()
        self._notify_mirror()

    def _notify_mirror(self) -> None:
        if self._mirror is not None:
            self._mirror.notify()

    def _release(self, status: str) -> None:
        lock, self._lock = self._lock, None
        assert lock is not None
        try:
            self._events.close()
            self._scalars.close()
            if self._queue is not None:
                self._queue.close(status)
            if self._mirror is not None:
                self._mirror.close()
        finally:
            lock.release()

    def _require_open(self) -> None:
        if self._lock is None:
            raise ValueError(f"{self.folder}: this writer is closed; open the folder again to go on")


def _mirror(path: Path, url: str | None, *, new_run: bool) -> MirrorThread | None:
    if url is None:
        return None
    from aftershock.store.mirror import MirrorThread

    return MirrorThread(path, url, new_run=new_run)


def _queue(
    path: Path, sinks: Sequence[Sink], config: Mapping[str, Any], tags: Mapping[str, str], segment: int
) -> SinkQueue | None:
    if not sinks:
        return None
    from aftershock.store.sinks import RunInfo, SinkQueue

    return SinkQueue(
        sinks,
        RunInfo(
            run_id=path.absolute().name,
            config=config,
            tags=dict(tags),
            segment=segment,
            resumed_from=opening.last_step(path) if segment else None,
            folder=path,
        ),
    )


def _finite(value: Any) -> Any:
    """`value` with None for every non-finite number, in nested mappings and lists."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, (list, tuple)) else value
