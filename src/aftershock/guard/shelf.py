"""The folder that snapshots lie in: their names, which is the newest, whether one is intact, and which go.

    <folder>/snap-<serial>-step-<step>/complete.json: what belongs to it, with sizes and SHA-256; written last

A folder counts once it has lost its `.tmp` name. Must not import the state of a run: what is inside is not known here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from aftershock.guard.team import Team
from aftershock.store.folder import check_schema, disk_errors

_log = logging.getLogger("aftershock.guard")
_NAME = re.compile(r"snap-(\d+)-step-(\d+)")
COMPLETE = "complete.json"
PIECES = "pieces"


class Found(NamedTuple):
    """A snapshot's folder: `serial` counts the saves of a run, `step` its accepted steps, which may go back."""

    serial: int
    step: int
    path: Path


def newest(folder: str | Path, *, before: int | None = None, alone: bool = False) -> Path | None:
    """The newest snapshot below `folder` that verifies, of a step before `before`; None when there is none at all.

    What was refused on the way is told to the log `aftershock.guard`. Raises ValueError, with the reasons, when there
    are snapshots and none verifies. Cost: one pass over the files of each snapshot looked at.
    """
    return _newest(Path(folder), before, Team(alone=alone))


def verify(path: str | Path) -> None:
    """Raises ValueError, in a sentence, when the snapshot at `path` is not all there as it was written."""
    _verify(Path(path), Team(alone=True))


def world_of(path: str | Path) -> int:
    """How many processes wrote the snapshot at `path`."""
    return manifest(Path(path))["world"]


def listed(folder: str | Path) -> list[Path]:
    """The snapshots below `folder` by age, oldest first, whether or not they are intact."""
    return [found.path for found in _list(Path(folder))]


def begin(folder: Path, step: int) -> str:
    """Clear what killed writers left and make the folder to write into; its name less the `.tmp`."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for stray in folder.glob("snap-*.tmp"):
            shutil.rmtree(stray)
        # The newest has the highest number, not the highest step: a run may go back.
        name = f"snap-{max((found.serial for found in _list(folder)), default=0) + 1:06d}-step-{step}"
        (folder / f"{name}.tmp").mkdir()
    return name


def finish(tmp: Path, body: dict[str, Any]) -> None:
    """Seal what was written into `tmp`, and give it its name: from here on it counts."""
    complete = tmp / COMPLETE
    with disk_errors(tmp.parent):
        complete.write_bytes(to_json({"sha256": hashlib.sha256(to_json(body)).hexdigest(), "body": body}))
        for path in (complete, tmp / PIECES, tmp):
            if path.exists():
                sync(path)
        os.rename(tmp, tmp.with_suffix(""))
        sync(tmp.parent)


def rotate(folder: Path, *, step: int, keep: int) -> None:
    """Drop snapshots of steps later than `step`, and of all but the newest `keep` steps.

    Of one step the first stays (what its memory ring held) and the last (how the run went on from it after a rewind).
    """
    found = _list(folder)
    gone = [f for f in found if f.step > step]
    steps: dict[int, list[Found]] = {}
    for one in found:
        if one.step <= step:
            steps.setdefault(one.step, []).append(one)
    for at in sorted(steps):
        gone += steps[at] if at in sorted(steps)[:-keep] else steps[at][1:-1]
    for old in gone:
        doomed = old.path.with_name(f"{old.path.name}.tmp")  # so that a half deleted folder never counts
        os.rename(old.path, doomed)
        shutil.rmtree(doomed)


def _list(folder: Path) -> list[Found]:
    """The snapshots below `folder`, oldest first, whether or not they are intact."""
    matches = [(path, _NAME.fullmatch(path.name)) for path in folder.glob("snap-*")]
    return sorted(Found(int(match[1]), int(match[2]), path) for path, match in matches if match)


def _newest(folder: Path, before: int | None, team: Team) -> Path | None:
    refused = []
    found = team.first(lambda: [f for f in _list(folder) if before is None or f.step < before])
    for candidate in reversed(found):
        try:
            _verify(candidate.path, team)
        except (ValueError, OSError) as error:
            refused.append(str(error))
            _log.warning("%s", error)
        else:
            return candidate.path
    if refused:
        raise ValueError(f"none of the {len(refused)} snapshots in {folder} is intact: {'; '.join(refused[:3])}")
    return None


def choose(path: Path, team: Team) -> Path:
    """`path` itself, verified, or the newest below it that verifies. Raises ValueError when there is none."""
    if _NAME.fullmatch(path.name):
        _verify(path, team)
        return path
    found = _newest(path, None, team)
    if found is None:
        raise ValueError(f"there is no snapshot in {path}; give the folder that snapshots were saved to")
    return found


def _verify(path: Path, team: Team) -> None:
    """Each rank reads its share of the files."""

    def check() -> None:
        files = sorted(manifest(path)["files"].items())
        for name, wanted in files[team.rank :: team.size]:
            file = path / name
            if not file.is_file():
                raise ValueError(f"{path} is damaged: {name} is missing; use an older snapshot")
            if file.stat().st_size != wanted["bytes"] or digest(file) != wanted["sha256"]:
                raise ValueError(f"{path} is damaged: {name} is not as it was written; use an older snapshot")

    team.each(check)


def manifest(path: Path) -> dict[str, Any]:
    """What belongs to a snapshot. Raises ValueError when that itself is damaged."""
    if not path.is_dir():
        raise ValueError(f"{path}: there is no such snapshot")
    try:
        sealed = json.loads((path / COMPLETE).read_bytes())
        body = sealed["body"]
        intact = sealed["sha256"] == hashlib.sha256(to_json(body)).hexdigest()
    except (OSError, ValueError, TypeError, KeyError):
        intact, body = False, None
    if not intact or not isinstance(body, dict):
        raise ValueError(f"{path} is damaged: {COMPLETE} is missing or not as it was written; use an older snapshot")
    check_schema(body["schema"], str(path))
    return body


def to_json(value: Any) -> bytes:
    """Always the same bytes for the same value."""
    return json.dumps(value, allow_nan=False, sort_keys=True).encode()


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
