"""`aftershock forecast` and `aftershock plan`: a size never trained, a run's end from its start, a run under way; and
which small runs would say more.

rich is imported inside the functions; must not import torch at the top.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from aftershock.forecast.fits import Interval
    from aftershock.forecast.outlook import Outlook
    from aftershock.forecast.plan import Plan as PlanResult

WritePage = Callable[["Outlook", Path], Path]
"""Writes the page of a forecast into a folder; returns its path. `report.forecast.write_forecast_page` is one."""
PAGES = Path("out/forecast")
WIDE = 110
"""Terminal columns from which on the table tells of the fits too."""
FIRST_SEED = 100
"""A plan's new seeds start here, out of the way of a study's own 0, 1, 2, ..."""


@dataclass(frozen=True)
class Forecast:
    """Forecast the failing rate and the signals of a size never trained (--to), a run's end from its first steps
    (--early), or what a run under way is about to do (--live); or try such forecasts on sizes trained (--backtest)."""

    studies: Positional[Annotated[tuple[str, ...], arg(metavar="STUDY ...")]]
    """Study folders, whose runs are taken together; with --live the folder or log of one run."""
    to: Annotated[str, arg(metavar="SIZE")] = ""
    """The size to forecast: WIDTHxDEPTH[xHEADS], or 2.4M ... 4.8B of the paper's family."""
    arm: Annotated[str, arg(metavar="ARM")] = ""
    """Arm of the studies; needed where there are several."""
    lr: Annotated[float | None, arg(metavar="RATE")] = None
    """Peak rate to forecast the signals at; the best rate of the largest size trained if left out."""
    early: bool = False
    """Score what the first steps of these runs told of their ends, and give each run a probability of failing."""
    at: Annotated[int | None, arg(metavar="STEP")] = None
    """The step that --early looks at; the first one measured at 2 % of the run if left out."""
    backtest: bool = False
    """Forecast each size of these studies from smaller ones, repeatedly, and count how often the intervals held."""
    fit_seeds: Annotated[int | None, arg(metavar="SEEDS")] = None
    """Seeds that one forecast of --backtest may see; 3 if left out."""
    live: bool = False
    """Follow a run as it trains, and say when it is about to spike or diverge."""
    every: Annotated[float, arg(metavar="SECONDS")] = 2.0
    """How often --live looks."""
    out: Path | None = None
    """Folder for the page of --to; out/forecast if left out, and none with --json."""
    json: bool = False
    """Print the forecast as JSON."""

    def run(self, write_page: WritePage | None = None) -> int:
        """Exit status. Without `write_page` there is no page."""
        self._check()
        if self.live:
            from aftershock.forecast.live import follow

            return follow(self.studies[0], poll_s=self.every, as_json=self.json)
        if self.early:
            from aftershock.forecast.early import early_divergence
            from aftershock.forecast.early_console import print_early

            early = early_divergence(self.studies, arm=self.arm, at=self.at)
            if self.json:
                _write_json(early.to_json())
            else:
                print_early(early)
            return 0
        if self.backtest:
            from aftershock.forecast.backtest import FIT_SEEDS, backtest_study
            from aftershock.forecast.backtest_console import print_backtest

            each = FIT_SEEDS if self.fit_seeds is None else self.fit_seeds
            tested = backtest_study(self.studies, arm=self.arm, fit_seeds=each)
            if self.json:
                _write_json(tested.to_json())
            else:
                print_backtest(tested)
            return 0
        from aftershock.forecast.outlook import forecast_study

        outlook = forecast_study(self.studies, to=self.to, arm=self.arm, lr=self.lr)
        if self.json:
            _write_json(outlook.to_json())
        else:
            print_outlook(outlook)
        folder = PAGES if self.out is None and not self.json else self.out
        if write_page is not None and folder is not None:
            page = write_page(outlook, folder)
            if not self.json:
                sys.stdout.write(f"\npage: {page}\n")
        return 0

    def _check(self) -> None:
        """Raises ValueError unless one of the four is asked for, with flags that belong to it."""
        ways = {"--to SIZE": self.to, "--early": self.early, "--backtest": self.backtest, "--live": self.live}
        asked = [flag for flag, on in ways.items() if on]
        if len(asked) != 1:
            got = f"got {' and '.join(asked)}" if asked else "got none"
            raise ValueError(f"a forecast takes one of --to SIZE, --early, --backtest and --live, {got}")
        if self.fit_seeds is not None and not self.backtest:
            raise ValueError(f"--fit-seeds is for --backtest; it has no meaning with {asked[0]}")
        if self.at is not None and not self.early:
            raise ValueError(f"--at is the step that --early looks at; it has no meaning with {asked[0]}")
        if self.lr is not None and not self.to:
            raise ValueError(f"--lr is a rate of the size given by --to; it has no meaning with {asked[0]}")
        if self.out is not None and not self.to:
            raise ValueError(f"--out is for the page of --to; there is none of {asked[0]}")
        if self.live and (len(self.studies) != 1 or self.arm):
            raise ValueError("--live follows one run: give one folder or log, and no --arm")


