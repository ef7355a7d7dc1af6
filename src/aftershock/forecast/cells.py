"""Lines of anybody's CSV file, each with where it stands, for messages that say so. Knows no column."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path


def csv_lines(path: Path, *, columns: str) -> Iterator[tuple[str, list[str]]]:
    """Where a line stands ("FILE line 3") and its cells without spaces around them; empty lines are passed over.

    Raises ValueError when the file is missing (the message names the `columns` to give), not text, or no CSV.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; give a CSV file with the columns {columns}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as a CSV text file: {error}") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    try:
        for cells in reader:
            stripped = [cell.strip() for cell in cells]
            if stripped not in ([], [""]):
                yield f"{path} line {reader.line_num}", stripped
    except csv.Error as error:
        raise ValueError(f"{path} line {reader.line_num}: not readable as CSV: {error}") from None
