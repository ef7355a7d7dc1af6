"""TensorBoard event files and W&B offline runs, a row at a time, with neither package needed."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

from aftershock.signals.detect.logs import wire
from aftershock.signals.detect.logs.bytestream import chunks
from aftershock.signals.detect.logs.rows import Follow, Problems, Row, number

OUR_STEP = "aftershock/step"
"""Our tracker adapters send the run's own step as a metric; it wins over the tracker's."""


def tensorboard_rows(paths: list[Path], follow: Follow | None, problems: Problems) -> Iterator[Row]:
    """Scalars of event files, in the order of their names, which begin with their time; the last one is followed."""
    for i, path in enumerate(paths):
        last = i == len(paths) - 1
        held: Row | None = None  # one event per tag: join those of one step
        try:
            for count, record in enumerate(wire.tfrecords(chunks(path, follow if last else None, problems))):
                row = _event(record, f"{path.name}, record {count + 1}")
                if row is None:
                    continue
                if held is not None and held.step == row.step and not held.values.keys() & row.values.keys():
                    held.values.update(row.values)
                    continue
                if held is not None:
                    yield held
                held = row
        except wire.Damaged as error:
            problems.add("damaged", f"{path.name} is damaged ({error}); read up to there")
        if held is not None:
            yield held


def _event(record: bytes, where: str) -> Row | None:
    """An Event message: step is field 2, summary field 5."""
    step, values = 0, {}
    for field, value in wire.fields(record):
        if field == 2 and isinstance(value, int):
            step = wire.signed(value)
        elif field == 5 and isinstance(value, bytes):
            for inner, content in wire.fields(value):
                if inner == 1 and isinstance(content, bytes):
                    values.update(_summary_value(content))
    return Row(where, step, values) if values else None


def _summary_value(data: bytes) -> dict[str, float]:
    """A Summary.Value: tag 1, simple_value 2 (float), tensor 8 (of one float or double, as newer writers have it)."""
    tag, found = "", None
    for field, value in wire.fields(data):
        if not isinstance(value, bytes):
            continue
        if field == 1:
            tag = value.decode("utf-8", errors="replace")
        elif field == 2 and len(value) == 4:
            found = struct.unpack("<f", value)[0]
        elif field == 8:
            found = _tensor(value)
    return {} if found is None else {tag: found}


def _tensor(data: bytes) -> float | None:
    """A TensorProto of one number: dtype 1 (float 1, double 2), content 4, float_val 5, double_val 6."""
    kind, content = 0, b""
    for field, value in wire.fields(data):
        if field == 1 and isinstance(value, int):
            kind = value
        elif field in (4, 5, 6) and isinstance(value, bytes):
            content = value
    form = {1: "<f", 2: "<d"}.get(kind)
    if form is None or len(content) != struct.calcsize(form):
        return None
    return struct.unpack(form, content)[0]


def wandb_rows(path: Path, follow: Follow | None, problems: Problems) -> Iterator[Row]:
    """History of a W&B `.wandb` file: Record.history is field 2, its items field 1, its step field 2.

    Raises ValueError when it is no such file.
    """
    first = True
    try:
        for count, record in enumerate(wire.leveldb_records(chunks(path, follow, problems))):
            first = False
            for field, value in wire.fields(record):
                if field == 2 and isinstance(value, bytes):
                    row = _history(value, f"record {count + 1}")
                    if row is not None:
                        yield row
    except wire.Damaged as error:
        if first:
            raise ValueError(f"{path}: not a W&B run ({error}); give the file run-ID.wandb of an offline run") from None
        problems.add("damaged", f"damaged ({error}); read up to there")


def _history(data: bytes, where: str) -> Row | None:
    step, values = None, {}
    for field, value in wire.fields(data):
        if not isinstance(value, bytes):
            continue
        if field == 1:
            name, cell = _item(value)
            found = number(cell)
            if found is not None:
                values[name] = found
        elif field == 2:
            for inner, content in wire.fields(value):
                if inner == 1 and isinstance(content, int):
                    step = wire.signed(content)
    ours = values.pop(OUR_STEP, None)
    theirs = values.pop("_step", None)
    step = ours if ours is not None else step if step is not None else theirs
    values = {name: value for name, value in values.items() if not name.startswith("_")}
    return Row(where, int(step or 0), values) if values else None


def _item(data: bytes) -> tuple[str, object]:
    """A HistoryItem: key 1, nested_key 2 (repeated), value_json 16; NaN and infinities are spelled as JSON or text."""
    parts, text = [], ""
    for field, value in wire.fields(data):
        if isinstance(value, bytes):
            if field in (1, 2):
                parts.append(value.decode("utf-8", errors="replace"))
            elif field == 16:
                text = value.decode("utf-8", errors="replace")
    try:
        cell = json.loads(text)
    except ValueError:
        cell = None
    return ".".join(part for part in parts if part), cell
