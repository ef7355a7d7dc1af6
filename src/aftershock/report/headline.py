"""The result of a study in two or three sentences, every number taken from the data.

Says so plainly where there is nothing to say: nothing finished, one arm only, no rate failed.
Pure: takes groups, returns text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from aftershock.report.groups import Group, Outcome, RunFacts
from aftershock.report.words import ArmWords, listed, loss, number, plural, rate, sentence


class Headline(NamedTuple):
    """`main` is the result; `details` are sentences that put numbers to it."""

    main: str
    details: list[str]


def write_headline(
    groups: Sequence[Group], runs: Sequence[RunFacts], outcomes: Mapping[str, Outcome], words: Mapping[str, ArmWords]
) -> Headline:
    """The headline of a study. `words` names each arm (see `words.arm_words`)."""
    judged = [r for r in runs if r.judged]
    if not judged:
        return Headline(f"No run has finished yet: {_status_counts(runs)}.", [])
    fails = any(g.fails_from is not None for g in groups)
    main = _failures(groups, words) if fails else _no_failure(groups, runs)
    details = [_sensitivities(groups, words), _logits(groups, words), _stragglers(groups, runs, outcomes)]
    if len(judged) < len(runs):
        open_runs = len(runs) - len(judged)
        details.append(
            f"{plural(open_runs, 'run')} of {len(runs)} {'has' if open_runs == 1 else 'have'} no result "
            f"({_status_counts([r for r in runs if not r.judged])}); these numbers may still move."
        )
    return Headline(main, [text for text in details if text])


def _failures(groups: Sequence[Group], words: Mapping[str, ArmWords]) -> str:
    """Which arm fails from which rate at which size, and which arm does not."""
    arms = list(dict.fromkeys(g.arm for g in groups))
    failing = [arm for arm in arms if any(g.fails_from is not None for g in groups if g.arm == arm)]
    clauses: list[str] = []
    for arm in failing:
        places = _places([g for g in groups if g.arm == arm and g.fails_from is not None])
        start = "training fails" if len(arms) == 1 else f"{words[arm].full}, training fails"
        clauses.append(f"{start} {places}")
    healthy = [arm for arm in arms if arm not in failing and _all_trained(groups, arm)]
    if healthy:
        names = listed([words[arm].short for arm in healthy])
        clauses.append(f"{names} every rate trains" if clauses else f"{names}, every rate trains")
    return sentence("; ".join(clauses))


def _places(failing: Sequence[Group]) -> str:
    """`from learning rate 0.1 up at w32-d2 and from 0.03 at w64-d3`; sizes that share a rate are named together."""
    by_rate: dict[float, list[str]] = {}
    for group in failing:
        assert group.fails_from is not None
        by_rate.setdefault(group.fails_from, []).append(group.size)
    lowest = min(p.lr for g in failing for p in g.points)
    parts = [
        f"{rate(lr)} up{', the lowest tried,' if lr == lowest else ''} at {listed(sizes)}"
        for lr, sizes in by_rate.items()
    ]
    return f"from learning rate {listed([parts[0], *(f'from {part}' for part in parts[1:])])}"


def _all_trained(groups: Sequence[Group], arm: str) -> bool:
    points = [p for g in groups if g.arm == arm for p in g.points]
    return all(p.verdict in ("trained", "slow") and p.num_diverged + p.num_broken == 0 for p in points)


def _no_failure(groups: Sequence[Group], runs: Sequence[RunFacts]) -> str:
    """No arm fails at its highest rates; single rates or seeds may still."""
    rates = sorted({r.lr for r in runs if r.judged})
    span = f"learning rate {rate(rates[0])}" if len(rates) == 1 else f"from {rate(rates[0])} to {rate(rates[-1])}"
    arms = list(dict.fromkeys(g.arm for g in groups))
    where = "" if len(arms) == 1 else ", in both arms" if len(arms) == 2 else f", in all {len(arms)} arms"
    holes = [(g, p) for g in groups for p in g.points if p.verdict == "fails"]
    if holes:
        group, point = holes[0]
        more = f" and at {plural(len(holes) - 1, 'other place')}" if len(holes) > 1 else ""
        return f"Training fails at learning rate {rate(point.lr)} ({group.size}, {group.arm}){more}, but not above."
    if any(p.num_diverged + p.num_broken for g in groups for p in g.points):
        return f"No learning rate fails in most of its seeds ({span}{where})."
    return f"No run fails: every finished learning rate trains ({span}{where})."


def _stragglers(groups: Sequence[Group], runs: Sequence[RunFacts], outcomes: Mapping[str, Outcome]) -> str:
    """Counts of diverged and broken runs, so the headline's `fails` can be taken apart."""
    ends = [outcomes[r.run_id] for r in runs if r.judged]
    diverged, broken = ends.count("diverged"), ends.count("broken")
    if not diverged and not broken:
        return ""
    parts = [f"{diverged} diverged"] if diverged else []
    parts += [f"{broken} stayed finite but failed to train"] if broken else []
    onset = {(g.size, g.arm): g.fails_from for g in groups}
    stray = [
        r
        for r in runs
        if outcomes[r.run_id] in ("diverged", "broken") and ((start := onset[r.size, r.arm]) is None or r.lr < start)
    ]
    tail = ""
    if stray:
        first = stray[0]
        example = f"{first.size} {first.arm} at {rate(first.lr)}, seed {first.seed}"
        tail = f"; {len(stray)} of them at rates that otherwise train (such as {example})"
    return f"Of {plural(len(ends), 'run')} that ended, {listed(parts)}{tail}."


