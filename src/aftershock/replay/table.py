"""An explanation for the terminal: the verdict in words, the evidence, the cells, and where and when it began.

rich is imported inside. Must not import the runner: it shows what was found, it asks nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from aftershock.causes import CAUSES
from aftershock.replay.response import Effect, spike_of
from aftershock.replay.written import Side, shams, side_of
from aftershock.store.console import wide_console

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from aftershock.replay.edits.rows import Guilty
    from aftershock.replay.explain import Asked, Explanation
    from aftershock.replay.verdict import Ranked, Verdict

LEAST_SHARE, MOST_CLASSES = 0.01, 5
"""Classes that are shown: the first two, and of those with at least this share at most so many."""
SIGNS: dict[Side, str] = {"for": "+", "against": "-", "": "."}
SPIKES = ("gone", "later", "stays", None)
"""In the order of the table."""
UNITS = {"log": "in ln of the loss", "sigma": "in spreads of the calm loss"}
MOST_SPANS = 12
"""Runs of guilty rows that are listed a batch."""


def print_explanation(explanation: Explanation, *, console: Console | None = None) -> None:
    """The ranked verdict, evidence for and against, the remedy, the cells with the shams' line, and the parts.

    Example:
        print_explanation(replay("guard/incidents/812-spike", workload))
    """
    from rich.text import Text

    out = wide_console() if console is None else console
    found = explanation
    out.print(Text(found.words, "bold"))
    out.print()
    out.print(Text(f"{window_words(found)} {found.controls.words}"))
    _print_classes(found, out)
    _print_evidence(found, out)
    _print_remedies(found, out)
    _print_cells(found, out)
    for title, words in parts_words(found):
        out.print(Text.assemble((f"\n{title}\n", "bold"), words))
    for note in found.notes:
        out.print(Text(f"note: {note}", "dim"))


# ------------------------------------------------------------------------------------------- words, for pages too


def window_words(explanation: Explanation) -> str:
    """Where the spike lay and how high it was."""
    window, base = explanation.window, explanation.baseline
    calm = f"a calm loss of {base.calm_loss:.4g}"
    top = explanation.recorded.get(window.peak, math.nan)
    height = f"from {calm} to {top:.4g}" if math.isfinite(top) else f"from {calm} to one that is not finite"
    if math.isnan(top):
        height = f"over {calm}"
    known = max(explanation.recorded, default=window.end) >= window.end
    lasted = f"calm again at step {window.end}" if known else "not calm again on record"
    return (
        f"The spike begins at step {window.onset} and peaks at step {window.peak}, {height}, {lasted}; replays start "
        f"at step {window.start}."
    )


def shown_classes(verdict: Verdict) -> Sequence[Ranked]:
    """The classes worth showing: the first two, and more where their shares are."""
    likely = [one for one in verdict.ranked if one.share >= LEAST_SHARE]
    return verdict.ranked[: max(2, min(MOST_CLASSES, len(likely)))]


def ordered(explanation: Explanation) -> list[Asked]:
    """The cells: those without the spike first, each kind by its effect, shams after them, what did not run last."""

    def place(one: Asked) -> tuple[bool, bool, int, float]:
        spike = spike_of(one.response, explanation.window)
        lower = 0.0 if one.effect is None else one.effect.log_peak
        return one.response is None, one.family == "sham", SPIKES.index(spike), lower

    return sorted(explanation.cells, key=place)


def excess_text(value: float | None) -> str:
    """A peak's excess."""
    return "-" if value is None or math.isnan(value) else "not finite" if math.isinf(value) else f"{value:.2f}"


def effect_text(effect: Effect | None) -> str:
    """The effect on the peak with its interval."""
    if effect is None:
        return "-"
    return f"{signed(effect.log_peak)} [{signed(effect.low)}, {signed(effect.high)}]"


def cost_text(value: float) -> str:
    """What a remedy costs on healthy steps."""
    return "-" if math.isnan(value) else f"{value:+.3f}"


def shams_words(explanation: Explanation) -> str:
    """What the shams did: the line that every effect is read from."""
    found = shams(explanation)
    if found is None:
        return "No sham ran, so no effect can be told from chance."
    low, middle, high = (excess_text(_float(found[name])) for name in ("lowest", "median", "highest"))
    return (
        f"Shams: {found['spiking']} of {found['number']} still spike, with peaks from {low} to {high}, median {middle}."
    )


def legend(explanation: Explanation) -> str:
    """How to read the cells."""
    return (
        f"peak: highest excess over the calm loss, {UNITS[explanation.baseline.unit]}; effect: that less the shams' "
        "median, with a 95 % interval; cost: on healthy steps, against an unchanged replay, of changes that a run can "
        "go on with; later: it came after the recorded one was over."
    )


def left_out_words(explanation: Explanation) -> list[str]:
    """Cells that mean nothing for the workload, together where the reason is the same."""
    reasons: dict[str, list[str]] = {}
    for name, reason in explanation.left_out.items():
        reasons.setdefault(reason, []).append(name)
    return [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]


