"""The benchmark of precursors as text: headline, tables for the terminal and for the docs. rich is imported inside."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from aftershock.bench.indicators import BASELINE
from aftershock.bench.precursors_record import At, Forecaster, PrecursorRow, Precursors, Reliable, Share, plain
from aftershock.store.console import wide_console

if TYPE_CHECKING:
    from rich.console import Console

MAIN = (
    *("indicator", "read as", "area [95 %]", "early at 1", "lead at 1"),
    *("early at 10", "lead at 10", "false at 10", "unseen early at 10", "unseen false at 10"),
)
SHORT = ("indicator", "read as", "area", "early at 1", "early at 10 [95 %]", "lead at 10", "false at 10", "unseen")
"""Of the terminal, which is narrower than a page."""
LIVE = ("forecast from", "k", "Brier skill", "log skill", "unseen Brier", "unseen log", "less gradient's z")
RELIABLE = ("forecast from", "k", "claimed between", "mean claimed", "came true [95 %]", "steps")
KINDS = ("spontaneous", "planted")
BEST = 10
"""Rows of the table with the long horizon."""
QUOTED = ("live forecast: loss, gradient", "live forecast: loss, gradient, update")
"""Forecasts whose calibration the docs show."""


def by_horizon(record: Precursors, horizon: int) -> list[PrecursorRow]:
    """Rows of one horizon, the largest share of early warnings at the larger budget first, then the largest area."""
    rows = [row for row in record.rows if row.horizon == horizon]
    return sorted(rows, key=lambda row: (-(row.at[-1].early.value or 0.0), -(row.area or 0.0), row.indicator))


def headline(record: Precursors) -> str:
    """The best indicator and the baseline, on spikes that could be foreseen, and whether the difference is real."""
    rows = by_horizon(record, record.horizons[0])
    base = next(row for row in rows if row.indicator == BASELINE)
    budget = record.budgets[-1]
    best = next(row for row in rows if row.indicator != BASELINE)
    ahead = [row for row in rows if (row.at[-1].gain_early.low or 0.0) > 0]
    told = (
        f"Of the {len(rows) - 1} others {len(ahead)} are ahead of the gradient norm on the runs that they share, by an "
        f"interval above 0: {', '.join(row.indicator for row in ahead)}"
        if ahead
        else f"None of the {len(rows) - 1} others is ahead of the gradient norm by an interval above 0"
    )
    return (
        f"At {budget:g} false alarms per 10,000 healthy steps the gradient norm warns before the onset of "
        f"{share_text(base.at[-1].early)} of the spikes that could be foreseen, {lead_text(base.at[-1])} steps ahead; "
        f"the best, {best.indicator}, of {share_text(best.at[-1].early)}, {lead_text(best.at[-1])} steps ahead. {told}."
    )


def share_text(share: Share, digits: int = 2) -> str:
    """A share with its interval, a dash where it has no value."""
    if share.value is None:
        return "-"
    low, high = ("-" if end is None else f"{end:.{digits}f}" for end in (share.low, share.high))
    return f"{share.value:.{digits}f} [{low}, {high}]"


def lead_text(at: At) -> str:
    """Median and quartiles of the lead."""
    low, middle, high = at.lead
    if low is None or middle is None or high is None:
        return "-"
    return f"{middle:g} ({low:g} to {high:g})"


def main_cells(row: PrecursorRow) -> list[str]:
    """By `MAIN`."""
    last = row.at[-1]
    area = Share(row.area, *row.area_span)
    leads = [cell for at in row.at for cell in (share_text(at.early), lead_text(at))]
    falses = [last.false_rate.value, last.out_false_rate.value]
    false, unseen = ("-" if value is None else f"{value:.1f}" for value in falses)
    return [row.indicator, row.way, share_text(area), *leads, false, share_text(last.out_early), unseen]


def short_cells(row: PrecursorRow) -> list[str]:
    """By `SHORT`."""
    first, last = row.at[0], row.at[-1]
    numbers = (row.area, first.early.value, last.out_early.value)
    area, early, unseen = ("-" if value is None else f"{value:.2f}" for value in numbers)
    false = "-" if last.false_rate.value is None else f"{last.false_rate.value:.1f}"
    return [row.indicator, row.way, area, early, share_text(last.early), lead_text(last), false, unseen]


def cause_cells(row: PrecursorRow, causes: Sequence[str]) -> list[str]:
    """At the larger budget: by kind, caught at lead >= 1 of those that could be; by cause, by the peak of all."""
    groups = row.at[-1].groups
    ahead = [f"{groups[kind].caught}/{groups[kind].catchable}" if kind in groups else "" for kind in KINDS]
    by_peak = [f"{groups[name].by_peak}/{groups[name].targets}" if name in groups else "" for name in causes]
    return [row.indicator, *ahead, *by_peak]


def live_cells(one: Forecaster) -> list[str]:
    """By `LIVE`."""
    skills = (one.brier_skill, one.log_skill, one.unseen_brier_skill, one.unseen_log_skill, one.gain_over_gradient)
    return [one.name.removeprefix("live forecast: "), str(one.k), *map(share_text, skills)]


def reliable_cells(one: Forecaster, bin_: Reliable) -> list[str]:
    """By `RELIABLE`."""
    name = one.name.removeprefix("live forecast: ")
    spread = f"{bin_.low:g} to {bin_.high:g}"
    return [name, str(one.k), spread, f"{bin_.claimed:.3f}", share_text(bin_.seen, 3), f"{bin_.count:,}"]


def legend(record: Precursors) -> str:
    """On what the figures rest."""
    kinds: dict[str, int] = {}
    for entry in record.specimens.values():
        kinds[entry["kind"]] = kinds.get(entry["kind"], 0) + 1
    names = ", ".join(f"{number} {kind}" for kind, number in kinds.items())
    runs, targets, steps = (
        sum(entry[key] for entry in record.specimens.values()) for key in ("runs", "targets", "healthy_steps")
    )
    return (
        f"{runs} runs of {len(record.specimens)} specimens ({names}), {targets} spikes, {steps:,} healthy steps; tuned "
        f"on seeds {_listed(record.tuning_seeds)}, scored on {_listed(record.scoring_seeds)}. Every row is of the runs "
        "that have its signal. early: share of the spikes that open before their onset (a planted fault does not) "
        "which had an alarm before it; lead: steps from the first alarm to the onset, median (quartiles), of the "
        "spikes with an alarm by their peak, below 0 after the onset; at 1, at 10: with the threshold that kept to so "
        "many false alarms per 10,000 healthy steps on the tuning seeds; false: those on the scoring seeds; unseen: "
        "each specimen with way and threshold chosen without it. Brackets: 95 % bootstrap intervals over runs, one by "
        "one, not over all rows at once."
    )


def markdown(record: Precursors) -> str:
    """The docs' section: headline, all indicators, by cause, the long horizon, the live forecast, its calibration."""
    short, long = record.horizons[0], record.horizons[-1]
    rows = by_horizon(record, short)
    causes = {name for row in rows for name in row.at[-1].groups} - {*KINDS}
    ordered = sorted(causes, key=lambda cause: int(cause[1:]))
    rest = [one for one in record.forecasters if one.name in QUOTED]
    parts = [
        headline(record),
        f"### All indicators, {short} steps ahead",
        _table(MAIN, [main_cells(row) for row in rows]),
        legend(record),
        "### By kind and cause",
        f"At {record.budgets[-1]:g} false alarms per 10,000 healthy steps. By kind: caught a step or more before the "
        "peak, of those that could be; by cause: caught by the peak, of all.",
        _table(("indicator", *KINDS, *ordered), [cause_cells(row, ordered) for row in rows]),
        f"### {long} steps ahead",
        f"The {BEST} with the most early warnings, and the gradient norm.",
        _table(MAIN, [main_cells(row) for row in _best(by_horizon(record, long))]),
        "### The live forecast",
        _table(LIVE, [live_cells(one) for one in record.forecasters]),
        "Skill is 1 - score / score of the base rate; unseen: each specimen by a model without it; less gradient's z: "
        "unseen log skill less that of the gradient norm's robust z alone.",
        _table(RELIABLE, [reliable_cells(one, bin_) for one in rest for bin_ in one.unseen_reliability]),
    ]
    return "\n\n".join(parts) + "\n"


