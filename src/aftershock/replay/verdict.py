"""From answers to a verdict: which classes of causes fit, how well, what speaks for and against, what would decide.

    judge(answers(subject, responses, left_out, seen), zero=zero_line(shams))

Naive Bayes over the ways of `signatures`: an answer of weight y adds y ln p' + (1 - y) ln(1 - p'), where
p' = r + (1 - r) p, p is the signature's probability of a yes and r the shams' rate of removal: where shams remove a
spike too, a remedy that does tells little. What is not there in the workload speaks only against classes that need it.
The sum is divided by `TEMPER`, since answers depend on each other, and shares are those of the classes; a cause that is
none of them competes with its average answers. Must not import the runner.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from aftershock.causes import CAUSES
from aftershock.replay.controls import Controls
from aftershock.replay.response import Response, spike_of
from aftershock.replay.signatures import (
    ALWAYS,
    PRIOR,
    QUESTIONS,
    SIGNATURES,
    STRUCK,
    STRUCK_WORDS,
    UNKNOWN,
    UNKNOWN_PRIOR,
    Signature,
    average,
    probability,
)
from aftershock.replay.subject import Subject
from aftershock.replay.symptoms import Symptoms

TEMPER = 1.0
"""Above 1 where confidence would be too high; on the building seeds of the zoo it is not."""
DECIDED = 0.8
"""The share from which on the first class is the verdict."""
LATER = 0.5
"""What it counts as yes that the spike came, but only after the recorded one was over."""
TELLS = 0.25
"""An answer speaks for or against a class whose probability of it differs by so much from the average's."""

Kind = Literal["decided", "undecided", "not_reproducible", "no_spike"]


class Answer(NamedTuple):
    """One question answered: `yes` from 0 to 1, and what says so: a cell's name, "symptom", or "moot"."""

    question: str
    yes: float
    by: str

    @property
    def words(self) -> str:
        """As the rest of a sentence that begins with "because"."""
        asked = QUESTIONS[self.question]
        if self.yes == LATER:
            return f"{asked.yes} for a while"
        return asked.yes if self.yes > LATER else asked.no


class Ranked(NamedTuple):
    """One class: its `share`, the way of it that fits best, and what speaks for and against it."""

    cause: str
    way: str
    share: float
    for_it: tuple[str, ...]
    against: tuple[str, ...]

    @property
    def words(self) -> str:
        """Its name and meaning."""
        return f"{self.cause}, {CAUSES[self.cause].partition(':')[0]} ({self.way})"


class Verdict(NamedTuple):
    """The classes by share, the first first; `unknown` is the share of a cause that is none of them.

    - `kind`: decided where the first class has at least `DECIDED`; not_reproducible where the replays do not spike
    - `next_cells`: cells not run yet that would best tell the first two apart
    - `words`: all of it in sentences
    """

    kind: Kind
    ranked: tuple[Ranked, ...]
    unknown: float
    answers: tuple[Answer, ...]
    next_cells: tuple[str, ...]
    words: str

    @property
    def cause(self) -> str | None:
        """The class, where it is decided."""
        return self.ranked[0].cause if self.kind == "decided" and self.ranked else None


def zero_line(shams: Sequence[Response]) -> float:
    """How often something innocent removes the spike: (removed + 1/2) / (shams + 1), Jeffreys' estimate."""
    return (sum(not one.present for one in shams) + 0.5) / (len(shams) + 1)


