"""Per-layer statistics as Parquet parts: names of parts, the buffered writer, the query that reads them.

Rows are long: `segment, step, kind, place, stat, value`. A flush writes `part-<segment>-<first step>.parquet`; closing
a segment merges its parts into `part-<segment>-<first step>-<last step>.parquet`. A part of the second form holds
everything of its segment, so parts of the first form beside it are what a killed merge left, and are ignored.
DuckDB is imported only here and in `study`; one thread, one connection a call.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aftershock.store.folder import SCHEMA, STATS, replacing
from aftershock.store.place import Place

FLUSH_ROWS = 50_000
"""A flush costs about 16 ms whatever its size up to here (12 ms of it the connection), and the rows 20 bytes each."""

READ_TRIES = 3
"""A merge may delete the parts between listing and opening them; its result is in the next listing."""


class Part(NamedTuple):
    """One Parquet file. `merged`: it holds its whole segment."""

    segment: int
    first_step: int
    merged: bool
    name: str


class StatRows(NamedTuple):
    """Rows of several statistics as they lie on disk: `codes` index `names`."""

    names: list[str]
    codes: np.ndarray
    segments: np.ndarray
    steps: np.ndarray
    values: np.ndarray


class StatsFile:
    """The statistics of one segment of one run. Buffers rows, writes parts."""

    def __init__(self, run_folder: Path, segment: int) -> None:
        self._folder = run_folder / STATS
        self._folder.mkdir(exist_ok=True)
        self._run = run_folder
        self._segment = segment
        self._rows: list[tuple[int, tuple[str, ...], np.ndarray]] = []
        self._num_rows = 0
        self._last_step = -1
        self._split: dict[str, tuple[str, str, str]] = {}

    @property
    def num_rows(self) -> int:
        """Rows buffered, not yet on disk."""
        return self._num_rows

    def add(self, step: int, names: Sequence[str], values: np.ndarray) -> None:
        """Raises ValueError on a name that is not kind/place/stat, on unequal lengths, or a step that goes back."""
        array = np.array(values)  # a copy: the caller may reuse its buffer
        if array.shape != (len(names),):
            raise ValueError(f"stats at step {step}: got {len(names)} names and values of shape {array.shape}")
        if array.dtype != np.float32:
            array = array.astype(np.float64)
        if step < self._last_step:
            back = f"from step {self._last_step} to {step}"
            raise ValueError(f"stats went back {back}: call new_segment() after a rewind")
        for name in names:
            if name not in self._split:
                self._split[name] = split_name(name)
        self._last_step = step
        self._rows.append((step, tuple(names), array))
        self._num_rows += len(names)

    def flush(self) -> None:
        """Write what is buffered as one part. On an error the rows stay buffered."""
        if self._rows:
            self._write(self._rows[0][0], self._old_parts(first_step=self._rows[0][0]))

    def merge(self) -> None:
        """Flush, and leave one part for the whole segment."""
        parts = self._old_parts()
        if self._rows or len(parts) > 1:
            first = parts[0].first_step if parts else self._rows[0][0]
            self._write(first, parts, last_step=self._last_step)

    def _old_parts(self, first_step: int | None = None) -> list[Part]:
        """Parts of this segment, all or those with one first step (a second flush at one step: their names collide)."""
        mine = [p for p in list_parts(Place(self._run)) if p.segment == self._segment]
        return mine if first_step is None else [p for p in mine if p.first_step == first_step]

    def _write(self, first_step: int, parts: list[Part], last_step: int | None = None) -> None:
        """One part out of old `parts` and the buffer, in that order; then the old ones go."""
        tail = "" if last_step is None else f"-{last_step}"
        path = self._folder / f"part-{self._segment}-{first_step}{tail}.parquet"
        old = [str(self._folder / part.name) for part in parts]
        with replacing(path) as tmp:
            self._copy(tmp, old)
        self._rows.clear()
        self._num_rows = 0
        for name in old:
            if name != str(path):
                Path(name).unlink(missing_ok=True)

    def _copy(self, tmp: Path, old: list[str]) -> None:
        columns = "segment, step, kind, place, stat, value"
        con = connect()
        try:
            selects = []
            if old:
                selects.append(f"select {columns} from read_parquet({_sql_list(old)}, union_by_name = true)")
            if self._rows:
                con.register("buffered", self._columns())
                # DuckDB reads a NaN of a numpy column as NULL; no value here is NULL, so every NULL was a NaN
                value = f"coalesce(value, 'nan'::{self._value_type()}) as value"
                selects.append(f"select {columns} from (select * replace ({value}) from buffered)")
            meta = f"kv_metadata {{schema: '{SCHEMA}', run_id: {_sql_text(self._run.absolute().name)}}}"
            con.execute(
                f"copy ({' union all '.join(selects)}) to {_sql_text(str(tmp))} "
                f"(format parquet, compression zstd, {meta})"
            )
        finally:
            con.close()

    def _value_type(self) -> str:
        return "float" if all(values.dtype == np.float32 for _, _, values in self._rows) else "double"

    def _columns(self) -> dict[str, np.ndarray]:
        counts = [len(names) for _, names, _ in self._rows]
        split = [self._split[name] for _, names, _ in self._rows for name in names]
        return {
            "segment": np.full(self._num_rows, self._segment, dtype=np.int32),
            "step": np.repeat(np.array([step for step, _, _ in self._rows], dtype=np.int64), counts),
            "kind": np.array([s[0] for s in split], dtype=object),
            "place": np.array([s[1] for s in split], dtype=object),
            "stat": np.array([s[2] for s in split], dtype=object),
            "value": np.concatenate([values for _, _, values in self._rows]),
        }


def split_name(name: str) -> tuple[str, str, str]:
    """kind, place and stat of a signal's name. Raises ValueError when it has not exactly three non-empty parts."""
    parts = name.split("/")
    if len(parts) != 3 or not all(parts):
        raise ValueError(f"signal name {name!r} must read kind/place/stat, as in grad/head/rms")
    return parts[0], parts[1], parts[2]


