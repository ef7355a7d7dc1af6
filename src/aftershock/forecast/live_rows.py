"""The rows of one run as they come: a run folder that grows, a guard's folder, or anybody's log.

Must not import torch, nor know what the rows are for.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path

from aftershock.guard.incidentrecord import FOLDER as INCIDENTS
from aftershock.guard.incidentrecord import read_incidents
from aftershock.signals.detect.logs.opening import log_rows
from aftershock.signals.detect.logs.rows import Follow, Problems, Row
from aftershock.store.folder import CONFIG, EVENTS, SCALARS, read_lines
from aftershock.store.reader import RunReader

LATE = 2
"""Rows of a run folder may come after those of the next steps: a tap's signals are read one step late."""


def run_rows(path: Path, problems: Problems, *, poll_s: float) -> Iterator[Row]:
    """Rows of a run, ascending by step; of a run under way also those still to come, until it is over."""
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder; check the path")
    if (path / CONFIG).exists():
        if RunReader(path).status == "running":
            return _growing(path, poll_s=poll_s)
        return log_rows(path, None, problems)
    if (path / INCIDENTS).is_dir():
        return _guarded(path)
    if (path / EVENTS).exists():
        raise ValueError(
            f"{path}: a guard's folder without incidents, and the guard writes no numbers but theirs; call "
            "LiveForecast.update in the loop, or give the run's own log"
        )
    return log_rows(path, Follow(poll_s=poll_s) if path.is_file() else None, problems)


def _growing(path: Path, *, poll_s: float) -> Iterator[Row]:
    """Scalars of a run folder while its process holds it."""
    waiting: dict[int, dict[str, float]] = {}
    segment, offset = -1, 0
    while True:
        running = RunReader(path).status == "running"  # asked first: what it wrote before its end is read below
        file = path / SCALARS
        data = b""
        if file.exists():
            with file.open("rb") as lines:
                lines.seek(offset)
                data = lines.read()
        data = data[: data.rfind(b"\n") + 1]
        offset += len(data)
        for record in read_lines(data, str(file)):
            if record["segment"] != segment:  # a rewind: what waits will not be written to again
                yield from _rows(waiting, upto=None)
                segment = record["segment"]
            waiting.setdefault(record["step"], {}).update({name: float(v) for name, v in record["values"].items()})
            yield from _rows(waiting, upto=record["step"] - LATE)
        if not running:
            yield from _rows(waiting, upto=None)
            return
        time.sleep(poll_s)


def _rows(waiting: dict[int, dict[str, float]], *, upto: int | None) -> Iterator[Row]:
    """Takes out what is complete."""
    for step in sorted(step for step in waiting if upto is None or step <= upto):
        yield Row(f"step {step}", step, waiting.pop(step))


def _guarded(path: Path) -> Iterator[Row]:
    """The steps that a guard kept around its incidents; each once."""
    rows: dict[int, dict[str, float]] = {}
    for incident in read_incidents(path):
        for row in incident.rows:
            numbers = {"loss": row.loss, "grad_norm": row.grad_norm}
            rows[row.step] = numbers | ({} if math.isnan(row.update_norm) else {"update_norm": row.update_norm})
    if not rows:
        raise ValueError(f"{path}: no incident of this guard has kept its steps; give the run's own log")
    yield from (Row(f"step {step}", step, rows[step]) for step in sorted(rows))
