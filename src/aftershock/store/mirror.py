"""Copies of a run folder at any fsspec URL: pushed while the run writes, read by `RunReader(url)`, fetched to go on.

A push sends only files that changed since the last one, done.json after everything else, then removes what the folder
has removed. Where the filesystem renames atomically a file appears whole; object stores put whole objects anyway.
Nothing that fails here stops a run: it is logged once and tried again. fsspec is imported where a URL is opened.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import posixpath
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aftershock.store import folder as fs
from aftershock.store.place import Place, open_url

_log = logging.getLogger(__name__)

_RENAMES = frozenset({"file", "local", "sftp", "ssh", "smb", "hdfs", "webhdfs", "arrow_hdfs"})
"""fsspec protocols whose `mv` within a folder replaces the target atomically."""

PAUSE_S = 5.0
"""At least this long between two pushes of a live run."""
BEAT_S = 60.0
"""At most this long between two signs of life (`reader.HEARTBEAT_S` is ten times it)."""
CLOSE_S = 300.0
"""How long closing waits for the last push."""


class Mirror:
    """Pushes one folder to one URL, remembering what is there already."""

    def __init__(self, folder: str | Path, url: str) -> None:
        """Raises ValueError when the URL cannot be opened."""
        self._folder = Path(folder)
        self._url = url
        self._fs, self._root = open_url(url)
        protocol = self._fs.protocol
        protocols = {protocol} if isinstance(protocol, str) else set(protocol)
        self._renames = bool(protocols & _RENAMES)
        self._makes_folders = self._renames or "memory" in protocols
        self._sent: dict[str, tuple[int, int]] = {}

    def push(self) -> list[str]:
        """Bring the copy up to date; the names sent. Raises what the filesystem raises; a second push goes on."""
        found = _stamps(self._folder)
        changed = [name for name, stamp in found.items() if self._sent.get(name) != stamp]
        pushed = []
        for name in sorted(changed, key=lambda name: (posixpath.basename(name) == fs.DONE, name)):
            try:
                self._put(name)
            except FileNotFoundError:
                if (self._folder / name).exists():
                    raise
                continue  # merged or pruned since it was listed; the next push removes it
            self._sent[name] = found[name]
            pushed.append(name)
        for name in [name for name in self._sent if name not in found]:
            self.remove(name)
            del self._sent[name]
        return pushed

    def write(self, name: str, data: bytes) -> None:
        """Put a file that the folder does not have."""
        self._placed(name, lambda target: self._fs.pipe_file(target, data))

    def remove(self, name: str) -> None:
        """Remove a file of the copy; one that is not there is no error."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(f"{self._root}/{name}")

    def _put(self, name: str) -> None:
        self._placed(name, lambda target: self._fs.put_file(str(self._folder / name), target))

    def _placed(self, name: str, send: Callable[[str], Any]) -> None:
        target = f"{self._root}/{name}"
        if self._makes_folders:
            self._fs.makedirs(posixpath.dirname(target), exist_ok=True)
        if not self._renames:
            send(target)
            return
        send(f"{target}.tmp")
        self._fs.mv(f"{target}.tmp", target)