def connect() -> Any:
    """An in-memory DuckDB connection of one thread: a training process has no cores to give away."""
    import duckdb

    return duckdb.connect(config={"threads": 1})


def list_parts(run: Place) -> list[Part]:
    """The parts to read, in the order their rows were written. Raises ValueError on a file that is no part."""
    parts = []
    for name in run.list(STATS):
        numbers = name.removeprefix("part-").removesuffix(".parquet").split("-")
        if not name.startswith("part-") or len(numbers) not in (2, 3) or not all(n.isdecimal() for n in numbers):
            raise ValueError(f"{run.text}/{STATS}/{name}: not a part of the statistics; move it out of the run folder")
        parts.append(Part(int(numbers[0]), int(numbers[1]), len(numbers) == 3, name))
    whole = {part.segment for part in parts if part.merged}
    return sorted(part for part in parts if part.merged or part.segment not in whole)


def read_stat_names(run: Place) -> list[str]:
    """Every `kind/place/stat` that has a row, sorted."""
    query = "select distinct kind || '/' || place || '/' || stat from read_parquet({parts}, union_by_name = true)"
    return sorted(row[0] for row in _query(run, query, lambda con: con.fetchall(), []))


def read_stat_rows(run: Place, names: Sequence[str]) -> StatRows:
    """All rows of the named statistics, every segment, in the order written."""
    query = """
        select w.code, r.segment, r.step, coalesce(r.value::double, 'nan'::double) as value
        from (select *, row_number() over () as at from read_parquet({parts}, union_by_name = true)) r
        join (select unnest(?::varchar[]) as name, unnest(range(?)) as code) w
          on r.kind || '/' || r.place || '/' || r.stat = w.name
        order by r.at
    """
    empty = {"code": [], "segment": [], "step": [], "value": []}
    found = _query(run, query, lambda con: con.fetchnumpy(), empty, [list(names), len(names)])
    codes, segments, steps = (np.asarray(found[key], dtype=np.int64) for key in ("code", "segment", "step"))
    return StatRows(list(names), codes, segments, steps, np.asarray(found["value"], dtype=np.float64))


def _query(run: Place, query: str, fetch: Any, empty: Any, parameters: Iterable[Any] = ()) -> Any:
    import duckdb

    for left in reversed(range(READ_TRIES)):
        parts = [f"{STATS}/{part.name}" for part in list_parts(run)]
        with run.local(parts) as paths:
            if len(paths) < len(parts) and left:
                continue
            if not paths:
                return empty
            con = connect()
            try:
                text = query.replace("{parts}", _sql_list([str(p) for p in paths]))
                return fetch(con.execute(text, list(parameters)))
            except duckdb.IOException:
                if not left:
                    raise
            finally:
                con.close()
    raise AssertionError("the last try returns or raises")


def _sql_text(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _sql_list(texts: Iterable[str]) -> str:
    return "[" + ", ".join(map(_sql_text, texts)) + "]"
