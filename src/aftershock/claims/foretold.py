"""A forecast comes first: what is foretold lies on disk before any run that it is about is trained.

Must not import torch.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aftershock.claims.claim import Forecast, RunResult, Trial
from aftershock.lab.sweep import expand
from aftershock.store.folder import atomic_write, disk_errors

COMMITTED = "forecast.json"
SAME = 1e-6
"""Of a number foretold again: other versions and machines sum in another order, and no interval here is that sure."""


def refuse_late_forecast(trial: Trial, folder: Path, *, runs: Path) -> None:
    """Raises ValueError where the study in `folder` has no forecast yet and one of the runs foretold has begun.

    `runs` is the folder of the run folders. For a trial without a forecast there is nothing to refuse.
    """
    path = folder / COMMITTED
    if trial.forecast is None or path.exists():
        return
    before = {planned.ref.run_id for planned in expand(trial.forecast.sweep)}
    later = [planned.ref for planned in expand(trial.sweep) if planned.ref.run_id not in before]
    begun = [ref for ref in later if (runs / ref.run_id).exists()]
    if begun:
        sizes = ", ".join(dict.fromkeys(ref.size for ref in begun))
        raise ValueError(
            f"{len(begun)} runs of what is to be foretold have begun already (first: {begun[0].run_id}; sizes {sizes}) "
            f"and {path} is not there; a forecast must come first: judge the claim in an empty folder"
        )


def commit_forecast(forecast: Forecast, fitted: Sequence[RunResult], folder: Path) -> Path:
    """Write what is foretold from `fitted` to `folder/forecast.json`, with the time; one that is there already is kept.

    The keys of the file: `date`, `run_ids` (those it rests on) and `forecast`. Raises ValueError where the one on file
    is not what these runs foretell now: then runs, code or file are others than they were.
    """
    path = folder / COMMITTED
    foretold = json.loads(json.dumps(forecast.foretell(fitted), allow_nan=False))
    if path.exists():
        on_file = _read(path)
        if not _agree(on_file["forecast"], foretold):
            raise ValueError(
                f"{path}, of {on_file['date']}, is not what its runs foretell now: runs, code or the file have changed "
                "since; judge the claim in an empty folder"
            )
        return path
    made = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "run_ids": [planned.ref.run_id for planned in expand(forecast.sweep)],
        "forecast": foretold,
    }
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(path, (json.dumps(made, indent=1) + "\n").encode())
    return path


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
        return {key: found[key] for key in ("date", "forecast")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a committed forecast ({error}); judge the claim in an empty folder") from None


def _agree(old: object, new: object) -> bool:
    """Whether two pieces of JSON say the same, numbers up to `SAME`."""
    if isinstance(old, dict) and isinstance(new, dict):
        return old.keys() == new.keys() and all(_agree(old[key], new[key]) for key in old)
    if isinstance(old, float) and isinstance(new, float):
        return math.isclose(old, new, rel_tol=SAME)
    return old == new