@dataclass(frozen=True)
class Plan:
    """Say which small runs buy the narrowest forecast of a size's failing rate within a budget."""

    studies: Positional[Annotated[tuple[str, ...], arg(metavar="STUDY ...")]]
    """Study folders with a first few runs: they give the costs, and what is known already."""
    to: Annotated[str, arg(metavar="SIZE")]
    """The size to forecast."""
    budget: Annotated[str, arg(metavar="TIME")] = "2h"
    """Time of one core: 90s, 30m, 2h, 1d."""
    arm: Annotated[str, arg(metavar="ARM")] = ""
    """Arm of the studies; needed where there are several."""
    json: bool = False
    """Print the plan as JSON."""

    def run(self) -> int:
        from aftershock.forecast.observations import read_observations
        from aftershock.forecast.outlook import plain
        from aftershock.forecast.plan import make_plan, parse_budget
        from aftershock.lab.sizes import parse_size

        budget_s, target = parse_budget(self.budget), parse_size(self.to)
        plan = make_plan(read_observations(self.studies, arm=self.arm), target, budget_s=budget_s)
        if self.json:
            _write_json(plain(plan))
        else:
            print_plan(plan, self.studies)
        return 0


def print_outlook(outlook: Outlook, *, console: Console | None = None) -> None:
    """The forecast as text: failing rate, signals with their danger lines, eps, trend, advice, what it rests on."""
    from rich.console import Console
    from rich.text import Text

    out = Console() if console is None else console
    failing = outlook.failing
    out.print()
    if failing.rate is None:
        out.print(Text(f"{outlook.target}: no failing rate. {failing.refused}", style="bold"))
    else:
        out.print(Text(f"{outlook.target} starts to fail at a rate of {_words(failing.rate)}", style="bold"))
        missed = "" if failing.largest_error is None else f"; the largest size left out: {failing.largest_error:.2f}"
        errors = ", ".join(f"{way} {error:.2f}" for way, error in failing.errors.items()) or "not known with two sizes"
        out.print(Text(f"By the {failing.method} way. Decades missed at sizes left out: {errors}{missed}", style="dim"))
    out.print()
    out.print(_quantities(outlook, wide=out.width >= WIDE))
    out.print()
    for sentence in [*_eps_words(outlook), *_trend_words(outlook)]:
        out.print(Text(sentence))
    for advice in outlook.advice:
        out.print(Text(f"Change: {advice.change}. Why: {advice.why}.", style="yellow"))
    if not outlook.advice:
        out.print(Text(f"Nothing to change: no interval crosses its line at rate {outlook.lr:.3g}.", style="green"))
    if outlook.check is not None:
        out.print(Text(outlook.check.words, style="bold"))
    for note in outlook.notes:
        out.print(Text(f"Note: {note}", style="dim"))
    rests = f"{len(outlook.runs)} runs of {outlook.study}, arm {outlook.arm}: {', '.join(outlook.sizes)} "
    rests += f"({outlook.family}), {len(outlook.rates)} rates, {outlook.num_seeds} seeds"
    out.print(Text(f"Rests on {rests}. Intervals: {outlook.level:.0%}, for one new run.", style="dim"))


