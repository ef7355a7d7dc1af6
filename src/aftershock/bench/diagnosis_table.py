"""The benchmark of verdicts as text: headline, tables for the terminal and for the docs. rich is imported inside."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from aftershock.bench.diagnosis import Incident
from aftershock.bench.diagnosis_record import Diagnoses, confidently_wrong, identical, plain, reliability, within
from aftershock.store.console import wide_console

if TYPE_CHECKING:
    from rich.console import Console

COLUMNS = ("specimen", "true cause", "first", "top two", "decided", "mean share", "bits", "remedies")


def headline(record: Diagnoses) -> str:
    """How often the true cause comes first, how often a verdict is confidently wrong, and what unseen causes do."""
    seen = record.incidents
    wrong = confidently_wrong(record.unseen)
    return (
        f"The true cause is first in {within(seen, 1).words} of the zoo's incidents and among the first two in "
        f"{within(seen, 2).words}; confidently wrong in {confidently_wrong(seen).words}. Unchanged replays have the "
        f"recorded bits in {identical([*seen, *record.unseen]).words}. Of {wrong.total} incidents whose causes are not "
        f"in the zoo {wrong.count} were given a wrong class with confidence."
    )


def rows(incidents: Sequence[Incident]) -> list[list[str]]:
    """One row a specimen, in the order of `COLUMNS`."""
    found = []
    for name in dict.fromkeys(one.specimen for one in incidents):
        own = [one for one in incidents if one.specimen == name and one.spiked]
        if not own:
            found.append([name, "-", *["did not spike"], *["-"] * (len(COLUMNS) - 3)])
            continue
        total = len(own)
        share = sum(one.ranked[0][1] if one.ranked else 0.0 for one in own) / total
        remedies = dict.fromkeys(one.remedy or "none" for one in own)
        found.append(
            [
                name,
                own[0].cause,
                f"{sum(one.place == 1 for one in own)}/{total}",
                f"{sum(one.place in (1, 2) for one in own)}/{total}",
                f"{sum(one.verdict == 'decided' for one in own)}/{total}",
                f"{share:.2f}",
                f"{sum(one.identical for one in own)}/{total}",
                ", ".join(remedies),
            ]
        )
    return found


def markdown(record: Diagnoses) -> str:
    """The tables for the docs."""
    lines = [headline(record), "", f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows(record.incidents)]
    lines += [f"| {' | '.join([f'{row[0]} (unseen)', *row[1:]])} |" for row in rows(record.unseen)]
    lines += ["", "| share claimed | mean | true class first |", "|---|---|---|"]
    for one in reliability(record.incidents):
        lines.append(f"| {one.low:.2f} to {min(one.high, 1.0):.2f} | {one.share:.2f} | {one.right.words} |")
    return "\n".join(lines)


def print_diagnoses(record: Diagnoses, *, console: Console | None = None) -> None:
    """Headline, the table by specimen, the calibration, and on what they rest."""
    from rich.table import Table
    from rich.text import Text

    out = wide_console() if console is None else console
    out.print(Text(headline(record), "bold"))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for i, title in enumerate(COLUMNS):
        table.add_column(title, no_wrap=i == 0, overflow="fold")
    for row in rows(record.incidents):
        table.add_row(*row)
    for row in rows(record.unseen):
        table.add_row(f"{row[0]} (unseen)", *row[1:])
    out.print(table)
    for one in reliability(record.incidents):
        out.print(f"claimed {one.share:.2f} on average, true class first in {one.right.words}")
    out.print(Text(f"seeds {record.seeds}, {record.core_seconds:,} core-seconds, {record.date}", "dim"))


def diagnoses_json(record: Diagnoses) -> str:
    """The record as JSON text."""
    return json.dumps(plain(record), indent=1, allow_nan=False)
