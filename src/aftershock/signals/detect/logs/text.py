"""CSV and JSON lines, of any size, a row at a time."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aftershock.signals.detect.logs.bytestream import lines
from aftershock.signals.detect.logs.rows import Follow, Problems, Row, number

STEPS = ("step", "_step", "global_step", "iteration", "iter", "it", "train/global_step", "trainer/global_step")
"""What logs call the step, in order of preference; compared in lower case."""


def csv_rows(path: Path, follow: Follow | None, problems: Problems) -> Iterator[Row]:
    """Rows of a CSV file with a header line; commas, semicolons or tabs. An empty cell is a missing value.

    Raises ValueError when the file is empty, has no header, or has no column besides the step.
    """
    texts = lines(path, follow, problems)
    first = next((text for text in texts if text.strip()), None)
    if first is None:
        raise ValueError(f"{path}: empty; it needs a header line such as step,loss and one row a step")
    first = first.removeprefix("\ufeff")
    mark = max(",;\t", key=first.count)
    names = [name.strip() for name in next(csv.reader([first], delimiter=mark))]
    if all(number(name) is not None for name in names):
        raise ValueError(f"{path}: the first line holds numbers, not column names; add a line such as step,loss")
    at = _step_column(names)
    columns = [(i, name) for i, name in enumerate(names) if i != at and name]
    if not columns:
        raise ValueError(f"{path}: no column besides {names[0]!r}; add one such as loss, separated by commas")
    if at is None:
        problems.add("step", f"no column named step (there: {', '.join(names)}); rows are counted from 0")
    yield from _cells(texts, mark, names, at, columns, problems)


def _cells(
    texts: Iterator[str],
    mark: str,
    names: list[str],
    at: int | None,
    columns: list[tuple[int, str]],
    problems: Problems,
) -> Iterator[Row]:
    width = len(names)
    counted = -1
    bare = {name for _, name in columns}
    reader = csv.reader(texts, delimiter=mark)
    for cells in _whole(reader, problems):
        if not cells or (cells[0] == names[0] and [c.strip() for c in cells] == names):
            continue  # a blank line; the header again, of a file that was appended to or started anew
        where = f"line {reader.line_num + 1}"
        counted += 1
        step = counted if at is None else _step(cells[at] if at < len(cells) else "", where, problems)
        if step is None:
            continue
        if len(cells) != width:
            problems.add("width", f"{where}: {len(cells)} cells under {width} columns; read as far as they go")
        values = {}
        for i, name in columns:
            cell = cells[i] if i < len(cells) else ""
            try:
                values[name] = float(cell)
                bare.discard(name)
            except ValueError:
                if cell.strip():
                    problems.add(f"cell {name}", f"{where}: {name} is {cell.strip()[:40]!r}, not a number; left out")
        yield Row(where, step, values)
    for name in [name for _, name in columns if name in bare and counted >= 0]:
        problems.add(f"empty {name}", f"column {name} has no number in any row; left out")


def _whole(reader: Any, problems: Problems) -> Iterator[list[str]]:
    """The rows of a CSV reader, up to one that its format does not allow, such as a quote that never ends."""
    try:
        yield from reader
    except csv.Error as error:
        problems.add("quote", f"line {reader.line_num + 1}: {error}; read up to there")


def jsonl_rows(path: Path, follow: Follow | None, problems: Problems) -> Iterator[Row]:
    """Rows of a file with one JSON object a line: flat names, or a mapping `values` beside the step (ours).

    Raises ValueError when the file is empty, or none of its lines is a JSON object.
    """
    counted, bad, rows = -1, 0, 0
    for line_number, text in enumerate(lines(path, follow, problems), start=1):
        if not text.strip():
            continue
        where = f"line {line_number}"
        try:
            record = json.loads(text)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            bad += 1
            problems.add("line", f"{where} is not a JSON object; left out")
            if rows == 0 and bad >= 100:
                break
            continue
        rows += 1
        counted += 1
        row = _record(record, where, counted, problems)
        if row is not None:
            yield row
    if rows == 0:
        raise ValueError(
            f"{path}: "
            + ("no line is a JSON object; write one object a line" if bad else "empty; nothing to detect in")
        )


def _record(record: dict[str, Any], where: str, counted: int, problems: Problems) -> Row | None:
    key = next((name for name in STEPS if name in record), None)
    key = key or next((name for name in record if name.lower() in STEPS), None)
    if key is None:
        problems.add("step", f"{where} has no step (there: {', '.join(record)[:200]}); rows are counted from 0")
    step = counted if key is None else _step(record[key], where, problems)
    if step is None:
        return None
    inner = record.get("values")
    source = inner if isinstance(inner, dict) else record
    values = {}
    for name, cell in source.items():
        if name == key or cell is None or isinstance(cell, (dict, list, bool)):
            continue
        value = number(cell)
        if value is not None:
            values[name] = value
        elif cell != "":
            problems.add(f"cell {name}", f"{where}: {name} is {str(cell)[:40]!r}, not a number; left out")
    return Row(where, step, values)


def _step_column(names: list[str]) -> int | None:
    lower = [name.lower() for name in names]
    return next((lower.index(name) for name in STEPS if name in lower), None)


def _step(cell: Any, where: str, problems: Problems) -> int | None:
    if isinstance(cell, str) and cell.isdecimal():
        return int(cell)
    value = number(cell)
    if value is None or not math.isfinite(value):
        problems.add("step cell", f"{where}: the step is {str(cell)[:40]!r}, not a number; the row is left out")
        return None
    return int(value)