def answers(
    subject: Subject, responses: Mapping[str, Response], left_out: Iterable[str], seen: Symptoms
) -> list[Answer]:
    """What the cells that ran, those that mean nothing for this workload, and the symptoms answer."""
    found, moot = list[Answer](), set(left_out)
    symptoms = {
        "sudden": seen.sudden,
        "rate_jumped": seen.rate_jumped,
        "update_first": seen.update_first,
        "ahead": seen.ahead,
        "overflowed": seen.overflowed,
        "stale": seen.stale,
    }
    for name, question in QUESTIONS.items():
        given = {cell: _removed(responses[cell], subject) for cell in question.cells if cell in responses}
        if given:
            best = max(given, key=lambda cell: given[cell])
            found.append(Answer(name, given[best], best))
        elif question.moot and moot.intersection(question.cells):
            found.append(Answer(name, 0.0, "moot"))
        elif symptoms.get(name) is not None:
            found.append(Answer(name, float(bool(symptoms[name])), "symptom"))
    yes = {answer.question: answer.yes for answer in found}
    asked_after = {one.question: QUESTIONS[one.question].after for one in found}
    return [one for one in found if (first := asked_after[one.question]) is None or yes.get(first)]


def _removed(response: Response, subject: Subject) -> float:
    """1 where the spike did not come, `LATER` where it came when the recorded one was over, else 0."""
    found = spike_of(response, subject.window)
    return 1.0 if found == "gone" else LATER if found == "later" else 0.0


def judge(given: Sequence[Answer], *, zero: float, possible: Iterable[str] = ()) -> Verdict:
    """The verdict on a spike that comes back. `zero` is the shams' `zero_line`, `possible` the cells not run that mean
    something for the workload. Raises ValueError without an answer."""
    if not given:
        raise ValueError("no cell and no symptom has given an answer; run the default grid, or more of its cells")
    shares = _shares(given, zero)
    by_cause: dict[str, float] = {}
    for one, share in shares:
        cause = UNKNOWN if one is None else one.cause
        by_cause[cause] = by_cause.get(cause, 0.0) + share
    unknown = by_cause.pop(UNKNOWN)
    ordered = sorted(by_cause, key=lambda cause: -by_cause[cause])
    ranked = tuple(_ranked(cause, by_cause[cause], shares, given) for cause in ordered)
    decided = ranked[0].share >= DECIDED
    nexts = () if decided else tuple(_telling(ranked, shares, given, possible))
    words = _decided_words(ranked[0]) if decided else _undecided_words(ranked, unknown, nexts)
    return Verdict("decided" if decided else "undecided", ranked, unknown, tuple(given), nexts, words)


def judge_struck(controls: Controls, seen: Symptoms) -> Verdict:
    """The verdict on a spike that no unchanged replay has."""
    opening = "The spike does not come back in unchanged replays"
    if controls.why == "nondeterminism":
        words = f"{opening}, and these differ among themselves: nondeterminism can be all there is to it. "
        return Verdict("not_reproducible", (), 1.0, (), (), words + controls.words)
    struck = "batch" if controls.why == "loader" else seen.struck
    at = controls.first_difference if seen.at is None else seen.at
    if struck == "none" or at is None or controls.why == "surroundings":
        return Verdict("not_reproducible", (), 1.0, (), (), controls.words)
    said = STRUCK_WORDS[struck].format(at=at)
    table = sorted(STRUCK[struck].items(), key=lambda pair: -pair[1])
    ranked = tuple(Ranked(cause, f"something struck at step {at}", share, (said,), ()) for cause, share in table)
    decided = ranked[0].share >= DECIDED
    ending = (
        f"{ranked[0].words} is the verdict"
        if decided
        else f"undecided between {ranked[0].words} and {ranked[1].words}; compare checksums of that step's weights, or "
        "ask whether the run was resumed there"
    )
    return Verdict("decided" if decided else "undecided", ranked, 0.0, (), (), f"{opening}: {said}; {ending}.")


# ------------------------------------------------------------------------------------------------------------ shares

_Shares = Sequence[tuple[Signature | None, float]]
"""Of every way, and of None: a cause that is none of them."""