def print_precursors(record: Precursors, *, console: Console | None = None) -> None:
    """Headline, the indicators, the live forecast, and on what they rest."""
    from rich.table import Table
    from rich.text import Text

    out = wide_console() if console is None else console
    out.print(Text(headline(record), "bold"))
    tables = (
        (SHORT, [short_cells(row) for row in by_horizon(record, record.horizons[0])]),
        (LIVE, [live_cells(one) for one in record.forecasters]),
    )
    for titles, rows in tables:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for place, title in enumerate(titles):
            justify: Literal["left", "right"] = "left" if place < 2 else "right"
            table.add_column(title, overflow="fold", justify=justify, no_wrap=place > 0, min_width=0 if place else 24)
        for row in rows:
            table.add_row(*map(Text, row))
        out.print(table)
    out.print(Text(legend(record), "dim"))
    for name, why in record.missing.items():
        out.print(Text(f"not judged: {name}: {why}", "dim"))


def precursors_json(record: Precursors) -> str:
    """The record as JSON text."""
    return json.dumps(plain(record) | {"headline": headline(record)}, indent=1, allow_nan=False)


def _best(rows: Sequence[PrecursorRow]) -> list[PrecursorRow]:
    return [*rows[:BEST], *(row for row in rows[BEST:] if row.indicator == BASELINE)]


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    left = "|---|" + "--:|" * (len(titles) - 1)
    cells = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    return "\n".join([f"| {' | '.join(titles)} |", left, *(f"| {row} |" for row in cells)])


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))
