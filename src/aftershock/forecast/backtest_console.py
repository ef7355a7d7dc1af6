"""What `aftershock forecast --backtest` prints: every forecast beside what was found, and how often intervals held.

rich is imported inside the functions; must not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aftershock.forecast.backtest import FAILING, Backtest, Repeat
from aftershock.store.console import wide_console

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from aftershock.forecast.check import Check

SHORT = {
    "early_logit": "logit at 2 %",
    "logit": "logit",
    "abs_log_z": "|log Z|",
    "output_rms": "output RMS",
    "grad_rms": "grad RMS",
}
"""Headings of the quantities."""


def print_backtest(found: Backtest, *, console: Console | None = None) -> None:
    """A row a forecast, then the tallies, and what was refused."""
    from rich.text import Text

    out = wide_console() if console is None else console
    out.print()
    out.print(Text(headline(found), style="bold"))
    out.print()
    out.print(_repeats(found))
    out.print()
    out.print(_tallies(found))
    refused = [(f"{one.target} from up to {one.sizes[-1]}", one.refused) for one in found.repeats if one.refused]
    for what, why in dict.fromkeys(refused):
        out.print(Text(f"Refused, {refused.count((what, why))} times, {what}: {why}", style="dim"))
    for note in found.notes:
        out.print(Text(f"Note: {note}", style="dim"))
    out.print(
        Text(
            f"Rests on {found.study}, arm {found.arm}. Intervals: {found.level:.0%}, for one new run. Rungs of the "
            "ladder of rates, mean over the seeds of the target; the interval of a failing rate holds where it meets "
            "the two rungs between which a seed begins to fail.",
            style="dim",
        )
    )


def headline(found: Backtest) -> str:
    """One sentence."""
    signals = [tally for tally in found.tallies if tally.key != FAILING]
    held, of = sum(tally.held for tally in signals), sum(tally.of for tally in signals)
    said = f"{found.within_a_rung} of {found.num_rungs} failing rates foretold within one rung"
    return said + (f"; {held:,} of {of:,} signals ({held / of:.1%}) within their intervals" if of else "")


def _repeats(found: Backtest) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    keys = [key for key in SHORT if any(tally.key == key for tally in found.tallies)]
    for title in ("size", "from", "seeds", "times N", "fails from", "rungs off", "held", *(SHORT[key] for key in keys)):
        table.add_column(title, justify="left" if title in ("size", "from", "seeds") else "right", no_wrap=True)
    for one in found.repeats:
        if one.check is not None:
            table.add_row(*(Text(cell) for cell in _row(one, one.check, keys)))
    return table


def _row(one: Repeat, check: Check, keys: list[str]) -> list[str]:
    start = [one.target, f"up to {one.sizes[-1]}", " ".join(map(str, one.seeds)), f"{one.times:.3g}"]
    rate = "refused" if one.rate is None else f"{one.rate.value:.2g} ({one.rate.low:.2g} to {one.rate.high:.2g})"
    rungs = "." if check.rungs is None else f"{check.rungs:+.1f}"
    met = f"{sum(seed.inside for seed in check.seeds)}/{len(check.seeds)}" if check.seeds else "."
    return [*start, rate, rungs, met, *(_held(check, key) for key in keys)]


def _held(check: Check, key: str) -> str:
    return next((f"{row.num_inside}/{row.num_runs}" for row in check.quantities if row.key == key), ".")


def _tallies(found: Backtest) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("intervals of", "held", "of", "share", "least and most of one forecast"):
        table.add_column(title, justify="left" if title == "intervals of" else "right")
    for tally in found.tallies:
        cells = (tally.title, f"{tally.held:,}", f"{tally.of:,}", f"{tally.share:.1%}")
        table.add_row(*map(Text, cells), Text(f"{tally.lowest:.0%} to {tally.highest:.0%}"))
    return table
