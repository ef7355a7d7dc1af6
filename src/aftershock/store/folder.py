"""The layout of a run folder on disk, and the four primitives everything else is made of: the lock, the atomic write,
the append-only JSONL file, and plain values that survive JSON.

    config.yaml  env.json  lock  events.jsonl  scalars.jsonl  done.json
    stats/part-*.parquet  snapshots/step-*.safetensors

A line counts once its newline is on disk, a file once it has lost its `.tmp` name: whatever a killed process leaves
half done is ignored by readers and cleared by the next writer.
Must not import anything else of aftershock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

SCHEMA = 1
"""The layout's number. A reader refuses a higher one; it goes up only when an old reader would misread a new folder."""

CONFIG = "config.yaml"
ENV = "env.json"
LOCK = "lock"
EVENTS = "events.jsonl"
SCALARS = "scalars.jsonl"
STATS = "stats"
SNAPSHOTS = "snapshots"
DONE = "done.json"
HEARTBEAT = "heartbeat.json"
"""In a mirror only: the time of the last sign of life, where a lock cannot be probed."""

LOCK_PATIENCE_S = 0.5
"""A reader probes the lock by holding it shared for an instant; a writer that meets one tries again for this long."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FULL_WORDS = ("no space left on device", "disk quota exceeded", "file too large")


def check_schema(number: Any, where: str) -> None:
    """Raises ValueError when `number` is newer than `SCHEMA`, or no schema number at all."""
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ValueError(f"{where}: not written by aftershock (schema {number!r}; this one reads {SCHEMA})")
    if number > SCHEMA:
        raise ValueError(f"{where}: written by a newer aftershock (schema {number}, this one reads {SCHEMA}); upgrade")


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn "no space left", "quota exceeded" and "file too large" into one sentence that names the folder.

    The exception stays an OSError with its `errno`. DuckDB reports the same conditions as an error of its own.
    """
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        text = str(error).lower()
        words = type(error).__module__.endswith("duckdb") and any(w in text for w in _FULL_WORDS)
        if number not in _FULL and not words:
            raise
        full = OSError(
            f"{folder}: no room left to write ({_reason(number, text)}); what was written before is intact: "
            "free space and start again"
        )
        full.errno = number if number is not None else errno.ENOSPC
        raise full from error


class FolderLock:
    """Exclusive `flock` on `folder/lock`, held until `release` or the death of the process, however it dies.

    The file stays behind: deleting it would let two processes lock two files of one name. A forked child shares the
    lock, so a folder stays locked until children forked while it was open have ended too.
    """

    def __init__(self, folder: Path) -> None:
        """Raises ValueError when a live process (this one included) holds the lock."""
        self._fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        give_up = time.monotonic() + LOCK_PATIENCE_S
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() < give_up:
                    time.sleep(0.02)
                    continue
                holder = _holder(os.pread(self._fd, 4096, 0))
                os.close(self._fd)
                raise ValueError(
                    f"{folder} is being written by {holder}; wait for it or choose another folder"
                ) from None
        try:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        except OSError:  # a full disk: the lock must not outlive this call
            os.close(self._fd)
            raise

    def release(self) -> None:
        os.ftruncate(self._fd, 0)
        os.close(self._fd)


def is_locked(folder: Path) -> bool:
    """Whether a live process is writing `folder`. Takes the lock shared for an instant, never waits."""
    try:
        fd = os.open(folder / LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def atomic_write(path: Path, data: bytes) -> None:
    """Write `path` all or not at all: to a `.tmp` beside it, fsync, rename, fsync of the folder."""
    with replacing(path) as tmp:
        tmp.write_bytes(data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a `.tmp` path to fill; on leaving it becomes `path`, on an exception it goes and `path` is untouched."""
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield tmp
        _fsync(tmp)
        os.replace(tmp, path)
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise
    _fsync(path.parent)


def clear_temporary(folder: Path) -> None:
    """Remove the `.tmp` files a killed writer left. Call with the lock held."""
    for stray in [*folder.glob("*.tmp"), *folder.glob("*/*.tmp")]:
        stray.unlink(missing_ok=True)


class JsonLines:
    """An append-only JSONL file. Opening it cuts off a torn last line; a failed append leaves none."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._size = _complete_size(self._fd)
        if self._size != os.fstat(self._fd).st_size:
            os.ftruncate(self._fd, self._size)

    def append(self, data: bytes) -> None:
        """`data` is whole lines. On an OSError the file is as before the call."""
        try:
            view = memoryview(data)
            while view:
                view = view[os.pwrite(self._fd, view, self._size + len(data) - len(view)) :]
        except OSError:
            os.ftruncate(self._fd, self._size)
            raise
        self._size += len(data)

    def sync(self) -> None:
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


def read_lines(data: bytes, where: str) -> list[dict[str, Any]]:
    """The records of a JSONL file. Text after the last newline is a line still being written, or torn: ignored.

    Raises ValueError when an earlier line is not a JSON object: that file was not damaged by a killed writer.
    """
    records = []
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise ValueError(f"{where}: line {number} is not a JSON object; restore the file or remove that line")
        records.append(record)
    return records


def to_json(record: Mapping[str, Any]) -> str:
    """One line of JSON without NaN literals (see `plain`)."""
    try:
        return json.dumps(record, allow_nan=False, separators=(",", ":"))
    except (ValueError, TypeError):
        return json.dumps(plain(record, "value"), allow_nan=False, separators=(",", ":"))


def plain(value: Any, where: str) -> Any:
    """`value` as JSON types: NaN and infinities become "nan", "inf", "-inf"; numpy scalars and arrays, tuples and
    paths their plain equal. Raises ValueError for anything else."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, np.generic):
        return plain(value.item(), where)
    if isinstance(value, float):
        return value if math.isfinite(value) else _spell(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, np.ndarray):
        return plain(value.tolist(), where)
    if isinstance(value, Path):
        return str(value)
    raise ValueError(f"{where}: {type(value).__name__} cannot be stored; pass numbers, text, lists or mappings")


def unspell(value: Any) -> Any:
    """The inverse of `plain` for non-finite numbers, in nested lists and mappings."""
    if isinstance(value, str):
        return float(value) if value in ("nan", "inf", "-inf") else value
    if isinstance(value, dict):
        return {k: unspell(v) for k, v in value.items()}
    return [unspell(v) for v in value] if isinstance(value, list) else value


def _spell(value: float) -> str:
    return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"


def _reason(number: int | None, text: str) -> str:
    return os.strerror(number).lower() if number else next(w for w in _FULL_WORDS if w in text)


def _holder(content: bytes) -> str:
    """The holder, as in `process 12 on host b`, from the lock file; the host only when it is another one."""
    try:
        owner = json.loads(content)
    except ValueError:
        return "another process"
    away = owner["host"] != socket.gethostname()
    return f"process {owner['pid']}" + (f" on host {owner['host']}" if away else "")


def _complete_size(fd: int) -> int:
    """Bytes up to and with the last newline."""
    end = os.fstat(fd).st_size
    while end:
        start = max(0, end - 65_536)
        found = os.pread(fd, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
