"""Verdicts on disk: one JSON file for each claim and version, in the package (`claims/records`) or in any folder.

What a study wrote down besides lies in a folder of the record's name beside it: `P5.json`, `P5/forecast.json`.
The package's own are read through importlib.resources, so an installed package has them too.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Iterable
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from aftershock.claims.claim import Record
from aftershock.store.environment import in_checkout
from aftershock.store.folder import atomic_write

SUFFIX = ".json"


def record_name(claim_id: str, version: int) -> str:
    """`P1.json`, and `P1.v2.json` for a later version of the criterion: both verdicts stay."""
    return f"{claim_id}{SUFFIX}" if version == 1 else f"{claim_id}.v{version}{SUFFIX}"


def checkout_folder() -> Path | None:
    """Where the package's records lie when it runs from a source checkout; None when it is installed elsewhere."""
    return in_checkout("claims/records")


def write_record(folder: Path, record: Record) -> Path:
    """Write the record, in place of an older one of the same claim and version.

    Raises ValueError rather than overwrite a file that holds another claim or version.
    """
    path = folder / record_name(record.id, record.version)
    if path.exists():
        old = _parse(path)
        if (old.id, old.version) != (record.id, record.version):
            raise ValueError(
                f"{path} holds {old.id} version {old.version}, not {record.id} version {record.version}; "
                "move it away to keep both"
            )
    folder.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(json.dumps(record._asdict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    scratch.replace(path)
    return path


def keep_beside(record: Path, file: Path) -> Path:
    """Copy a file of a study into the folder beside the record, in place of an older one."""
    path = record.with_suffix("") / file.name
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, file.read_bytes())
    return path


def read_records(*folders: Path) -> dict[str, list[Record]]:
    """Records by claim, versions ascending: the package's, and those of `folders`, which replace earlier ones.

    Raises ValueError, naming the file, when one is damaged. A folder that is not there holds none.
    """
    found: dict[tuple[str, int], Record] = {}
    for place in (importlib.resources.files("aftershock.claims") / "records", *folders):
        for path in _files(place):
            record = _parse(path)
            found[record.id, record.version] = record
    by_id: dict[str, list[Record]] = {}
    for key in sorted(found):
        by_id.setdefault(key[0], []).append(found[key])
    return by_id


def _files(place: Traversable | Path) -> Iterable[Traversable | Path]:
    if not place.is_dir():
        return []
    return sorted((file for file in place.iterdir() if file.name.endswith(SUFFIX)), key=lambda file: file.name)


def _parse(path: Traversable | Path) -> Record:
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        record = Record(**data)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a record of a claim ({error}); restore the file") from None
    return record._replace(interval=None if record.interval is None else (record.interval[0], record.interval[1]))