def _shares(given: Sequence[Answer], zero: float) -> _Shares:
    causes = [one.cause for one in SIGNATURES]
    total = sum(PRIOR.get(cause, 1.0) for cause in set(causes))
    logs: list[tuple[Signature | None, float]] = [(None, math.log(UNKNOWN_PRIOR) + _log_likelihood(None, given, zero))]
    for one in SIGNATURES:
        prior = (1 - UNKNOWN_PRIOR) * PRIOR.get(one.cause, 1.0) / total / causes.count(one.cause)
        logs.append((one, math.log(prior) + _log_likelihood(one, given, zero)))
    highest = max(value for _, value in logs)
    weights = [(one, math.exp(value - highest)) for one, value in logs]
    mass = sum(weight for _, weight in weights)
    return [(one, weight / mass) for one, weight in weights]


def _log_likelihood(one: Signature | None, given: Sequence[Answer], zero: float) -> float:
    """Tempered."""
    total = 0.0
    for answer in given:
        p = average(answer.question) if one is None else probability(one, answer.question)
        if answer.by == "moot":  # what is not there can only be missed by who needs it
            needed = p >= ALWAYS or (one is not None and one.needs == answer.question)
            total += math.log(1 - ALWAYS) if needed else 0.0
            continue
        if QUESTIONS[answer.question].cells:
            p = zero + (1 - zero) * p
        total += answer.yes * math.log(p) + (1 - answer.yes) * math.log(1 - p)
    return total / TEMPER


def _best(cause: str, shares: _Shares) -> Signature:
    """The way of a class that fits best."""
    ways = [(one, share) for one, share in shares if one is not None and one.cause == cause]
    return max(ways, key=lambda pair: pair[1])[0]


def _ranked(cause: str, share: float, shares: _Shares, given: Sequence[Answer]) -> Ranked:
    way = _best(cause, shares)
    speaks: dict[bool, list[str]] = {True: [], False: []}
    for answer in given:
        gap = probability(way, answer.question) - average(answer.question)
        if abs(gap) >= TELLS and answer.yes != LATER:
            speaks[(gap > 0) == (answer.yes > LATER)].append(answer.words)
        elif answer.yes > LATER and probability(way, answer.question) < TELLS:
            speaks[False].append(answer.words)
    return Ranked(cause, way.way, share, tuple(speaks[True]), tuple(speaks[False]))


def _telling(ranked: Sequence[Ranked], shares: _Shares, given: Sequence[Answer], possible: Iterable[str]) -> list[str]:
    """Cells that were not run, the most telling between the first two classes first."""
    first, second = (_best(one.cause, shares) for one in ranked[:2])
    known, open_cells = {answer.question for answer in given}, set(possible)
    gaps = {
        name: abs(probability(first, name) - probability(second, name))
        for name, question in QUESTIONS.items()
        if name not in known and open_cells.intersection(question.cells)
    }
    telling = sorted((name for name in gaps if gaps[name] >= TELLS), key=lambda name: -gaps[name])
    return [next(cell for cell in QUESTIONS[name].cells if cell in open_cells) for name in telling]


# ------------------------------------------------------------------------------------------------------------- words


def _decided_words(first: Ranked) -> str:
    against = f" Against it: {_listed(first.against)}." if first.against else ""
    return f"{first.words}, {first.share:.0%}: {_listed(first.for_it) or 'nothing else fits'}.{against}"


def _undecided_words(ranked: Sequence[Ranked], unknown: float, nexts: Sequence[str]) -> str:
    first, second = ranked[:2]
    if unknown > first.share:
        opening = f"Undecided: no known class fits ({unknown:.0%} for none of them); nearest is {first.words}"
    else:
        opening = f"Undecided between {first.words}, {first.share:.0%}, and {second.words}, {second.share:.0%}"
    why = f"; for the first: {_listed(first.for_it)}" if first.for_it else ""
    but = f"; against it: {_listed(first.against)}" if first.against else ""
    ending = f" What would decide: --cells {' '.join(nexts[:2])}." if nexts else ""
    return f"{opening}{why}{but}.{ending}"


def _listed(words: Sequence[str]) -> str:
    return "; ".join(words)