def print_plan(plan: PlanResult, studies: Sequence[str], *, console: Console | None = None) -> None:
    """The plan as a table, and the commands that carry it out."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    out = Console() if console is None else console
    headline = (
        f"The interval of the failing rate of {plan.target} narrows from {plan.width_now:.2f} to {plan.width_then:.2f} "
        f"decades for {_clock(plan.seconds)} of one core; never below {plan.floor:.2f}, which is the scatter of seeds"
    )
    out.print()
    out.print(Text(headline, style="bold"))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("size", "new seeds", "core time", "rates"):
        table.add_column(title)
    for purchase in plan.purchases:
        lrs = " ".join(f"{lr:g}" for lr in purchase.lrs)
        table.add_row(purchase.size, str(purchase.num_seeds), _clock(purchase.seconds), lrs)
    if plan.purchases:
        out.print(table)
        out.print()
    else:
        out.print("No curve narrows it enough to be worth its time.")
    for command in plan_commands(plan, studies):
        out.print(Text(command), soft_wrap=True)
    for note in plan.notes:
        out.print(Text(f"Note: {note}", style="dim"))


def plan_commands(plan: PlanResult, studies: Sequence[str]) -> list[str]:
    """One sweep for each size and ladder, into folders beside the first study, then the forecast from all of them."""
    folders, commands = [], []
    for number, purchase in enumerate(plan.purchases, start=1):
        folder = f"{studies[0].rstrip('/')}-plan{number}"
        folders.append(folder)
        seeds = " ".join(str(FIRST_SEED + i) for i in range(purchase.num_seeds))
        lrs = " ".join(f"{lr:g}" for lr in purchase.lrs)
        commands.append(
            f"aftershock sweep --from {studies[0].rstrip('/')}/sweep.yaml --out {folder} --sizes {purchase.size} "
            f"--arms {plan.arm} --seeds {seeds} --lrs {lrs}"
        )
    if commands:
        commands.append(f"aftershock forecast {' '.join([*studies, *folders])} --to {plan.target} --arm {plan.arm}")
    return commands


def _write_json(record: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(record, indent=1, allow_nan=False) + "\n")


def _quantities(outlook: Outlook, *, wide: bool) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for title in (f"at rate {outlook.lr:.3g}", "forecast", f"{outlook.level:.0%} interval", "danger line"):
        table.add_column(title)
    for title in ("fit", "runs") if wide else ():
        table.add_column(title)
    for quantity in outlook.quantities:
        line = "" if quantity.line is None else f"{quantity.line.value:.3g}"
        if quantity.interval is None:
            cells = ["none", quantity.refused, line]
        else:
            value, low, high = quantity.interval
            cells = [f"{value:.3g}", f"{low:.3g} to {high:.3g}", f"{line} crossed" if quantity.crosses else line]
        row = [quantity.title, *cells, *([quantity.mode, str(quantity.num_runs)] if wide else [])]
        table.add_row(*(Text(cell, style="red" if quantity.crosses else "") for cell in row))
    return table


def _eps_words(outlook: Outlook) -> list[str]:
    eps = outlook.eps
    if eps is None:
        return []
    enough = eps.lower >= eps.eps
    lower = "that is enough" if enough else f"eps {eps.lower:g} would leave {eps.kept_with_lower.low:.1%} at least"
    said = [f"AdamW's eps {eps.eps:g} leaves {eps.kept.value:.1%} of the update ({eps.kept.low:.1%} at least); {lower}"]
    if eps.meets_lr is not None:
        said.append(f"At {outlook.target} the gradient falls to eps at a rate of {eps.meets_lr:.2g}")
    if eps.meets_params is not None:
        said.append(f"At rate {eps.lr:.3g} it falls to eps at {eps.meets_params:.2g} parameters")
    return said


def _trend_words(outlook: Outlook) -> list[str]:
    trend = outlook.trend
    listed = ", ".join(f"{entry.size} {entry.lr_sensitivity:.3f}" for entry in trend.sizes)
    expected = "" if trend.at_target is None else f"; {outlook.target} {_words(trend.at_target)}"
    said = [f"LR sensitivity [nats]: {listed}{expected}"]
    if trend.slope is not None:
        said.append(f"Its slope: {_words(trend.slope)} decades per decade of N")
    if trend.best_loss is not None:
        said.append(f"Loss at the best rate [nats], {outlook.target}: {_words(trend.best_loss)}")
    marks = {True: "holds", False: "does not hold", None: "not known"}
    return said + [f"Condition, {marks[check.holds]}: {check.condition}; {check.words}" for check in trend.checks]


def _words(interval: Interval) -> str:
    return f"{interval.value:.2g} ({interval.low:.2g} to {interval.high:.2g})"


def _clock(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
