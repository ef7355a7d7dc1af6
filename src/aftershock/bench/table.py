"""The record as text: a table for the terminal, the standing in words, and JSON. rich is imported inside."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from aftershock.bench.records import Record, Row
from aftershock.bench.words import headline, standing
from aftershock.signals.detect.registry import OURS
from aftershock.store.console import wide_console

if TYPE_CHECKING:
    from rich.console import Console

SHORT = {
    "loss/train/mean": "loss",
    "grad/all/norm": "gradient",
    "update/all/norm": "update",
    "optim/max/rms_t": "RMS_t",
    "optim/max/rms_t_share": "RMS_t share",
    "grad/embed/over_median": "embedding",
    "output/log_z": "log Z",
    "attention/max/logit": "logit",
    "curvature/all/directional": "curvature",
}
"""Signals as the table names them."""
MANY = 3
"""Signals from which on their number is shown."""


def ordered_rows(record: Record) -> list[Row]:
    """The rows of the main table, each detector's together, the best area at lead >= 1 first."""
    rows = [row for row in record.rows if row.setup in ("default", "tuned", "combined")]
    best = {row.detector: 0.0 for row in rows}
    for row in rows:
        best[row.detector] = max(best[row.detector], row.area[1])
    return sorted(rows, key=lambda row: (-best[row.detector], row.detector))


def signals_text(row: Row) -> str:
    """The signals of a row in words."""
    names = [SHORT.get(signal, signal) for signal in row.signals]
    return ", ".join(names) if len(names) <= MANY else f"{names[0]} and {len(names) - 1} more"


def nan_text(after: dict[str, Any]) -> str:
    """What a detector does on one NaN and after it."""
    words = ["event" if after["event"] else "missed"]
    if after["false_alarms"]:
        words.append(f"{after['false_alarms']} false")
    if after["sees_spike"] and after["armed_after"] != 0:
        words.append("deaf for good" if after["armed_after"] is None else f"deaf for {after['armed_after']}")
    return ", ".join(words)


def figure_text(value: float | None, digits: int = 2) -> str:
    """A figure with so many decimals, a dash where it has no value."""
    return "-" if value is None else f"{value:.{digits}f}"


def span_text(value: float | None, span: tuple[float | None, float | None], digits: int = 2) -> str:
    """A figure with its interval."""
    return f"{figure_text(value, digits)} [{figure_text(span[0], digits)}, {figure_text(span[1], digits)}]"


def record_json(record: Record) -> str:
    """The record with headline and standing, as JSON text."""
    rows = [{**row._asdict(), "curve": [point._asdict() for point in row.curve]} for row in record.rows]
    data = record._asdict() | {
        "rows": rows,
        "traits": {name: traits._asdict() for name, traits in record.traits.items()},
        "rivals": [rival._asdict() for rival in record.rivals],
        "headline": headline(record),
        "standing": standing(record)._asdict(),
    }
    return json.dumps(data, indent=1, allow_nan=False)


def print_record(record: Record, *, console: Console | None = None) -> None:
    """The headline, the table, the recorded spikes, and where ours stands."""
    from rich.table import Table
    from rich.text import Text

    out = wide_console() if console is None else console
    out.print(Text(headline(record), "bold"))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("detector", no_wrap=True)
    for title in ("set-up", "signals"):
        table.add_column(title, overflow="fold")
    for title in ("area [95 %]", "recall", "precision", "false", "onset", "peak", "us", "BLOOM"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("after a NaN", overflow="fold")
    previous = ""
    for row in ordered_rows(record):
        traits = record.traits[row.detector]
        new = row.detector != previous
        table.add_row(
            Text(row.detector if new else "", "bold" if row.detector == OURS else ""),
            *(Text(text) for text in (row.setup, signals_text(row), span_text(row.area[1], row.area_span))),
            *(Text(figure_text(value)) for value in (row.recall[1], row.precision[1])),
            *(Text(figure_text(value, 1)) for value in (row.false_rate, row.lead_onset, row.lead_peak)),
            *(Text(text if new else "") for text in (f"{traits.microseconds:.1f}", bloom_text(traits.bloom))),
            Text(nan_text(traits.after_nan) if new else ""),
        )
        previous = row.detector
    out.print(table)
    out.print(Text(legend(record), "dim"))
    found = standing(record)
    for title, sentences in (("Ours leads", found.ahead), ("level", found.level), ("Ours loses", found.behind)):
        for sentence in sentences:
            out.print(Text.assemble((f"{title}: ", "bold"), sentence))


def bloom_text(seen: list[dict[str, Any]]) -> str:
    """Steps before the BLOOM peak of the first alarm, on the signal where it comes first."""
    leads = [entry["lead"] for entry in seen if entry["lead"] is not None]
    return f"{max(leads):g}" if leads else "never" if seen else "-"


def legend(record: Record) -> str:
    """How to read the columns, and on what they rest."""
    kinds: dict[str, int] = {}
    for entry in record.specimens.values():
        kinds[entry["kind"]] = kinds.get(entry["kind"], 0) + 1
    runs = sum(entry["runs"] for entry in record.specimens.values())
    spikes = sum(entry["catchable"] for entry in record.specimens.values())
    steps = sum(entry["healthy_steps"] for entry in record.specimens.values())
    names = ", ".join(f"{number} {kind}" for kind, number in kinds.items())
    return (
        f"{runs} runs of {len(record.specimens)} specimens ({names}), {spikes} spikes that lead >= 1 can catch, "
        f"{steps:,} healthy steps; tuned on seeds {_listed(record.tuning_seeds)}, scored on "
        f"{_listed(record.scoring_seeds)}. Area, recall and precision at lead >= 1; false: false alarms per 10,000 "
        "healthy steps; onset, peak: median steps from the first alarm to it; us: microseconds an update; BLOOM: steps "
        "before its peak, published settings. All precise definitions: bench/scoring.py."
    )


def _listed(seeds: list[int]) -> str:
    return ", ".join(map(str, seeds))


def markdown(record: Record) -> str:
    """The docs' section: the headline, each detector at its best set-up, how to read it, and where ours loses."""
    titles = ("detector", "signals", "area [95 %]", "recall", "precision", "false", "onset", "peak", "BLOOM")
    lines = [headline(record), "", f"| {' | '.join(titles)} |", "|---|---|" + "--:|" * (len(titles) - 2)]
    best: dict[str, Row] = {row.detector: row for row in ordered_rows(record) if row.setup != "default"}
    for row in best.values():
        cells = (
            *(row.detector, signals_text(row), span_text(row.area[1], row.area_span)),
            *(figure_text(value) for value in (row.recall[1], row.precision[1])),
            *(figure_text(value, 1) for value in (row.false_rate, row.lead_onset, row.lead_peak)),
            bloom_text(record.traits[row.detector].bloom),
        )
        lines.append(f"| {' | '.join(cells)} |")
    losses = [f"- {sentence}" for sentence in standing(record).behind]
    return "\n".join([*lines, "", legend(record), "", "Where ours loses:", "", *losses]) + "\n"