class MirrorThread:
    """Keeps the copy of a run that is being written: pushes after `notify`, beats every minute, pushes on `close`."""

    def __init__(self, folder: Path, url: str, *, new_run: bool) -> None:
        """Raises ValueError when the URL cannot be written, or holds a run that `folder` does not know."""
        self._folder = folder
        self._url = url
        self._mirror = Mirror(folder, url)
        _check_same_run(folder, url, new_run)
        try:
            self._beat()
        except Exception as error:  # whatever a filesystem raises: the user must learn of it before training
            raise ValueError(f"{url}: the mirror cannot be written: {_words(error)}") from error
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._failing = False
        self._thread = threading.Thread(target=self._run, name=f"aftershock-mirror-{folder.name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def notify(self) -> None:
        """The folder changed. Returns at once."""
        self._wake.set()

    def close(self) -> None:
        """Push what is left and end. A failure is logged, not raised: the folder itself is whole."""
        self._stop.set()
        self._wake.set()
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            _log.warning("%s: the mirror did not finish within %d s; push it again later", self._url, CLOSE_S)

    def _run(self) -> None:
        self._try(lambda: self._mirror.remove(fs.DONE))  # a failed run tried again is not failed any more
        while not self._stop.is_set():
            self._wake.wait(BEAT_S)
            self._wake.clear()
            self._try(self._beat, self._mirror.push)
            self._stop.wait(PAUSE_S)
        self._failing = False
        self._try(self._mirror.push, lambda: self._mirror.remove(fs.HEARTBEAT))

    def _try(self, *actions: Callable[[], object]) -> None:
        try:
            for action in actions:
                action()
            self._failing = False
        except Exception as error:  # a filesystem may raise anything; training must not see it
            if not self._failing:
                _log.warning("%s: mirroring %s failed, will try again: %s", self._url, self._folder, _words(error))
            self._failing = True

    def _beat(self) -> None:
        beat = {"schema": fs.SCHEMA, "time": time.time(), "pid": os.getpid()}
        self._mirror.write(fs.HEARTBEAT, json.dumps(beat).encode())


def push(folder: str | Path, url: str) -> list[str]:
    """Copy a whole run or study folder to an fsspec URL now; the names sent. Raises ValueError on a bad URL."""
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: no such folder to mirror")
    return Mirror(folder, url).push()


def fetch(url: str, folder: str | Path) -> list[str]:
    """Copy a mirrored run to a new local folder, to read it fast or to go on with it; the names fetched.

    Raises ValueError when there is no run at `url`, or `folder` holds a run already.
    """
    source, target = Place(url), Path(folder)
    if source.read(fs.CONFIG) is None:
        raise ValueError(f"{url}: no run here (no {fs.CONFIG}); check the URL")
    if (target / fs.CONFIG).exists():
        raise ValueError(f"{folder}: holds a run already; choose a folder that does not exist")
    (target / fs.STATS).mkdir(parents=True, exist_ok=True)
    (target / fs.SNAPSHOTS).mkdir(exist_ok=True)
    top = [fs.ENV, fs.EVENTS, fs.SCALARS, fs.DONE]
    inner = [f"{sub}/{name}" for sub in (fs.STATS, fs.SNAPSHOTS) for name in source.list(sub)]
    fetched = []
    for name in [*inner, *top, fs.CONFIG]:  # config.yaml last: with it the folder becomes a run
        data = source.read(name)
        if data is not None:
            with fs.disk_errors(target):
                fs.atomic_write(target / name, data)
            fetched.append(name)
    return fetched


def _stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file to mirror, by its relative name."""
    stamps = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".tmp" or path.name == fs.LOCK:
            continue
        try:
            if path.is_file():
                stat = path.stat()
                stamps[path.relative_to(folder).as_posix()] = (stat.st_size, stat.st_mtime_ns)
        except FileNotFoundError:
            continue  # removed while listing
    return stamps


def _check_same_run(folder: Path, url: str, new_run: bool) -> None:
    """A mirror is never overwritten by a run that knows less than it."""
    place = Place(url)
    try:
        remote_env, remote_config = place.read(fs.ENV), place.read(fs.CONFIG)
    except Exception as error:  # whatever a filesystem raises: the user must learn of it before training
        raise ValueError(f"{url}: the mirror cannot be read: {_words(error)}") from error
    if remote_env is None:
        return
    if new_run:
        raise ValueError(f"{url}: holds a run already, and {folder} is new; fetch that run first or choose another URL")
    if remote_config is not None and remote_config != (folder / fs.CONFIG).read_bytes():
        raise ValueError(f"{url}: mirrors a run with another config than {folder}; choose another URL")
    there, here = json.loads(remote_env), json.loads((folder / fs.ENV).read_bytes())
    fs.check_schema(there.get("schema"), f"{url}/{fs.ENV}")
    known = {env["started"] for env in (here, *here.get("previous", []))}
    if there["segment"] > here["segment"] or there["started"] not in known:
        raise ValueError(
            f"{url}: was written by a copy of this run that {folder} does not know (segment {there['segment']} there); "
            "fetch that run first or choose another URL"
        )


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
