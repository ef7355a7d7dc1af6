"""The benchmark's result on disk: one JSON file in the package (`bench/records/detectors.json`), or in any folder.

A figure that has no value (a precision without an alarm) is None. Must not import torch.
"""

from __future__ import annotations

import importlib.resources
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from aftershock.store.environment import in_checkout
from aftershock.store.folder import atomic_write

NAME = "detectors.json"
SCHEMA = 1

RecordT = TypeVar("RecordT")

Span = tuple[float | None, float | None]
"""A 95 % bootstrap interval over runs."""


class CurvePoint(NamedTuple):
    """One threshold of the sweep: false alarms per 10,000 healthy steps, recall and precision by lead."""

    threshold: float
    false_rate: float
    recall: list[float]
    precision: list[float]


class Row(NamedTuple):
    """One detector in one set-up, on the scoring seeds. Lists run over `Record.leads`; spans are those at lead >= 1."""

    detector: str
    setup: str
    signals: list[str]
    settings: dict[str, Any]
    precision: list[float | None]
    precision_span: Span
    recall: list[float | None]
    recall_span: Span
    area: list[float]
    area_span: Span
    area_in_budget: float
    area_in_budget_span: Span
    recall_in_budget: float
    recall_in_budget_span: Span
    false_rate: float
    false_rate_span: Span
    lead_onset: float | None
    lead_onset_span: Span
    lead_peak: float | None
    lead_peak_span: Span
    caught: dict[str, int]
    """Targets caught at lead >= 1, by specimen."""
    curve: list[CurvePoint]


class Traits(NamedTuple):
    """What is known of a detector with its published settings, whatever the corpus."""

    source: str
    microseconds: float
    after_nan: dict[str, Any]
    bloom: list[dict[str, Any]]
    bigscience: list[dict[str, Any]]


class Rival(NamedTuple):
    """Ours less another detector, both in their best set-up, in area at lead >= 1 and within the budget."""

    detector: str
    area: float
    area_span: Span
    in_budget: float
    in_budget_span: Span


class Record(NamedTuple):
    """The whole benchmark. `specimens`: by name, kind, runs, targets, those that lead >= 1 can catch, healthy steps."""

    rows: list[Row]
    traits: dict[str, Traits]
    rivals: list[Rival]
    specimens: dict[str, dict[str, Any]]
    leads: list[int]
    definition: dict[str, Any]
    tuning_seeds: list[int]
    scoring_seeds: list[int]
    versions: dict[str, str]
    machine: dict[str, Any]
    date: str
    command: str


def write_record(folder: Path, record: Record) -> Path:
    """Write the record into `folder`, in place of an older one."""
    return to_file(folder / NAME, _plain(record), schema=SCHEMA, breaks={'},{"': '},\n{"', '],"': '],\n"'})


def read_record(folder: Path | None = None) -> Record:
    """The record of `folder`, or where that has none the package's own.

    Raises ValueError when neither is there, or the file is damaged.
    """
    return from_file(NAME, folder, parse_record, what="benchmark of detectors", command="detectors")


def to_file(path: Path, fields: Mapping[str, Any], *, schema: int, breaks: Mapping[str, str]) -> Path:
    """Write a record's fields into `path`, in place of an older one; `from_file` reads it.

    `breaks`: text -> the same with the line breaks that put one row on a line. A new run then shows in a diff as the
    rows that it changed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"schema": schema, **fields}, allow_nan=False, separators=(",", ":"))
    for plain, broken in breaks.items():
        text = text.replace(plain, broken)
    atomic_write(path, (text + "\n").encode("ascii"))
    return path


def from_file(
    name: str, folder: Path | None, parse: Callable[[Mapping[str, Any]], RecordT], *, what: str, command: str
) -> RecordT:
    """What `parse` makes of the file `name` of `folder`, or where that has none of the package's own.

    Raises ValueError when neither is there (`aftershock bench COMMAND --rerun` makes one), or the file is damaged.
    """
    own = importlib.resources.files("aftershock.bench") / "records" / name
    places = [own] if folder is None else [folder / name, own]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise ValueError(f"no {what} is on record; make one with: aftershock bench {command} --rerun")
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not a record of the {what} ({error}); restore the file") from None


def fields_of(data: Mapping[str, Any], schema: int) -> dict[str, Any]:
    """A record's fields without its schema. Raises ValueError for another schema than this version's."""
    fields = dict(data)
    if fields.pop("schema", None) != schema:
        raise ValueError(f"schema {data.get('schema')!r}, this version reads {schema}")
    return fields


def parse_record(data: Mapping[str, Any]) -> Record:
    """The record that `write_record` wrote."""
    fields = fields_of(data, SCHEMA)
    fields["rows"] = [_row(row) for row in fields["rows"]]
    fields["traits"] = {name: Traits(**traits) for name, traits in fields["traits"].items()}
    fields["rivals"] = [Rival(**_with_spans(rival)) for rival in fields["rivals"]]
    return Record(**fields)


def checkout_folder() -> Path | None:
    """Where the package's records lie when it runs from a source checkout; None when it is installed elsewhere."""
    return in_checkout("bench/records")


def rounded(value: float) -> float | None:
    """Four digits, more than any interval here deserves; None for a figure without value."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _row(data: Mapping[str, Any]) -> Row:
    fields = _with_spans(data)
    fields["curve"] = [CurvePoint(**point) for point in data["curve"]]
    return Row(**fields)


def _with_spans(fields: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no tuples."""
    return {name: tuple(value) if name.endswith("_span") else value for name, value in fields.items()}


def _plain(value: Any) -> Any:
    """NamedTuples as mappings, plain tuples as lists."""
    if isinstance(value, (Record, Row, Traits, Rival, CurvePoint)):
        return {name: _plain(item) for name, item in value._asdict().items()}
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
