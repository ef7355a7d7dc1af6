"""What the record says, in sentences: where ours leads and where it loses. Every one is computed from the numbers.

Must not import torch or numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from aftershock.bench.records import Record, Row, Span
from aftershock.bench.scoring import BUDGET
from aftershock.signals.detect.registry import OURS

BUDGET_US = 5.0
"""Microseconds an update may take."""


class Standing(NamedTuple):
    """Sentences on what ours does better than every other detector, no worse than the best, and worse than some."""

    ahead: list[str]
    level: list[str]
    behind: list[str]


class _Figure(NamedTuple):
    """One figure of merit: how to read it of a row, and whether more is better."""

    name: str
    read: Callable[[Row], float | None]
    span: Callable[[Row], Span]
    more: bool
    unit: str = ""


_FIGURES = (
    _Figure("area under the precision-recall curve at lead >= 1", lambda r: r.area[1], lambda r: r.area_span, True),
    _Figure("that area within 1 false alarm per 10,000 healthy steps", lambda r: r.area_in_budget,
            lambda r: r.area_in_budget_span, True),
    _Figure("recall at lead >= 1 within 1 false alarm per 10,000 healthy steps", lambda r: r.recall_in_budget,
            lambda r: r.recall_in_budget_span, True),
    _Figure("precision at lead >= 1 at the tuned setting", lambda r: r.precision[1], lambda r: r.precision_span, True),
    _Figure("false alarms per 10,000 healthy steps at the tuned setting", lambda r: r.false_rate,
            lambda r: r.false_rate_span, False),
    _Figure("median lead to the onset at the tuned setting", lambda r: r.lead_onset, lambda r: r.lead_onset_span, True,
            " steps"),
    _Figure("median lead to the peak at the tuned setting", lambda r: r.lead_peak, lambda r: r.lead_peak_span, True,
            " steps"),
)  # fmt: skip
LEAST_RECALL = 0.5
"""Figures at the tuned setting are compared among detectors with at least this share of our recall and no more false
alarms than the budget or ours: one that is silent has no false alarm, and one that always alarms the longest lead."""


def best_row(record: Record, detector: str) -> Row | None:
    """The detector's set-up that did best on the tuning seeds: `combined` is on record only where it beat `tuned`."""
    rows = [row for row in record.rows if row.detector == detector and row.setup in ("tuned", "combined")]
    return rows[-1] if rows else None


def standing(record: Record) -> Standing:
    """Ours against the best other detector, figure by figure."""
    ours = best_row(record, OURS)
    found = Standing([], [], [])
    if ours is None:
        return found
    others = [row for name in record.traits if name != OURS and (row := best_row(record, name)) is not None]
    for figure in _FIGURES:
        _compare(found, figure, ours, others)
    _compare_on_record(found, record)
    _compare_after_nan(found, record)
    _compare_cost(found, record)
    _compare_specimens(found, record, ours, others)
    return found


def headline(record: Record) -> str:
    """The one sentence on top: the area at lead >= 1 of ours and of the best other detector."""
    ours = best_row(record, OURS)
    if ours is None or not record.rivals:
        return "No detector of ours is on record."
    rival = min(record.rivals, key=lambda r: r.area)
    low, high = rival.area_span
    apart = low is not None and high is not None and (low > 0 or high < 0)
    verb = "leads" if rival.area > 0 else "trails" if rival.area < 0 else "equals"
    other = best_row(record, rival.detector)
    assert other is not None
    how = f"[{_text(low)}, {_text(high)}]" + ("" if apart else ", which is within the noise")
    return (
        f"Ours {verb} the best other detector, {rival.detector}, in area under the precision-recall curve at lead "
        f">= 1: {_text(ours.area[1])} against {_text(other.area[1])}, a difference of {rival.area:+.3f} {how}."
    )


