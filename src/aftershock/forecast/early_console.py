"""What `aftershock forecast --early` prints: the scores of every predictor, reliability, a probability for each run.

rich is imported inside the functions; must not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aftershock.forecast.early import SIGNALS, Chance, Early, Outcome, Split
from aftershock.forecast.early_scores import Estimate, Scores
from aftershock.store.console import wide_console

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def print_early(early: Early, *, console: Console | None = None) -> None:
    """Scores by outcome and split, what the main predictor weighs, the runs' probabilities, notes."""
    from rich.text import Text

    out = wide_console() if console is None else console
    share = f"{early.step / early.steps:.1%}"
    out.print()
    out.print(Text(f"What step {early.step} of {early.steps} ({share}) tells of a run's end", style="bold"))
    for outcome in early.outcomes:
        _print_outcome(outcome, out)
    out.print()
    out.print(_chances(early.chances))
    out.print(
        Text(
            "Probability that a run fails, by a fit without its seed; ! it failed, ? its outcome is open (fit on all "
            "others), - not seen at the step",
            style="dim",
        )
    )
    for note in early.notes:
        out.print(Text(f"Note: {note}", style="dim"))
    out.print(Text(f"Rests on {early.study}, arm {early.arm}. Intervals: {early.level:.0%}, over curves.", style="dim"))


def gain_words(split: Split) -> list[str]:
    """What the main predictor gained on a split, as sentences; a loss is said as what it adds."""
    rivals = ((f"the best trivial one ({split.best_trivial})", split.gain), ("rate and N alone", split.gain_over_rate))
    said = []
    for other, gain in rivals:
        if gain is None:
            continue
        verdict = "better" if gain.low > 0 else "worse" if gain.high < 0 else "not told apart"
        if gain.value >= 0:
            change = f"takes {gain.value:.0%} ({gain.low:.0%} to {gain.high:.0%}) off"
        else:
            change = f"adds {-gain.value:.0%} ({-gain.high:.0%} to {-gain.low:.0%}) to"
        said.append(f"{SIGNALS!r} {change} the Brier score of {other}: {verdict}")
    return said


def _print_outcome(outcome: Outcome, out: Console) -> None:
    from rich.text import Text

    out.print()
    if outcome.refused:
        out.print(Text(f"Outcome, {outcome.title}: not scored. {outcome.refused}"))
        return
    out.print(Text(f"Outcome, {outcome.title}: {outcome.num_happened} of {outcome.num_runs} runs", style="bold"))
    for split in outcome.splits:
        out.print()
        if split.refused:
            out.print(Text(f"Not scored, {split.refused}"))
            continue
        out.print(
            Text(
                f"Held-out {split.by}: fitted on {split.fitted}; scored on {split.scored}, {split.num_scored} runs of "
                f"{split.num_curves} curves, {split.num_happened} of them with the outcome"
            )
        )
        out.print(_scores(split))
        for sentence in gain_words(split):
            out.print(Text(sentence))
        main = next(score for score in split.scores if score.predictor == SIGNALS)
        out.print(_reliability(main))
    if outcome.fitted:
        weights = ", ".join(f"{f.key} {f.coefficient:+.2f}" for f in outcome.fitted)
        out.print()
        out.print(
            Text(f"Log-odds a standard deviation, fit on all runs, penalty {outcome.penalty:g}: {weights}", style="dim")
        )


def _scores(split: Split) -> Table:
    from rich.text import Text

    table = _table("predictor", "AUC", "Brier score", "log score [nats]")
    for score in split.scores:
        cells = (_words(score.auc), _words(score.brier), _words(score.log_score))
        style = "bold" if score.predictor == SIGNALS else ""
        table.add_row(*(Text(cell, style=style) for cell in (score.predictor, *cells)))
    return table


def _reliability(score: Scores) -> Table:
    table = _table(f"probability by {score.predictor!r}", "runs", "claimed", "seen")
    for row in score.reliability:
        table.add_row(f"{row.low:.1f} to {row.high:.1f}", str(row.count), f"{row.claimed:.2f}", _words(row.seen))
    return table


def _chances(chances: tuple[Chance, ...]) -> Table:
    """A row a curve, a column a rate."""
    rates = sorted({chance.lr for chance in chances})
    table = _table("size", "seed", *(f"{rate:g}" for rate in rates))
    curves: dict[tuple[str, int], dict[float, Chance]] = {}
    for chance in chances:
        curves.setdefault((chance.size, chance.seed), {})[chance.lr] = chance
    for (size, seed), row in curves.items():
        table.add_row(size, str(seed), *(_chance(row.get(rate)) for rate in rates))
    return table


def _chance(chance: Chance | None) -> str:
    if chance is None:
        return ""
    value = "-" if chance.probability is None else f"{chance.probability:.2f}"
    return value + ("?" if chance.fails is None else "!" if chance.fails else "")


def _table(*titles: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for title in titles:
        table.add_column(title)
    return table


def _words(estimate: Estimate | None) -> str:
    if estimate is None:
        return "none"
    return f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"
