"""A run folder as values: config, environment, events, scalars, statistics, snapshots; missing stays missing.

A reader is a view of one moment: files are read once, when first asked for. Make a new one to see newer rows.
Rows of a later segment that starts at step s replace the rows of earlier segments from step s on; events of all
segments are kept, since they are history. Must not import the writer.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import yaml

from aftershock.config import nearest
from aftershock.store import folder as fs
from aftershock.store.place import Place
from aftershock.store.snapshots import load_snapshot, snapshot_name, snapshot_steps
from aftershock.store.stats import list_parts, read_stat_names, read_stat_rows

if TYPE_CHECKING:
    import torch

HEARTBEAT_S = 600.0
"""A mirror whose last sign of life is older belongs to a dead process (a live one beats every minute)."""


class Event(NamedTuple):
    """One line of events.jsonl; `time` is seconds since 1970."""

    segment: int
    step: int
    kind: str
    time: float
    data: dict[str, Any]


class Series(NamedTuple):
    """Scalars over steps: `steps` int64 [N], each of `values` float64 [N], nan where a name has no row."""

    steps: np.ndarray
    values: dict[str, np.ndarray]


class ScalarRow(NamedTuple):
    """One scalar of one step."""

    segment: int
    step: int
    name: str
    value: float


class StatSeries(NamedTuple):
    """One statistic over steps: `steps` int64 [N] ascending, `values` float64 [N]; only steps that have a row."""

    steps: np.ndarray
    values: np.ndarray


class RunReader:
    """Reads a run folder, or its mirror at an fsspec URL.

    Example:
        run = RunReader("runs/a")
        steps, values = run.scalars("loss/train/ce")
        peak = run.stats("attn/*/max_logit")["attn/blocks.0/max_logit"].values.max()
    """

    def __init__(self, folder: str | Path | Place) -> None:
        """Raises ValueError when there is no run, or one of a newer schema."""
        self.place = folder if isinstance(folder, Place) else Place(folder)
        self._config = self.place.read(fs.CONFIG)
        if self._config is None:
            raise ValueError(f"{self.place.text}: no run here (no {fs.CONFIG}); check the path")
        self.run_id = self.place.name
        self.env: dict[str, Any] = self._json(fs.ENV)

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        assert self._config is not None
        return yaml.safe_load(self._config) or {}

    @property
    def status(self) -> str:
        """`finished`, `diverged` or `failed` as done.json says; without it `running` while a live process holds the
        lock, else `interrupted`. Of a mirror, `running` means a sign of life in the last 10 minutes."""
        done = self._json(fs.DONE)
        if done:
            return str(done["status"])
        if self.place.remote is None:
            return "running" if fs.is_locked(Path(self.place.text)) else "interrupted"
        beat = self._json(fs.HEARTBEAT)
        return "running" if beat and time.time() - float(beat["time"]) < HEARTBEAT_S else "interrupted"

    @property
    def summary(self) -> dict[str, Any]:
        """What `close` was given; empty while the run is not sealed."""
        return dict(self._json(fs.DONE).get("summary", {}))

    def events(self) -> list[Event]:
        """All events in the order written. Raises ValueError on one of a newer schema."""
        events = []
        for record in fs.read_lines(self.place.read(fs.EVENTS) or b"", f"{self.place.text}/{fs.EVENTS}"):
            fs.check_schema(record.get("schema"), f"{self.place.text}/{fs.EVENTS}")
            data = fs.unspell(record["data"])
            events.append(Event(record["segment"], record["step"], record["kind"], record["time"], data))
        return events

    def scalar_names(self) -> list[str]:
        """Names that have a row, sorted."""
        return sorted({name for _, values in self._steps.values() for name in values})

    def scalars(self, *names: str) -> Series:
        """Named scalars, all of them without a name, at every step where one of them has a row.

        With one name every nan is a value that was recorded. Raises ValueError on a name that no row has.
        """
        known = self.scalar_names()
        for name in names:
            if name not in known:
                raise ValueError(f"{self.place.text}: no scalar {name!r}{_hint(name, known)}")
        wanted = names or tuple(known)
        steps = [step for step, (_, row) in self._steps.items() if any(name in row for name in wanted)]
        columns = {name: [self._steps[step][1].get(name, np.nan) for step in steps] for name in wanted}
        values = {name: np.array(column, dtype=np.float64) for name, column in columns.items()}
        return Series(np.array(steps, dtype=np.int64), values)

    def scalar_rows(self) -> list[ScalarRow]:
        """All scalars in long form, ascending by step."""
        return [
            ScalarRow(segment, step, name, value)
            for step, (segment, values) in self._steps.items()
            for name, value in values.items()
        ]

    @functools.cached_property
    def _stat_names(self) -> list[str]:
        return read_stat_names(self.place)

    def stat_names(self) -> list[str]:
        """`kind/place/stat` of every statistic that has a row, sorted."""
        return list(self._stat_names)

    def stats(self, pattern: str = "*") -> dict[str, StatSeries]:
        """Statistics whose name matches the shell `pattern` ("attn/*/max_logit"), by name.

        Raises ValueError when none does; `stat_names` says what there is.
        """
        names = [name for name in self._stat_names if fnmatch.fnmatchcase(name, pattern)]
        if not names:
            raise ValueError(f"{self.place.text}: no statistic matches {pattern!r}{_hint(pattern, self._stat_names)}")
        rows = read_stat_rows(self.place, names)
        order = np.lexsort((rows.segments, rows.steps, rows.codes))  # stable: of equal keys the last written is last
        codes, steps, values = rows.codes[order], rows.steps[order], rows.values[order]
        keep = steps < self.limits_of(rows.segments[order])
        codes, steps, values = codes[keep], steps[keep], values[keep]
        last = np.ones(len(codes), dtype=bool)
        last[:-1] = (codes[1:] != codes[:-1]) | (steps[1:] != steps[:-1])
        codes, steps, values = codes[last], steps[last], values[last]
        edges = np.searchsorted(codes, np.arange(len(names) + 1))
        found = {n: StatSeries(steps[a:b], values[a:b]) for n, a, b in zip(names, edges[:-1], edges[1:], strict=True)}
        return {name: series for name, series in found.items() if len(series.steps)}

    def snapshots(self) -> list[int]:
        """Steps that can be loaded, ascending."""
        return snapshot_steps(self.place.list(fs.SNAPSHOTS))

    def load_snapshot(self, step: int) -> dict[str, torch.Tensor]:
        """Tensors as they were at `step`, on the CPU. Raises ValueError when there is no such snapshot."""
        data = self.place.read(f"{fs.SNAPSHOTS}/{snapshot_name(step)}")
        if data is None:
            there = ", ".join(map(str, self.snapshots())) or "none"
            raise ValueError(f"{self.place.text}: no snapshot of step {step}; there: {there}")
        return load_snapshot(data)

    @functools.cached_property
    def limits(self) -> dict[int, int]:
        """By segment, the step from which later segments replace it; absent where none does."""
        starts: dict[int, int] = {}
        for row in self._rows:
            starts.setdefault(row["segment"], row["step"])
        for part in list_parts(self.place):
            starts[part.segment] = min(part.first_step, starts.get(part.segment, part.first_step))
        segments = range(max(starts, default=0) + 1)
        limits = {s: min((start for later, start in starts.items() if later > s), default=None) for s in segments}
        return {segment: limit for segment, limit in limits.items() if limit is not None}

    def limits_of(self, segments: np.ndarray) -> np.ndarray:
        """`limits` for an array of segments, int64, the largest integer where there is none."""
        endless = np.iinfo(np.int64).max
        table = [self.limits.get(s, endless) for s in range(int(segments.max(initial=0)) + 1)]
        return np.array(table, dtype=np.int64)[segments]

    @functools.cached_property
    def _rows(self) -> list[dict[str, Any]]:
        return fs.read_lines(self.place.read(fs.SCALARS) or b"", f"{self.place.text}/{fs.SCALARS}")

    @functools.cached_property
    def _steps(self) -> Mapping[int, tuple[int, dict[str, float]]]:
        """By step, ascending: segment and values, after later segments have replaced earlier ones."""
        steps: dict[int, tuple[int, dict[str, float]]] = {}
        for row in self._rows:
            limit = self.limits.get(row["segment"])
            if limit is None or row["step"] < limit:
                values = {name: float(value) for name, value in row["values"].items()}
                earlier = steps[row["step"]][1] if row["step"] in steps else {}
                steps[row["step"]] = (row["segment"], earlier | values)
        return dict(sorted(steps.items()))

    def _json(self, name: str) -> dict[str, Any]:
        """A JSON file of this folder with its schema checked, {} when it is missing."""
        data = self.place.read(name)
        if data is None:
            return {}
        try:
            record = json.loads(data)
        except ValueError:
            raise ValueError(f"{self.place.text}/{name}: not JSON; restore the file") from None
        fs.check_schema(record.get("schema"), f"{self.place.text}/{name}")
        return record


def _hint(name: str, known: list[str]) -> str:
    """The nearest name, or all of them where they are few."""
    if not known:
        return "; none was recorded"
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return nearest(name, known if len(known) <= 20 else close or [f"{len(known)} others, such as {known[0]!r}"])
