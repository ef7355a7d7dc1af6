"""The checks and the records of opening a run folder for writing; called with its lock held.

Order: config and done.json are checked first, then env.json is written, then config.yaml: a folder without config.yaml
holds no run yet.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from aftershock import config as configs
from aftershock.store import folder as fs
from aftershock.store.environment import describe_environment


def read_env(path: Path) -> dict[str, Any]:
    """env.json, {} in a new folder. Raises ValueError when it is of a newer schema, damaged, or lost."""
    target = path / fs.ENV
    if not target.exists():
        if (path / fs.SCALARS).exists():
            raise ValueError(f"{path}: has scalars but no {fs.ENV}; restore that file or choose another folder")
        return {}
    try:
        env = json.loads(target.read_bytes())
    except ValueError:
        raise ValueError(f"{target}: not JSON; restore the file or choose another folder") from None
    fs.check_schema(env.get("schema"), str(target))
    return env


def write_env(
    path: Path, earlier: Mapping[str, Any], tags: Mapping[str, str], extra: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the environment of this opening, those of earlier ones under `previous`, oldest first."""
    segment = int(earlier["segment"]) + 1 if earlier else 0
    record = {"schema": fs.SCHEMA, "segment": segment} | describe_environment() | {"tags": dict(tags)}
    clash = sorted((record.keys() | {"previous"}) & extra.keys())
    if clash:
        raise ValueError(f"{path}: env may not replace {', '.join(clash)}; choose another key")
    record |= fs.plain(extra, "env")
    if earlier:
        last = {key: value for key, value in earlier.items() if key != "previous"}
        record["previous"] = [*earlier.get("previous", []), last]
    replace_env(path, record)
    return record


def replace_env(path: Path, record: Mapping[str, Any]) -> None:
    """Write env.json whole."""
    fs.atomic_write(path / fs.ENV, (json.dumps(record, indent=1) + "\n").encode())


def config_text(path: Path, config: Any) -> str:
    """Raises ValueError when the config holds something other than numbers, text, lists and mappings."""
    try:
        return configs.dump_yaml(config)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: the config holds what YAML cannot: {str(error).splitlines()[0]}") from None


def check_config(path: Path, text: str) -> None:
    """Raises ValueError naming the keys in which the config `text` differs from the config.yaml there."""
    target = path / fs.CONFIG
    if not target.exists():
        return
    old = configs.leaves(yaml.safe_load(target.read_text(encoding="utf-8")) or {})
    new = configs.leaves(yaml.safe_load(text) or {})
    missing = object()
    differ = []
    for key in {**old, **new}:
        was, now = old.get(key, missing), new.get(key, missing)
        if was != now and not (was != was and now != now):  # nan equals nan here
            words = ["absent" if value is missing else repr(value) for value in (was, now)]
            differ.append(f"{key} ({words[0]} there, {words[1]} now)")
    if differ:
        raise ValueError(f"{path}: holds a run with another config: {', '.join(differ)}; choose another folder")


def clear_failed(path: Path) -> None:
    """A failed run may be tried again; a finished or diverged one is sealed: ValueError."""
    target = path / fs.DONE
    if not target.exists():
        return
    done = json.loads(target.read_bytes())
    fs.check_schema(done.get("schema"), str(target))
    if done["status"] != "failed":
        raise ValueError(f"{path}: this run is {done['status']} already; read it, or choose another folder")
    target.unlink()


def last_step(path: Path) -> int | None:
    """The highest step with a scalar on disk."""
    if not (path / fs.SCALARS).exists():
        return None
    rows = fs.read_lines((path / fs.SCALARS).read_bytes(), str(path / fs.SCALARS))
    return max((int(row["step"]) for row in rows), default=None)
