"""Criteria that read incidents: does a change remove the spike, or shrink it? (H3, H4, H8: `claims.course_criteria`.)

All were fixed before any run of their study, and so were these rules:

- only an incident whose spike came back in all three unchanged replays counts, since only then does a replay without
  it say that the change removed it. A change removes a spike when no loss of its replay rises at least half as high
  over the calm band as the recorded one did (`Response.present`), up to twice as late as it did
- a kind of sham (other random batches skipped, 1 ulp, another order) removes a spike when half of its draws or more do
- a cell that means nothing for a run is not there: where every step trains on one and the same batch, nothing can be
  skipped, and such spikes say nothing of S0, S1 and S2
- per cause class: a claim is supported where every class supports it, contradicted where some class contradicts it and
  none supports it, else inconclusive. The tables have each class: 1 supported, 0 inconclusive, -1 contradicted
- of directions and limits see `claims.criteria`. Intervals are 95 %: of shares Wilson's, of their differences
  Newcombe's (`claims.shares`), of means by resampling incidents. Several specimens of a class, and several seeds of
  a specimen, count as so many independent incidents, which they are not quite

Must not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from aftershock.claims.claim import Judgement, Line, Verdict
from aftershock.claims.criteria import above_zero, at_least
from aftershock.claims.grid import Interval, bootstrap
from aftershock.claims.incident import Answer, Incident, by_cause, read_incidents
from aftershock.claims.shares import NOTHING, Share, as_tables, difference, judged_by_class, least, mostly

CONTROL, SKIP = "control", "skip"
SHAM_KINDS = ("skip", "ulp", "permute")
JUST_AS_OFTEN = 0.1
"""S0: rates that differ by no more are equal."""
CORNERS: Mapping[str, str] = {
    "suspect batches, suspect state": CONTROL,
    "other batches, suspect state": "replace",
    "suspect batches, earlier state": "earlier",
    "other batches, earlier state": "earlier:replace",
}
DECAYS: Mapping[float, str] = {0.0: "wd*0", 0.1: "wd*0.1", 0.25: "wd*0.25", 0.5: "wd*0.5", 1.0: CONTROL}
SHRINKS, HIGHEST, ROUNDING = 0.1, 3.0, 1e-9
"""H1: by at least a tenth of the peak; what rises higher than three times the recorded peak counts as that."""
MOMENTUM, DROPOUT = "beta1=0.5", "dropout=0.1"


# ------------------------------------------------------------------------------------------------------- data


def shams_do_as_well(lines: Sequence[Line]) -> Judgement:
    """S0: rate at which skipping the suspects removes a spike, less the rate of skipping others, and of 1 ulp; equal.

    `Just as often`, per cause class: supported where both rates of shams are within 0.1 of that of skipping the
    suspects and both intervals include 0; contradicted where an interval excludes 0. The effect is the largest
    difference in size of any class and sham. Where no remedy removes anything the rates are equal too: the claim is
    about remedies, not about the spike.
    """
    groups = _by_class(lines, _can_skip)
    found: dict[str, Interval] = {}
    verdicts: dict[str, Verdict] = {}
    for cause, members in groups.items():
        both = {kind: _against_sham(members, kind) for kind in ("skip", "ulp")}
        found |= {f"{cause} sham:{kind}": measured for kind, measured in both.items()}
        apart = any(measured.low > 0 or measured.high < 0 for measured in both.values())
        close = all(abs(measured.value) <= JUST_AS_OFTEN for measured in both.values())
        verdicts[cause] = "contradicted" if apart else "supported" if close else "inconclusive"
    worst = max(found.values(), key=lambda measured: abs(measured.value), default=NOTHING)
    return judged_by_class(
        verdicts,
        found,
        worst=worst,
        meaning="removal rate of skipping the suspects less that of a sham, in the class and sham that differ most",
        tables=_rates(groups),
    )


def skipping_removes(lines: Sequence[Line]) -> Judgement:
    """S1: removal rate of rewinding and skipping the suspects, less the shams'; above 0 in every cause class.

    An incident counts as removed by shams when any kind of them removes it, so that luck has its full due. The rewind
    is the 40 to 60 steps from the snapshot to the onset; the suspects are the batches from two steps before the onset
    to the spike's end. The effect is the smallest difference of any class. Where S0's rates are equal no interval lies
    above 0, so the verdict is inconclusive at most.
    """
    groups = _by_class(lines, _can_skip)
    found = {cause: _against_sham(members) for cause, members in groups.items()}
    verdicts: dict[str, Verdict] = {cause: above_zero(measured) for cause, measured in found.items()}
    return judged_by_class(
        verdicts,
        found,
        worst=least(found),
        meaning="removal rate of skipping the suspects less the shams', in the class where it is smallest",
        tables=_rates(groups),
    )


def batches_and_state_together(lines: Sequence[Line]) -> Judgement:
    """S2: share of spikes of which, of {suspect, other batches} x {suspect, earlier state}, only suspect/suspect has
    the spike; above a half.

    The earlier state is one from at least 80 steps before the suspect snapshot, with the weights, moments and schedule
    of then; other batches are later ones, which no replay reaches. All classes together, since the criterion has none;
    each is in the table. Supported: the whole interval lies above 1/2; contradicted: below.
    """
    groups = _by_class(lines, lambda incident: all(name in incident.answers for name in CORNERS.values()))
    shares = {cause: Share(sum(map(_only_together, members)), len(members)) for cause, members in groups.items()}
    measured = Share(sum(s.count for s in shares.values()), sum(s.total for s in shares.values())).interval
    return Judgement(
        verdict=mostly(measured),
        effect=measured.value,
        interval=measured.bounds,
        meaning="share of spikes that only the suspect batches on the suspect state have",
        detail={
            "spikes": {cause: float(len(members)) for cause, members in groups.items()},
            "share by class": {cause: share.interval.value for cause, share in shares.items()},
        }
        | {
            f"spiked: {corner}": {cause: _mean(members, _has(name)) for cause, members in groups.items()}
            for corner, name in CORNERS.items()
        },
    )


# --------------------------------------------------------------------------------------------------- settings


def less_decay_shrinks(lines: Sequence[Line]) -> Judgement:
    """H1: peak excess against weight decay x {1, 0.5, 0.25, 0.1, 0} from the snapshot on; monotone, and shrinking.

    Of each incident the peak excess in units of the unchanged one's, 3 at most. Per cause class with decay: supported
    where the mean over incidents never rises as the decay falls, and without decay is lower by a tenth or more, the
    interval of that share being above 0; contradicted where the whole interval is below a tenth; else inconclusive.
    The effect is the smallest share of the peak by which any class shrinks without decay.
    """
    groups = _by_class(lines, lambda incident: all(name in incident.answers for name in DECAYS.values()))
    curves_ND = {cause: np.array([_peaks(incident) for incident in members]) for cause, members in groups.items()}
    found: dict[str, Interval] = {}
    verdicts: dict[str, Verdict] = {}
    for cause, curve_ND in curves_ND.items():
        shrunk_N = 1 - curve_ND[:, 0]
        found[cause] = bootstrap(lambda draw_N, shrunk_N=shrunk_N: float(shrunk_N[draw_N].mean()), len(shrunk_N))
        monotone = bool((np.diff(curve_ND.mean(axis=0)) >= -ROUNDING).all())
        verdict = at_least(found[cause], SHRINKS)
        kept = verdict != "supported" or (monotone and found[cause].low > 0)
        verdicts[cause] = verdict if kept else "inconclusive"
    return judged_by_class(
        verdicts,
        found,
        worst=least(found),
        meaning="share of the peak excess that goes without weight decay, in the class where it is smallest",
        tables={"spikes": {cause: float(len(members)) for cause, members in groups.items()}}
        | {
            f"peak at {cause}, decay x": dict(
                zip((f"{factor:g}" for factor in DECAYS), curve_ND.mean(axis=0).tolist(), strict=True)
            )
            for cause, curve_ND in curves_ND.items()
        },
    )


def momentum_and_dropout_matter(lines: Sequence[Line]) -> Judgement:
    """H2: removal rate of beta1 = 0.5, and of dropout 0.1, less the shams'; both above 0.

    From the snapshot on; dropout in models that have such modules, all of which were recorded without it. beta2, lower
    and higher, is in the tables, since the statement does not name it, and so is every class. Supported: both
    intervals lie above 0; contradicted: one lies below. The effect is the smaller of the two. That a spike grows or
    comes at another step is not asked, only whether it comes.
    """
    incidents = [incident for incident in read_incidents(lines) if incident.reproducible]
    names = sorted({name for one in incidents for name in one.answers if name.startswith(("beta", "dropout"))})
    having = {name: [one for one in incidents if name in one.answers] for name in names}
    found = {name: _against_sham(members, cell=name) for name, members in having.items()}
    asked = {name: found.get(name, NOTHING) for name in (MOMENTUM, DROPOUT)}
    if any(measured.high < 0 for measured in asked.values()):
        verdict: Verdict = "contradicted"
    else:
        verdict = "supported" if all(measured.low > 0 for measured in asked.values()) else "inconclusive"
    smaller = least({name: measured for name, measured in asked.items() if not math.isnan(measured.value)})
    return Judgement(
        verdict=verdict,
        effect=smaller.value,
        interval=smaller.bounds,
        meaning="removal rate less the shams', of lower momentum or of dropout, whichever is smaller",
        detail=as_tables(found)
        | {
            f"removed by {name}, by class": {
                cause: 1 - _mean(members, _has(name)) for cause, members in by_cause(having[name]).items()
            }
            for name in names
        },
    )


# ------------------------------------------------------------------------------------------------------ pieces


def _by_class(lines: Sequence[Line], fits: Callable[[Incident], bool]) -> dict[str, list[Incident]]:
    """Reproducible incidents that `fits`, by class of cause."""
    return by_cause([one for one in read_incidents(lines) if one.reproducible and fits(one)])


def _can_skip(incident: Incident) -> bool:
    return SKIP in incident.answers and _by_sham(incident, "skip") is not None


def _draws(incident: Incident, kind: str) -> list[Answer]:
    return [answer for name, answer in incident.answers.items() if name.startswith(f"sham:{kind}#")]


def _by_sham(incident: Incident, kind: str) -> bool | None:
    """Whether this kind of sham removes the spike; None where it has no draw."""
    draws = _draws(incident, kind)
    return 2 * sum(not answer.present for answer in draws) >= len(draws) if draws else None


def _against_sham(members: Sequence[Incident], kind: str = "", *, cell: str = SKIP) -> Interval:
    """Removal rate of a cell less that of a kind of sham, or of any kind."""
    kinds = (kind,) if kind else SHAM_KINDS
    ours = Share(sum(not one.answers[cell].present for one in members), len(members))
    theirs = Share(sum(any(_by_sham(one, k) for k in kinds) for one in members), len(members))
    return difference(ours, theirs)


def _only_together(incident: Incident) -> bool:
    return [incident.answers[name].present for name in CORNERS.values()] == [True, False, False, False]


def _has(name: str) -> Callable[[Incident], bool]:
    return lambda incident: incident.answers[name].present


def _peaks(incident: Incident) -> list[float]:
    """Peak excess by factor of the decay, in the order of `DECAYS`."""
    own = incident.answers[CONTROL].peak_excess
    if not math.isfinite(own):
        # Nothing is higher: what is finite has shrunk to less than any share of it.
        return [1.0 if math.isinf(incident.answers[name].peak_excess) else 0.0 for name in DECAYS.values()]
    return [min(HIGHEST, incident.answers[name].peak_excess / own) for name in DECAYS.values()]


def _mean(members: Sequence[Incident], value: Callable[[Incident], bool]) -> float:
    return float(np.mean([value(incident) for incident in members]))


def _rates(groups: Mapping[str, Sequence[Incident]]) -> dict[str, dict[str, float]]:
    """How many spikes there are in each class, and the share that each remedy removes."""
    table = {"spikes": {cause: float(len(members)) for cause, members in groups.items()}}
    table["removed by skip"] = {cause: 1 - _mean(members, _has(SKIP)) for cause, members in groups.items()}
    for kind in SHAM_KINDS:
        draws = {cause: [a for one in members for a in _draws(one, kind)] for cause, members in groups.items()}
        table[f"removed by draws of sham:{kind}"] = {
            cause: float(np.mean([not answer.present for answer in some])) for cause, some in draws.items() if some
        }
    return table