def _sensitivities(groups: Sequence[Group], words: Mapping[str, ArmWords]) -> str:
    """LR sensitivity at the largest size that has it in most arms."""
    sizes = list(dict.fromkeys(g.size for g in groups))
    known = {size: [g for g in groups if g.size == size and g.lr_sensitivity is not None] for size in sizes}
    most = max(len(found) for found in known.values())
    if most == 0:
        reasons = listed(list(dict.fromkeys(g.note for g in groups if g.note)))
        return f"LR sensitivity cannot be given: {reasons}."
    size = [s for s in sizes if len(known[s]) == most][-1]
    found = sorted(known[size], key=lambda g: -(g.lr_sensitivity or 0.0))
    at = f" at {size}" if len(sizes) > 1 else ""
    values = [loss_2(g.lr_sensitivity) for g in found]
    if len(found) == 1:
        of_arm = f" {words[found[0].arm].full}" if len({g.arm for g in groups}) > 1 else ""
        return f"LR sensitivity{at} is {values[0]} nats{of_arm}."
    if len(found) == 2:
        return (
            f"LR sensitivity{at} is {values[0]} {words[found[0].arm].full} "
            f"against {values[1]} {words[found[1].arm].short}."
        )
    return f"LR sensitivity{at}: {listed([f'{v} {words[g.arm].short}' for v, g in zip(values, found, strict=True)])}."


def _logits(groups: Sequence[Group], words: Mapping[str, ArmWords]) -> str:
    """Largest block-0 attention logit of each arm, anywhere in the study."""
    peaks: dict[str, float] = {}
    for group in groups:
        for point in group.points:
            if point.peak_logit is not None:
                peaks[group.arm] = max(peaks.get(group.arm, 0.0), point.peak_logit)
    if not peaks:
        return ""
    ranked = sorted(peaks, key=lambda arm: -peaks[arm])
    if len(ranked) == 1:
        return f"The largest block-0 attention logit is {number(peaks[ranked[0]])}."
    if len(ranked) == 2:
        high, low = ranked
        return (
            f"Block-0 attention logits reach {number(peaks[high])} {words[high].full} "
            f"and {number(peaks[low])} {words[low].short}."
        )
    return f"Block-0 attention logits reach {listed([f'{number(peaks[a])} {words[a].short}' for a in ranked])}."


def loss_2(value: float | None) -> str:
    """A sensitivity to two decimals, three where two would read 0.00."""
    if value is None:
        return "-"
    return loss(value) if abs(value) < 0.01 else f"{value:.2f}"


def _status_counts(runs: Sequence[RunFacts]) -> str:
    statuses = [r.status for r in runs]
    return listed([f"{statuses.count(s)} {s}" for s in dict.fromkeys(statuses)]) or "the study lists no runs"