def _compare(found: Standing, figure: _Figure, ours: Row, others: Iterable[Row]) -> None:
    mine = figure.read(ours)
    tuned = "tuned setting" in figure.name
    least, most = LEAST_RECALL * (ours.recall[1] or 0), max(BUDGET, ours.false_rate)
    enough = [r for r in others if not tuned or ((r.recall[1] or 0) >= least > 0 and r.false_rate <= most)]
    known = [(value, row) for row in enough if (value := figure.read(row)) is not None]
    if mine is None or not known:
        return
    best, row = (max if figure.more else min)(known, key=lambda pair: pair[0])
    sign = 1 if figure.more else -1
    where = found.ahead if sign * (mine - best) > 0 else found.behind if sign * (mine - best) < 0 else found.level
    where.append(
        f"{figure.name}: {_text(mine)}{figure.unit} {_spanned(figure.span(ours))} against {_text(best)}{figure.unit} "
        f"{_spanned(figure.span(row))} of {row.detector}"
    )


def _compare_on_record(found: Standing, record: Record) -> None:
    """First to fire on the recorded BLOOM spike, published settings, of those quieter than 1 in 1,000 before it."""
    earliest: dict[str, tuple[float, float]] = {}
    for name, traits in record.traits.items():
        quiet = [
            (s["lead"], -s["false_per_1000"]) for s in traits.bloom if s["lead"] is not None and s["false_per_1000"] < 1
        ]
        if quiet:
            earliest[name] = max(quiet)
    mine = earliest.pop(OURS, None)
    if mine is None:
        found.behind.append("BLOOM-176B: no alarm up to the peak")
        return
    best = max((lead for lead, _ in earliest.values()), default=-1.0)
    names = ", ".join(name for name, (lead, _) in earliest.items() if lead == best)
    where = found.ahead if mine[0] > best else found.behind if mine[0] < best else found.level
    where.append(
        f"BLOOM-176B: first alarm {mine[0]:g} steps before the peak, {-mine[1]:.2g} false alarms per 1,000 quiet "
        f"steps; {best:g} steps by {names or 'no other'}"
    )


def _compare_after_nan(found: Standing, record: Record) -> None:
    def good(name: str) -> bool:
        after = record.traits[name].after_nan
        return after["event"] and after["false_alarms"] == 0 and after["armed_after"] == 0

    others = [name for name in record.traits if name != OURS and good(name)]
    where = (found.level if others else found.ahead) if good(OURS) else found.behind
    where.append(
        f"one NaN: ours {'alarms on it, has no false alarm after it and is armed at once' if good(OURS) else 'fails'}; "
        f"so do {len(others)} of {len(record.traits) - 1} others" + (f" ({', '.join(others)})" if others else "")
    )


def _compare_cost(found: Standing, record: Record) -> None:
    mine = record.traits[OURS].microseconds
    faster = [name for name, traits in record.traits.items() if traits.microseconds < mine]
    sentence = f"cost: {mine:.1f} microseconds an update; {len(faster)} of {len(record.traits) - 1} others take less"
    over = f", and it is over the {BUDGET_US:g} that were allowed" if mine > BUDGET_US else ""
    (found.behind if faster else found.ahead).append(sentence + over)


def _compare_specimens(found: Standing, record: Record, ours: Row, others: Iterable[Row]) -> None:
    for specimen, mine in ours.caught.items():
        of = record.specimens[specimen]["catchable"]
        within = [row for row in others if row.false_rate <= max(record.definition["budget"], ours.false_rate)]
        best = max(within, key=lambda row: row.caught.get(specimen, 0), default=None)
        if best is not None and best.caught.get(specimen, 0) > mine:
            found.behind.append(
                f"specimen {specimen}: {mine} of {of} spikes caught at lead >= 1, {best.detector} has "
                f"{best.caught[specimen]} with no more false alarms than the budget or ours"
            )


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _spanned(span: Span) -> str:
    return f"[{_text(span[0])}, {_text(span[1])}]"