def guilty_words(guilty: Guilty | None) -> str:
    """The rows by step."""
    if guilty is None:
        return ""
    by_step: dict[str, list[int]] = {}
    for row in guilty.rows:
        micro = "" if row.part == 0 else f" of micro-batch {row.part}"
        by_step.setdefault(f"step {row.step}{micro}", []).append(row.row)
    steps = [f"{where}: {_spans(rows)}" for where, rows in by_step.items()]
    smallest = "no row fewer will do" if guilty.smallest else "perhaps fewer would do: the search was cut short"
    rows = "1 row" if len(guilty.rows) == 1 else f"{len(guilty.rows)} rows"
    return f"Without {rows} the spike does not come ({smallest}; {guilty.cells} replays): {'; '.join(steps)}."


def parts_words(explanation: Explanation) -> list[tuple[str, str]]:
    """Title and text of each part that was answered."""
    found: list[tuple[str, str]] = []
    if explanation.places is not None:
        found.append(("Where it began", explanation.places.words()))
    if explanation.no_return is not None:
        found.append(("Until when it could be averted", explanation.no_return.words()))
    if explanation.thinking is not None:
        found.append(("What the model predicted meanwhile", explanation.thinking.verdict))
    if explanation.guilty is not None:
        found.append(("Guilty rows", guilty_words(explanation.guilty)))
    return found


def _spans(rows: Sequence[int]) -> str:
    """Rows in a row as their ends: "rows 0 to 15, 20"."""
    spans: list[list[int]] = []
    for row in sorted(rows):
        if spans and spans[-1][-1] == row - 1:
            spans[-1] = [spans[-1][0], row]
        else:
            spans.append([row])
    texts = [" to ".join(map(str, span)) for span in spans]
    more = f" and {len(texts) - MOST_SPANS} more" if len(texts) > MOST_SPANS else ""
    return f"{'row' if len(rows) == 1 else 'rows'} {', '.join(texts[:MOST_SPANS])}{more}"


def signed(value: float) -> str:
    """A difference."""
    return f"{round(value, 2) + 0.0:+.2f}"  # so that no zero is negative


def _float(value: float | str) -> float:
    return float(value)


# -------------------------------------------------------------------------------------------------------- tables


def _print_classes(found: Explanation, out: Console) -> None:
    from rich.text import Text

    shown = shown_classes(found.verdict)
    if not shown:
        return
    table = _table(("class", "left"), ("share", "right"), ("what it is", "left"), ("nearest form", "left"))
    for i, one in enumerate(shown):
        table.add_row(
            Text(one.cause, "" if i else "bold"), Text(f"{one.share:.0%}"), Text(CAUSES[one.cause]), Text(one.way)
        )
    if found.verdict.unknown >= LEAST_SHARE:
        table.add_row(Text("none", "dim"), Text(f"{found.verdict.unknown:.0%}"), Text("a cause that is none of them"))
    out.print()
    out.print(table)


def _print_evidence(found: Explanation, out: Console) -> None:
    from rich.text import Text

    shown = shown_classes(found.verdict)
    if not found.verdict.answers or not shown:
        return
    titles = [(one.cause, "center") for one in shown]
    table = _table(*titles, ("evidence: + for, - against", "left"), ("from", "left"))
    styles: dict[Side, str] = {"for": "bold green", "against": "bold red", "": "dim"}
    for answer in found.verdict.answers:
        sides: list[Side] = [side_of(answer, one) for one in shown]
        by = "not there to be the cause" if answer.by == "moot" else answer.by
        words = Text(answer.words, "" if any(sides) else "dim")
        table.add_row(*(Text(SIGNS[side], styles[side]) for side in sides), words, Text(by, "dim"))
    out.print()
    out.print(table)


def _print_remedies(found: Explanation, out: Console) -> None:
    from rich.text import Text

    if not found.remedies:
        return
    table = _table(("removes it, smallest change first", "left"), ("cost", "right"), ("to go on", "left"))
    for i, one in enumerate(found.remedies):
        table.add_row(Text(one.cell, "" if i else "bold"), Text(cost_text(one.cost)), Text(one.policy))
    out.print()
    out.print(table)


def _print_cells(found: Explanation, out: Console) -> None:
    from rich.text import Text

    if not found.cells:
        return
    costs = {remedy.cell: remedy.cost for remedy in found.remedies}
    table = _table(
        *(("cell", "left"), ("family", "left"), ("spike", "left"), ("peak", "right")),
        *(("effect [95 %]", "right"), ("cost", "right"), ("seconds", "right")),
    )
    for one in ordered(found):
        spike = spike_of(one.response, found.window)
        style = "green" if spike == "gone" and one.family != "sham" else "dim" if one.family == "sham" else ""
        table.add_row(
            Text(one.name, style),
            Text(one.family, "dim"),
            Text(one.stopped if spike is None else spike, style),
            Text(excess_text(None if one.response is None else one.response.peak_excess)),
            Text(effect_text(one.effect)),
            Text(cost_text(costs.get(one.name, math.nan))),
            Text(f"{one.seconds:.1f}", "dim"),
        )
    out.print()
    out.print(table)
    out.print(Text(shams_words(found)))
    out.print(Text(legend(found), "dim"))
    for line in left_out_words(found):
        out.print(Text(f"not tried: {line}", "dim"))


def _table(*columns: tuple[str, str]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for title, side in columns:
        table.add_column(title, justify=side, overflow="fold")  # pyright: ignore[reportArgumentType]
    return table
