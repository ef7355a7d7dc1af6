"""Criteria that read the course of incidents: where a spike began, how long it lasted, what the model believed in it.

Fixed before any run of their study. The rules at the top of `claims.incident_criteria` hold here too.
Must not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from aftershock.claims.claim import Judgement, Line, Verdict
from aftershock.claims.criteria import at_least
from aftershock.claims.grid import bootstrap
from aftershock.claims.incident import Incident, by_cause, read_incidents
from aftershock.claims.shares import NOTHING, Share, judged_by_class, least, mostly

SAME_PLACE, LEVEL, LEAST = 0.7, "layer", 3
"""H3: of the spikes of a class, and how many there must be of one specimen."""
SOMETHING_ELSE, KINDS = "something else", ("nothing", "something else", "much the same", "mixed", "not finite")
WHEN, NUMBERS = ("before", "peak"), ("entropy", "from_unigram", "from_bigram", "agreement")


def same_place_first(lines: Sequence[Line]) -> Judgement:
    """H3: share of the spikes of a class in which the same layer moves first; at least 0.7 in every cause class.

    Layers are the blocks, tables, norms and head of a model (`replay.norms.layer_of`); which moves first is
    `replay.localise`'s. Places have names within one specimen only, so a class's share counts, in each of its
    specimens with at least 3 such spikes, the layer that is first most often; a spike in which no layer moved counts
    against. Of few layers one is easily first most often: with 3 spikes and 2 layers the share is never below 2/3,
    so the table has how many layers there are. The effect is the smallest share of any class.
    """
    incidents = [incident for incident in read_incidents(lines) if incident.reproducible and LEVEL in incident.first]
    modal: dict[str, list[Share]] = {}
    layers: dict[str, float] = {}
    for name in dict.fromkeys(incident.name for incident in incidents):
        members = [incident for incident in incidents if incident.name == name]
        if len(members) < LEAST:
            continue
        places = [incident.first[LEVEL].place for incident in members]
        most = max((places.count(place) for place in places if place is not None), default=0)
        modal.setdefault(members[0].cause, []).append(Share(most, len(places)))
        layers[name] = float(members[0].first[LEVEL].num_places)
    shares = {cause: Share(sum(s.count for s in some), sum(s.total for s in some)) for cause, some in modal.items()}
    found = {cause: share.interval for cause, share in sorted(shares.items())}
    verdicts: dict[str, Verdict] = {cause: at_least(measured, SAME_PLACE) for cause, measured in found.items()}
    return judged_by_class(
        verdicts,
        found,
        worst=least(found),
        meaning="share of a class's spikes in which the same layer moved first, in the class where it is smallest",
        tables={"layers": layers},
    )


def spikes_last(lines: Sequence[Line]) -> Judgement:
    """H4: duration and recovery of the recorded spikes, per cause class; reported.

    A question has no verdict, so this is inconclusive whatever comes out, and the tables are the answer. Duration is
    from the onset to the first of 20 calm steps (`lab.zoo.labels`), recovery from the peak to the first of 5
    (`replay.response`), in steps. A spike that did not end within its run counts with the steps up to there, and its
    class's table says so. The effect is the median duration of all incidents.
    """
    groups = by_cause([incident for incident in read_incidents(lines) if incident.window])
    durations_N = np.array([_duration(incident) for members in groups.values() for incident in members])
    measured = NOTHING
    if len(durations_N):
        measured = bootstrap(lambda draw_N: float(np.median(durations_N[draw_N])), len(durations_N))
    return Judgement(
        verdict="inconclusive",
        effect=measured.value,
        interval=measured.bounds,
        meaning="steps that a spike lasts, the median of all; the tables have each class",
        detail={
            "spikes": {cause: float(len(members)) for cause, members in groups.items()},
            "never ended": {
                cause: float(np.mean([not one.ended for one in members])) for cause, members in groups.items()
            },
        }
        | {
            f"duration, {cause}": _spread([_duration(incident) for incident in members])
            for cause, members in groups.items()
        }
        | {
            f"recovery, {cause}": _spread([one.recovery for one in members if one.recovery is not None])
            for cause, members in groups.items()
        },
    )


def something_else_believed(lines: Sequence[Line]) -> Judgement:
    """H8: share of language models' spikes at whose peak the model believes something else; above a half.

    Asked about calm batches from before the spike; `replay.thinking.Thinking.kind` says from entropy, KL to the
    unigram and agreement with before whether it is nothing, something else, much the same, mixed or not finite, and
    all but something else count against. All classes together, since the criterion has none; the tables have each,
    with the numbers before the spike and at its peak, and the loss by how often the target had been seen.
    Supported: the whole interval lies above 1/2; contradicted: below.
    """
    groups = by_cause([one for one in read_incidents(lines) if one.reproducible and one.belief is not None])
    kinds = {cause: [one.belief.kind for one in members if one.belief] for cause, members in groups.items()}
    kinds = {cause: [kind for kind in some if kind in KINDS] for cause, some in kinds.items()}
    every = [kind for some in kinds.values() for kind in some]
    measured = Share(every.count(SOMETHING_ELSE), len(every)).interval
    return Judgement(
        verdict=mostly(measured),
        effect=measured.value,
        interval=measured.bounds,
        meaning="share of language models' spikes at whose peak something else is believed, rather than nothing",
        detail={f"{kind}, spikes": {cause: float(some.count(kind)) for cause, some in kinds.items()} for kind in KINDS}
        | {f"{when}, {cause}": _believed(members, when) for cause, members in groups.items() for when in WHEN},
    )


def _believed(members: Sequence[Incident], when: str) -> dict[str, float]:
    """Means over incidents of what is finite; of a frequency, over those that have such targets."""
    minds = [one.belief.minds[when] for one in members if one.belief and when in one.belief.minds]
    columns = {name: [getattr(mind, name) for mind in minds] for name in NUMBERS}
    for bucket in dict.fromkeys(bucket for mind in minds for bucket in mind.by_frequency):
        losses = [mind.by_frequency[bucket] for mind in minds if bucket in mind.by_frequency]
        columns[f"loss of targets seen {bucket} times"] = losses
    finite = {name: [x for x in values if math.isfinite(x)] for name, values in columns.items()}
    return {name: float(np.mean(values)) for name, values in finite.items() if values}


def _duration(incident: Incident) -> int:
    assert incident.window is not None
    return incident.window[3] - incident.window[1]


def _spread(values: Sequence[int]) -> dict[str, float]:
    if not values:
        return {}
    quartiles = np.quantile(values, (0, 0.25, 0.5, 0.75, 1)).tolist()
    return dict(zip(("least", "lower quartile", "median", "upper quartile", "most"), quartiles, strict=True))
