"""The scoreboard: each claim with its verdict on record, or how to get one. rich is imported when it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aftershock.claims.catalog import CLAIMS
from aftershock.claims.claim import Claim, Record
from aftershock.claims.records import read_records
from aftershock.claims.study import rerun_command

if TYPE_CHECKING:
    from rich.console import Console

NOT_RUN, NO_STUDY = "not run", "no study yet"
COLOURS = {"supported": "green", "contradicted": "red", "inconclusive": "yellow", NOT_RUN: "dim", NO_STUDY: "dim"}
GAP = 2
READABLE, SHORTEST = 20, 12
"""Characters of a statement that are shown: at least, or date and command are left out; and then at least."""


def scoreboard(*records: Path) -> list[dict[str, Any]]:
    """One row a verdict, and one for each claim without: JSON-ready, in the order of the catalogue.

    Keys: id, version, source, statement, criterion, scale, verdict (or `not run`, `no study yet`), effect, interval,
    meaning, num_seeds, date, command; None where there is nothing. A record of an earlier version of a criterion has a
    row of its own. `records`: folders beside the package's own.
    """
    found = read_records(*records)
    rows: list[dict[str, Any]] = []
    for claim in CLAIMS:
        judged = found.get(claim.id, [])
        rows += [_row(claim, record) for record in judged if record.version != claim.version]
        current = next((record for record in judged if record.version == claim.version), None)
        rows.append(_row(claim, current))
    return rows


def scoreboard_json(*records: Path) -> str:
    """`scoreboard` as JSON text (a list of its rows)."""
    return json.dumps(scoreboard(*records), indent=1, allow_nan=False)


def print_scoreboard(*records: Path, console: Console | None = None) -> None:
    """The scoreboard as a table, a line on how to read it, and the counts."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    out = Console() if console is None else console
    rows = scoreboard(*records)
    titles = ["claim", "scale", "verdict", "effect [95 %]", "seeds", "date", "command"]
    cells = [_cells(row) for row in rows]
    widths = [max(map(len, column)) + GAP for column in zip(titles, *cells, strict=True)]
    num_shown = len(titles) if out.width - sum(widths) >= READABLE else len(titles) - 2
    room = max(SHORTEST, out.width - sum(widths[:num_shown]))
    shown = titles[:num_shown]
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="dim")
    for title in (shown[0], "statement", *shown[1:]):
        table.add_column(title, no_wrap=True, justify="right" if title in ("effect [95 %]", "seeds") else "left")
    for row, (name, scale, verdict, *rest) in zip(rows, [line[:num_shown] for line in cells], strict=True):
        coloured = Text(verdict, style=COLOURS[verdict])
        table.add_row(name, Text(_shortened(row["statement"], room)), scale, coloured, *map(Text, rest))
    out.print(table)
    counts = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in COLOURS}
    out.print(Text("  ".join(f"{number} {verdict}" for verdict, number in counts.items() if number), style="bold"))
    out.print(
        Text("Verdicts hold at the scale that ran; --json has what each effect means, and each criterion.", "dim")
    )
    out.print(Text("To judge claims on this machine: aftershock claims --run P1 P7, or --run all", "dim"))


def _row(claim: Claim, record: Record | None) -> dict[str, Any]:
    shared = {"id": claim.id, "current_version": claim.version, "source": claim.source}
    if record is None:
        missing = dict.fromkeys(("scale", "effect", "interval", "meaning", "num_seeds", "date"))
        return shared | {
            "version": claim.version,
            "statement": claim.statement,
            "criterion": claim.criterion,
            "verdict": NOT_RUN if claim.trial else NO_STUDY,
            **missing,
            "command": rerun_command(claim) if claim.trial else None,
        }
    names = (
        "version",
        "statement",
        "criterion",
        "verdict",
        "scale",
        "effect",
        "interval",
        "meaning",
        "num_seeds",
        "date",
    )
    return shared | {name: getattr(record, name) for name in names} | {"command": record.command}


def _cells(row: dict[str, Any]) -> list[str]:
    """All of a row but its statement, as text."""
    name = row["id"] if row["version"] == row["current_version"] else f"{row['id']} v{row['version']}"
    seeds = "" if row["num_seeds"] is None else str(row["num_seeds"])
    return [name, row["scale"] or "", row["verdict"], _effect(row), seeds, row["date"] or "", row["command"] or ""]


def _shortened(text: str, room: int) -> str:
    return text if len(text) <= room else text[: room - 3].rstrip() + "..."


def _effect(row: dict[str, Any]) -> str:
    if row["effect"] is None:
        return ""
    interval = "" if row["interval"] is None else f" [{row['interval'][0]:.3g}, {row['interval'][1]:.3g}]"
    return f"{row['effect']:.3g}{interval}"
