"""A study: the manifest that names its runs, their status, and SQL over all of their numbers.

The labels (size, arm) belong to the study, not to the run: several studies may share one pool of runs.
DuckDB is imported only inside `Study.sql`. Must not import the writer.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aftershock.config import from_dict, nearest
from aftershock.store import folder as fs
from aftershock.store.place import Place
from aftershock.store.reader import RunReader
from aftershock.store.stats import connect, list_parts

MANIFEST = "study.json"


@dataclass(frozen=True, kw_only=True)
class RunRef:
    """One run of a study: its folder's name and the labels it is grouped by."""

    run_id: str
    size: str
    arm: str
    lr: float
    seed: int


class StudyRow(NamedTuple):
    """A run of a study with what is known of it: `status` as of `RunReader`, or `missing` where no folder is yet."""

    ref: RunRef
    status: str
    summary: dict[str, Any]


def write_manifest(
    folder: str | Path, *, name: str, title: str, runs: Sequence[RunRef], runs_dir: str = "runs"
) -> Path:
    """Write `folder/study.json` whole; the time of creation of one already there is kept.

    `runs_dir` is relative to `folder`, or absolute. Raises ValueError when the manifest there is of a newer schema.
    """
    path = Path(folder) / MANIFEST
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    if path.exists():
        created = _read_manifest(Place(folder))["created"]
    record = {
        "schema": fs.SCHEMA,
        "name": name,
        "title": title,
        "created": created,
        "runs_dir": runs_dir,
        "runs": [dataclasses.asdict(ref) for ref in runs],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with fs.disk_errors(path.parent):
        fs.atomic_write(path, (json.dumps(record, indent=1) + "\n").encode())
    return path


class Study:
    """Reads a study folder, or one at an fsspec URL.

    Example:
        study = Study("studies/qk-norm")
        best = min(r.summary["final_loss"] for r in study.rows() if r.status == "finished")
        study.sql("select run_id, max(value) from stats where stat = 'max_logit' group by all")
    """

    def __init__(self, folder: str | Path) -> None:
        """Raises ValueError when there is no manifest, a damaged one, or one of a newer schema."""
        self.place = Place(folder)
        record = _read_manifest(self.place)
        where = f"{self.place.text}/{MANIFEST}"
        self.name = str(record["name"])
        self.title = str(record["title"])
        self.created = str(record["created"])
        self.refs = tuple(from_dict(RunRef, run, where=f"{where}: runs[{i}]") for i, run in enumerate(record["runs"]))
        self.runs = self.place / str(record["runs_dir"])

    def reader(self, run_id: str) -> RunReader:
        """Raises ValueError when the study has no such run, or the run no folder yet."""
        known = [ref.run_id for ref in self.refs]
        if run_id not in known:
            raise ValueError(f"{self.place.text}: no run {run_id!r}{nearest(run_id, known)}")
        return RunReader(self.runs / run_id)

    def rows(self) -> list[StudyRow]:
        """Every run of the manifest, in its order, with status and summary as of now."""
        rows = []
        for ref in self.refs:
            run = self._started(ref.run_id)
            rows.append(StudyRow(ref, run.status, run.summary) if run else StudyRow(ref, "missing", {}))
        return rows

    def sql(self, query: str) -> list[dict[str, Any]]:
        """Rows of a DuckDB query, as dicts, over these views:

        `runs(run_id, size, arm, lr, seed, status, <each key of any summary>)`,
        `scalars(run_id, segment, step, name, value)`,
        `stats(run_id, segment, step, kind, place, stat, value)`; rows that a later segment replaced are left out.
        Raises ValueError with DuckDB's words when the query is wrong.
        """
        import duckdb

        con = connect()
        parts: list[tuple[RunReader, str]] = []
        readers = {run_id: self._started(run_id) for run_id in dict.fromkeys(ref.run_id for ref in self.refs)}
        started = [run for run in readers.values() if run is not None]
        try:
            _make_runs(con, self.rows())
            _make_scalars(con, started)
            parts = [(run, f"{run.run_id}/{fs.STATS}/{part.name}") for run in started for part in list_parts(run.place)]
            with self.runs.local([name for _, name in parts]) as paths:
                _make_stats(con, [run for run, _ in parts], paths)
                try:
                    result = con.execute(query)
                    names = [column[0] for column in result.description]
                    return [dict(zip(names, row, strict=True)) for row in result.fetchall()]
                except duckdb.Error as error:
                    raise ValueError(f"query failed: {str(error).splitlines()[0]}") from None
        finally:
            con.close()

    def _started(self, run_id: str) -> RunReader | None:
        place = self.runs / run_id
        return None if place.read(fs.CONFIG) is None else RunReader(place)


def _read_manifest(place: Place) -> dict[str, Any]:
    where = f"{place.text}/{MANIFEST}"
    data = place.read(MANIFEST)
    if data is None:
        raise ValueError(f"{place.text}: no study here (no {MANIFEST}); check the path")
    try:
        record = json.loads(data)
        fs.check_schema(record.get("schema"), where)
        lost = {"name", "title", "created", "runs_dir", "runs"} - record.keys()
    except (json.JSONDecodeError, AttributeError):
        raise ValueError(f"{where}: not a JSON mapping; restore the file") from None
    if lost:
        raise ValueError(f"{where}: missing {', '.join(sorted(lost))}; restore the file")
    return record


def _make_runs(con: Any, rows: Sequence[StudyRow]) -> None:
    records = [dataclasses.asdict(row.ref) | {"status": row.status} | row.summary for row in rows]
    columns = dict.fromkeys(["run_id", "size", "arm", "lr", "seed", "status"])
    columns |= dict.fromkeys(key for record in records for key in record)
    types = [_sql_type([record.get(name) for record in records]) for name in columns]
    quoted = ['"' + name.replace('"', '""') + '"' for name in columns]
    fields = ", ".join(f"{name} {kind}" for name, kind in zip(quoted, types, strict=True))
    con.execute(f"create table runs ({fields})")
    for record in records:
        values = [record.get(name) for name in columns]
        plain = [json.dumps(value) if isinstance(value, (dict, list)) else value for value in values]
        con.execute(f"insert into runs values ({', '.join('?' * len(plain))})", plain)


def _sql_type(values: Sequence[Any]) -> str:
    kinds = {type(value) for value in values if value is not None}
    if kinds == {bool}:
        return "boolean"
    if kinds == {int}:
        return "bigint"
    return "double" if kinds and kinds <= {int, float} else "varchar"


def _make_scalars(con: Any, runs: Sequence[RunReader]) -> None:
    rows = [(run.run_id, *row) for run in runs for row in run.scalar_rows()]
    run_id, segment, step, name, value = zip(*rows, strict=True) if rows else ((), (), (), (), ())
    columns = {
        "run_id": np.array(run_id, dtype=object),
        "segment": np.array(segment, dtype=np.int32),
        "step": np.array(step, dtype=np.int64),
        "name": np.array(name, dtype=object),
        "value": np.array(value, dtype=np.float64),
    }
    # DuckDB reads a NaN of a numpy column as NULL; no value here is NULL
    types = "run_id::varchar as run_id, segment, step, name::varchar as name, coalesce(value, 'nan') as value"
    con.register("scalar_columns", columns)
    con.execute(f"create table scalars as select {types} from scalar_columns")


def _make_stats(con: Any, owners: Sequence[RunReader], paths: Sequence[Path]) -> None:
    """A view over the Parquet parts; a part's run, and the step where a later segment replaces it, by file name."""
    con.execute("create table parts (file varchar, run_id varchar, segment integer, replaced_from bigint)")
    if not paths:
        con.execute(
            "create table stats (run_id varchar, segment integer, step bigint, kind varchar, place varchar, "
            "stat varchar, value double)"
        )
        return
    if len(paths) != len(owners):
        raise ValueError("a run of this study closed while it was read; ask again")
    for run, path in zip(owners, paths, strict=True):
        segment = int(path.name.split("-")[1])
        row = [str(path), run.run_id, segment, run.limits.get(segment, np.iinfo(np.int64).max)]
        con.execute("insert into parts values (?, ?, ?, ?)", [row[0], row[1], row[2], int(row[3])])
    files = ", ".join("'" + str(path).replace("'", "''") + "'" for path in paths)
    con.execute(
        "create view stats as select p.run_id, r.segment, r.step, r.kind, r.place, r.stat, r.value::double as value "
        f"from read_parquet([{files}], union_by_name = true, filename = true) r "
        "join parts p on r.filename = p.file and r.step < p.replaced_from"
    )
