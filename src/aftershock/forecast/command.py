"""`aftershock fit`: scores against compute, fitted below a cut-off and scored above it, as a table or JSON.

rich is imported inside the functions.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

if TYPE_CHECKING:
    from rich.table import Table

    from aftershock.forecast.emergence import ScoreFits

SHOWN = {
    "line": "line",
    "sigmoid": "sigmoid",
    "adjusted_logit": "adj. logit",
    "broken_power_law": "broken",
    "mixture": "mixture",
    "forecast": "forecast",
}
"""Families of the table -> their headings."""


@dataclass(frozen=True)
class Fit:
    """Forecast benchmark scores from compute: a CSV with the columns task, model, flops, score, and more if known."""

    file: Positional[Path]
    """CSV: task, score, flops (or params and tokens); better with model, family, chance, high, companion."""
    cutoff: Annotated[float | None, arg(metavar="FLOPS")] = None
    """Fit models up to this compute, score those above; by default four fifths of the runs lie below."""
    at: Annotated[float | None, arg(metavar="FLOPS")] = None
    """Forecast for a new model of this compute; by default for each task's largest."""
    task: Annotated[tuple[str, ...], arg(metavar="TASK ...")] = ()
    """Tasks to fit; all by default."""
    json: bool = False
    """Print {cutoff, fits, refused, notes} as JSON."""

    def run(self) -> int:
        from aftershock.forecast.emergence import fit_scores
        from aftershock.forecast.scores import read_scores

        table = read_scores(self.file)
        fits = fit_scores(table, cutoff=self.cutoff, at=self.at, tasks=self.task)
        if self.json:
            sys.stdout.write(fits_json(fits, table.notes) + "\n")
        else:
            print_fits(fits, table.notes)
        return 0


def fits_json(fits: ScoreFits, notes: list[str]) -> str:
    """The fits as JSON: the fields of `TaskFit` and `Jump`, null where a number is not known."""
    rows = []
    for fit in fits.fits:
        row = fit._asdict() | {"jump": None if fit.jump is None else fit.jump._asdict()}
        row["versus"] = None if fit.versus is None else fit.versus._asdict() | {"told": fit.versus.told}
        rows.append(row)
    return json.dumps(
        _known({"cutoff": fits.cutoff, "fits": rows, "refused": fits.refused, "notes": notes}),
        indent=1,
        allow_nan=False,
    )


def print_fits(fits: ScoreFits, notes: list[str]) -> None:
    """The table, what is to be said of single tasks, and how the forecasts did above the cut-off."""
    from rich.text import Text

    from aftershock.store.console import wide_console

    out = wide_console()
    out.print(fits_table(fits))
    out.print(Text(summary(fits)))
    for fit in fits.fits:
        if fit.sentence:
            out.print(Text(f"{fit.label}: {fit.sentence}"))
    for line in [*fits.refused, *notes]:
        out.print(Text(line, style="dim"))


def fits_table(fits: ScoreFits) -> Table:
    """A row a curve: runs, errors above the cut-off by family, and the forecast at its compute."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("task", overflow="fold", min_width=12)
    for title in ("runs", *SHOWN.values(), "at FLOPs", "score", "90 % interval", "was"):
        table.add_column(title, justify="right", no_wrap=True)
    for fit in fits.fits:
        least = min((value for value in fit.error.values() if not math.isnan(value)), default=math.nan)
        errors = [Text(_short(fit.error[name]), style="bold" if fit.error[name] == least else "") for name in SHOWN]
        interval = f"{_short(fit.low)} to {_short(fit.high)}"
        runs = f"{fit.num_runs}+{fit.num_held_out}"
        at = (f"{fit.flops:.1e}", _short(fit.forecast), interval, _short(fit.actual))
        table.add_row(Text(fit.label), runs, *errors, *at)
    return table


def summary(fits: ScoreFits) -> str:
    """One sentence: error and coverage of the forecasts above the cut-off."""
    scored = [fit for fit in fits.fits if fit.num_held_out]
    start = f"Fitted up to {fits.cutoff:.3g} FLOPs; errors are root mean squares above it, in the score's unit."
    if not scored:
        return f"{start} No run lies above: nothing was scored."
    versus = [fit.versus for fit in scored if fit.versus is not None]
    good = sum(one.difference <= 0 for one in versus)
    told = Counter(one.told for one in versus)
    runs = sum(fit.num_held_out for fit in scored)
    inside = sum(fit.covered * fit.num_held_out for fit in scored) / runs
    return (
        f"{start} Forecast at or below the better of line and sigmoid, chosen in hindsight, on {good} of "
        f"{len(scored)}; where these runs can tell (95 %, over models), better on {told['better']}, worse on "
        f"{told['worse']}. The 90 % intervals hold {inside:.0%} of {runs} scores."
    )


def _short(value: float) -> str:
    if math.isnan(value):
        return "."
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def _known(value: Any) -> Any:
    """The same with None for every number that is not finite."""
    if isinstance(value, dict):
        return {key: _known(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_known(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
