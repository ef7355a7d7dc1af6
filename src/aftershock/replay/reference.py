"""The tables of docs/replay.md, from the code: cells by name, questions, the signature matrix, and what can strike.

A test holds the page to them. Must not import the runner or the lab.
"""

from __future__ import annotations

from collections.abc import Sequence

from aftershock.causes import CAUSES
from aftershock.replay.cells import KINDS
from aftershock.replay.signatures import NEVER, QUESTIONS, SIGNATURES, STRUCK, Signature, probability


def causes_markdown() -> str:
    """Every class of causes, and whether a replay can tell it."""
    told = {one.cause for one in SIGNATURES}
    struck = {cause for shares in STRUCK.values() for cause in shares}
    rows = [
        (number, words, "yes" if number in told else "where it struck once" if number in struck else "no")
        for number, words in CAUSES.items()
    ]
    return _table(("class", "what it is", "told by a replay"), rows)


def cells_markdown() -> str:
    """How cells are written, by family, in the order of `cells.KINDS`."""
    families = dict.fromkeys(kind.family for kind in KINDS.values())
    forms = {family: [form for kind in KINDS.values() if kind.family == family for form in kind.forms]
             for family in families}  # fmt: skip
    return _table(("family", "cells"), [(family, ", ".join(f"`{form}`" for form in forms[family])) for family in forms])


def columns() -> dict[str, Signature]:
    """A short name for each way of each class: C1, C3a, C3b, ..."""
    causes = [one.cause for one in SIGNATURES]
    found: dict[str, Signature] = {}
    for i, one in enumerate(SIGNATURES):
        several = causes.count(one.cause) > 1
        found[one.cause + ("abcdefgh"[causes[:i].count(one.cause)] if several else "")] = one
    return found


def ways_markdown() -> str:
    """What the columns of the matrix are."""
    return _table(("column", "class", "what it looks like"),
                  [(name, CAUSES[one.cause], one.way) for name, one in columns().items()])  # fmt: skip


def matrix_markdown() -> str:
    """Of every question the probability of a yes by each way, in percent; a dot is 5, as good as never."""
    ways = columns()
    rows = []
    for name, question in QUESTIONS.items():
        asked = ", ".join(f"`{cell}`" for cell in question.cells) or "the record"
        rows.append((question.yes, asked, *(_percent(probability(one, name)) for one in ways.values())))
    return _table(("a yes says", "asked of", *ways), rows, numbers=len(ways))


def struck_markdown() -> str:
    """What struck a run whose spike does not come back, and the shares of the classes."""
    rows = [
        (thing, ", ".join(f"{cause} {share:.0%}" for cause, share in shares.items()))
        for thing, shares in STRUCK.items()
    ]
    return _table(("first difference to the record", "class"), rows)


def _percent(probability: float) -> str:
    return "." if probability == NEVER else f"{100 * probability:.0f}"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: int = 0) -> str:
    rule = ["---"] * (len(titles) - numbers) + ["--:"] * numbers
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (titles, rule, *rows)) + "\n"
