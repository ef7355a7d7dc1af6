"""The fault injection study as text: headline, tables for the terminal and for the docs. rich is imported inside."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from aftershock.bench.survival import DEFAULT
from aftershock.bench.survival_record import ALL, KINDS, Row, Study
from aftershock.store.console import wide_console

if TYPE_CHECKING:
    from rich.console import Console

COLUMNS = ("survived", "but for noise", "stopped", "refused", "to fault-free", "to unguarded", "worst", "lost", "false")


def headline(study: Study) -> str:
    """What the default policy survives and what it costs healthy runs, with what it does not reach."""
    faults = [one for kind in ("planted", "spontaneous") if (one := total(study, DEFAULT, kind)) is not None]
    if not faults:
        return "No run of the default policy with a fault is on record."
    runs, survived = sum(one.figures.runs for one in faults), sum(one.figures.survived for one in faults)
    noise = sum(one.figures.but_for_noise for one in faults)
    text = f"The default policy survives {survived} of {runs} faulty runs ({100 * survived / runs:.0f} %)"
    text += f", {noise} ({100 * noise / runs:.0f} %) where the noise of the data's order is allowed for"
    quiet = total(study, DEFAULT, "healthy")
    if quiet is not None:
        both = total(study, DEFAULT, ALL)
        assert both is not None
        false, batches = both.figures.false, both.figures.quiet_batches
        text += (
            f"; {false} false interventions on {batches:,} batches without a fault ({1e4 * false / batches:.2g} per "
        )
        text += f"10,000), and {quiet.figures.survived} of {quiet.figures.runs} healthy runs end no worse than by 0.5 %"
    return text + "."


def total(study: Study, policy: str, kind: str, *, half: str = "scoring") -> Row | None:
    """The row of a policy over all specimens of a kind."""
    found = [row for row in study.rows if (row.policy, row.kind, row.specimen, row.half) == (policy, kind, ALL, half)]
    return found[0] if found else None


def policies_of(study: Study) -> list[str]:
    """The policies on record, the default first."""
    return list(dict.fromkeys(row.policy for row in study.rows))


def specimens_of(study: Study, policy: str, *, half: str = "scoring") -> list[Row]:
    """The rows of a policy by specimen."""
    return [row for row in study.rows if row.policy == policy and row.half == half and row.specimen != ALL]


def cells(row: Row) -> list[str]:
    """The figures of a row as the tables show them, in the order of `COLUMNS`."""
    f = row.figures
    return [
        _share(f.survived, f.runs),
        _share(f.but_for_noise, f.runs),
        str(f.stopped),
        str(f.refused),
        percent(f.to_fault_free),
        percent(f.to_unguarded),
        percent(f.worst),
        f"{f.lost:.0f}",
        "-" if f.false_rate is None else f"{f.false} ({f.false_rate:.1f})",
    ]


def _share(count: int, runs: int) -> str:
    return f"{count}/{runs}" if runs else "-"


class Matrix(NamedTuple):
    """Of one kind: a line for each policy, of its rows by specimen; None where it was not tried."""

    kind: str
    specimens: list[str]
    lines: list[tuple[str, list[Row | None]]]


def matrices(study: Study) -> list[Matrix]:
    """Every policy on every specimen that it was tried on, by kind."""
    found = []
    for kind in KINDS:
        own = [row for row in study.rows if row.kind == kind and row.half == "scoring" and row.specimen != ALL]
        by_place = {(row.policy, row.specimen): row for row in own if row.figures.runs}
        specimens = list(dict.fromkeys(row.specimen for row in own))
        lines = [
            (policy, [by_place.get((policy, name)) for name in specimens])
            for policy in policies_of(study)
            if any(row.policy == policy for row in own)
        ]
        found.append(Matrix(kind, specimens, lines))
    return [matrix for matrix in found if matrix.lines]


def survived(row: Row | None) -> str:
    """A cell of the matrix: how many of how many."""
    return "-" if row is None else _share(row.figures.survived, row.figures.runs)


def percent(ratio: float | None) -> str:
    """How much more than the reference."""
    return "-" if ratio is None else f"{100 * (ratio - 1):+.1f} %"


def legend(study: Study) -> str:
    """How to read the columns, and on what they rest."""
    return (
        "survived: end within the limit of the kind (planted: 2 % above the fault-free run; spontaneous: 2 % above "
        "the unguarded one; healthy: 0.5 % above it); but for noise: or above the fault-free run by no more than two "
        "fault-free runs of other data order differ; to fault-free, to unguarded: median end against those runs; "
        "worst: the largest against the one that decides; lost: mean batches that became no step; false: interventions "
        "where there was no fault (per 10,000 batches); refused: runs that the policy is nothing for, which count "
        "nowhere else. Controls, without a guard: unguarded; fault_free_shifted, a fault-free run that leaves out "
        "three batches; unguarded_nudged, an unguarded run whose weights began one unit in the last place off. "
        f"Seeds {', '.join(map(str, study.scoring_seeds))}; {study.core_seconds / 60:.0f} core-minutes in all. "
        "All precise definitions: bench/survival.py."
    )


def markdown(study: Study) -> str:
    """The docs' tables: policies, the default policy by specimen, and every policy on every specimen."""
    lines = [headline(study), "", _head("policy", "specimens"), _rule(2)]
    for policy in policies_of(study):
        for kind in KINDS:
            row = total(study, policy, kind)
            if row is not None:
                lines.append(_line(policy, kind, *cells(row)))
    lines += ["", _head("specimen", "kind"), _rule(2)]
    lines += [_line(row.specimen, row.kind, *cells(row)) for row in specimens_of(study, DEFAULT)]
    for matrix in matrices(study):
        lines += [
            "",
            _line(f"{matrix.kind}: survived", *matrix.specimens),
            _line("---", *["---:"] * len(matrix.specimens)),
        ]
        lines += [_line(policy, *map(survived, rows)) for policy, rows in matrix.lines]
    return "\n".join([*lines, "", legend(study)]) + "\n"


def _head(*titles: str) -> str:
    return _line(*titles, *COLUMNS)


def _rule(words: int) -> str:
    return _line(*["---"] * words, *["---:"] * len(COLUMNS))


def _line(*texts: str) -> str:
    return f"| {' | '.join(texts)} |"


def print_study(study: Study, *, console: Console | None = None) -> None:
    """The headline, the policies, the default policy by specimen, and why runs did not survive."""
    from rich.table import Table
    from rich.text import Text

    out = wide_console() if console is None else console
    out.print(Text(headline(study), "bold"))
    by_policy = [
        (policy, kind, row)
        for policy in policies_of(study)
        for kind in KINDS
        if (row := total(study, policy, kind)) is not None
    ]
    own = specimens_of(study, DEFAULT)
    for titles, rows in (
        (("policy", "specimens"), by_policy),
        (("specimen", "kind"), [(row.specimen, row.kind, row) for row in own]),
    ):
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for title in titles:
            table.add_column(title, no_wrap=True)
        for title in COLUMNS:
            table.add_column(title, justify="right")
        for first, second, row in rows:
            table.add_row(Text(first), Text(second), *map(Text, cells(row)))
        out.print(table)
    for row in own:
        for reason in row.reasons:
            out.print(Text.assemble((f"{row.specimen}, ", "bold"), reason))
    out.print(Text(legend(study), "dim"))
