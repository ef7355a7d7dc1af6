"""The study of arms: at least 20 spikes per cause class, each pushed through, skipped, slowed down, and kept away.

One line a spike, see `ArmsLine` and `replay.arms`; H5 and H6 are judged on them. Must not import torch at the top:
reading lines does not need it.

Fixed before any run, for both claims:

- measured is ln(loss of one arm / loss of another) 10 spike lengths after the spike, after as many accepted steps from
  the same snapshot: the median over the spikes of a class, whatever specimen they come from. A lost arm counts as
  13.8 worse
- intervals are 95 %, by resampling runs with all spikes of each
- a class is judged when 20 of its spikes have both arms; its verdict is that of a direction, see `claims.criteria`.
  A claim is supported where every judged class supports it, contradicted where some class contradicts it and none
  supports it, else inconclusive, as in `claims.incident_criteria`
- the effect is the mean over the judged classes of their medians
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aftershock.claims.claim import Judgement, Line, Verdict
from aftershock.claims.criteria import below_zero
from aftershock.claims.grid import Interval
from aftershock.claims.incidents import sample, seeded_thread
from aftershock.claims.lines import OnLine, code_digest, work_through
from aftershock.claims.shares import as_numbers, together
from aftershock.replay.paired import (
    Arm,
    Hazard,
    Pair,
    Paired,
    hazard,
    log_training_ratio,
    paired,
    pairs,
    pooled,
    spiked_again,
)

LEAST_SPIKES = 20
"""Of a class, to be judged."""
TRIES = 2
"""Runs at most, in multiples of the spikes that are wanted of a specimen: some seeds never spike."""
DEPENDS = ("replay", "lab/zoo", "claims/arms_study.py", "claims/incidents.py", "workload.py")


@dataclass(frozen=True, kw_only=True)
class ArmsPlan:
    """A specimen of the zoo as this study trains it, for at most `steps` steps.

    - `share`: of the rows of its full batch, drawn anew for each step. With one and the same batch at every step there
      is none to leave out; the lag specimens spike only where nearly all rows are there
    - `part`: its part of the spikes of its class; `nths`: which spikes of a run are taken, 0 the first
    - `core_s`: seconds of one core that a spike takes, recording and all arms, measured on two of each
    """

    specimen: str
    cause: str
    share: float
    steps: int
    part: float
    core_s: float
    nths: tuple[int, ...] = (0,)


PLANS: tuple[ArmsPlan, ...] = (
    ArmsPlan(specimen="lag_99", cause="C1", share=0.97, steps=3000, part=0.5, core_s=7),
    ArmsPlan(specimen="lag_999", cause="C1", share=0.97, steps=3000, part=0.5, core_s=6),
    ArmsPlan(specimen="edge_of_stability", cause="C3", share=0.97, steps=1000, part=1.0, core_s=5),
    ArmsPlan(specimen="embedding_decay", cause="C6", share=0.5, steps=1200, part=1.0, core_s=22),
    ArmsPlan(specimen="repeated_ngrams", cause="C7", share=1.0, steps=800, part=0.5, core_s=11),
    ArmsPlan(specimen="garbage_labels", cause="C7", share=1.0, steps=1400, part=0.5, core_s=4),
    ArmsPlan(specimen="slingshot", cause="C9", share=0.97, steps=1200, part=1.0, core_s=32),
    ArmsPlan(specimen="norm_against_decay", cause="C13", share=0.5, steps=1600, part=1.0, core_s=7, nths=(0, 1)),
)
"""C7 is planted in the data, where a skip must help if it ever does. Left out: bf16_loss (C9) and logit_growth (C4),
whose loss does not come back, so that there is no end of the spike to count lengths from; and memorising (C1), at five
times the cost of the lag specimens. The models of C6 and C9 learn their batches by heart, so that their held-out loss
is that of an overfitted model and anything that slows the learning down lowers it: read it with the training loss."""


@dataclass(frozen=True, kw_only=True)
class ArmsLine:
    """One line of the study: a spike with its arms, or a run that had none.

    - `window`: start, onset, peak and end of the spike, None where there was none in `steps` steps or where it did not
      end in them; `problem` says why there are no arms, "" where there are
    - `last`, `cure`, `arms`, `left_out`: see `replay.arms.ArmsResult`; `cure` as cell, first step and end
    """

    id: str
    name: str
    cause: str
    share: float
    seed: int
    nth: int
    steps: int
    seconds: float
    window: tuple[int, int, int, int] | None = None
    problem: str = ""
    last: int = 0
    cure: tuple[str, int, int] | None = None
    arms: Mapping[str, Arm] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def run(self) -> str:
        """The run that the spike is one of."""
        return f"{self.name}-{self.seed}"

    @property
    def taken_back(self) -> bool:
        """Whether what kept the spike away was taken back at its end."""
        return self.cure is not None and self.window is not None and self.cure[2] == self.window[3]

    def to_line(self) -> dict[str, Any]:
        """JSON, but for numbers that are not finite, which `store.folder.to_json` spells."""
        return dataclasses.asdict(self) | {"arms": {name: arm._asdict() for name, arm in self.arms.items()}}

    @staticmethod
    def from_line(line: Line) -> ArmsLine:
        """The spike of a line. Raises ValueError, naming its id, when a field is missing or unknown."""
        names = {one.name for one in dataclasses.fields(ArmsLine)}
        wrong = names.symmetric_difference(line.keys() - {"code"})
        if wrong:
            raise ValueError(f"the line {line.get('id')} has other fields than it should: {', '.join(sorted(wrong))}")
        read: dict[str, Any] = {name: line[name] for name in names}
        for name in ("window", "cure"):
            read[name] = None if read[name] is None else tuple(read[name])
        read["arms"] = {
            name: Arm(**arm | {key: float(arm[key]) for key in ("loss", "training", "distance")})
            for name, arm in line["arms"].items()
        }
        return ArmsLine(**read)


Job = tuple[ArmsPlan, int, int]
"""A plan, a seed, and which of the run's spikes."""


def run_arms_study(
    folder: Path,
    *,
    spikes_per_class: int = LEAST_SPIKES,
    processes: int = 2,
    on_progress: OnLine | None = None,
    plans: Sequence[ArmsPlan] = PLANS,
) -> list[Line]:
    """The lines of as many runs as it takes to have so many spikes of each class with arms, seed after seed.

    Those on file in `folder` are not run again (`claims.lines.work_through`). A specimen whose seeds do not spike is
    given up after twice as many runs as spikes were wanted of it. Raises ValueError for spikes_per_class below 1.

    Example:
        judge_h5(run_arms_study(Path("out/arms")))
    """
    if spikes_per_class < 1:
        raise ValueError(f"spikes_per_class must be at least 1, got {spikes_per_class}")
    jobs: dict[str, Job] = {}
    lines: list[Line] = []
    while True:
        more = [job for plan in plans for job in _wanting(plan, lines, spikes_per_class)]
        if not more:
            return lines
        jobs |= {_id(*job): job for job in more}
        code = code_digest(*DEPENDS)
        lines = work_through(folder, jobs, _work, code=code, processes=processes, on_progress=on_progress)


def arms_core_seconds(*, spikes_per_class: int = LEAST_SPIKES, plans: Sequence[ArmsPlan] = PLANS) -> float:
    """What the study costs, in seconds of one core: each plan's spikes times their measured cost."""
    return sum(_quota(plan, spikes_per_class) * plan.core_s for plan in plans)


def arms_of(plan: ArmsPlan, seed: int, nth: int) -> ArmsLine:
    """Record a spike and compare its arms, in this process, on one thread."""
    from aftershock.lab.zoo.labels import label
    from aftershock.lab.zoo.registry import specimen
    from aftershock.replay.arms import compare_arms
    from aftershock.replay.recording import record

    began, chosen = time.process_time(), specimen(plan.specimen)
    assert chosen.cause == plan.cause, plan
    found: dict[str, Any] = {}
    with seeded_thread(seed):
        workload = chosen.build(seed).workload
        if plan.share < 1:
            sample(workload, plan.share, seed=seed)
        # The zoo's own rule for what a spike is: the recorder's is quicker to alarm and blind to a slow rise.
        subject = record(workload, steps=plan.steps, label=label, nth=nth, tail=0)
        if subject is None:
            found["problem"] = f"no spike number {nth} in {plan.steps} steps"
        elif subject.window.end >= plan.steps:
            found["problem"] = f"the spike at step {subject.window.onset} does not end in {plan.steps} steps"
        else:
            found["window"] = tuple(subject.window)
            try:
                result = compare_arms(subject, label=label)
            except ValueError as error:
                found["problem"] = str(error)
            else:
                found |= {"last": result.last, "arms": result.arms, "left_out": result.left_out}
                found["cure"] = None if result.cure is None else tuple(result.cure)
    known = {"id": _id(plan, seed, nth), "name": plan.specimen, "cause": plan.cause, "share": plan.share}
    return ArmsLine(
        **known, seed=seed, nth=nth, steps=plan.steps, seconds=round(time.process_time() - began, 2), **found
    )


# ---------------------------------------------------------------------------------------------------- the claims


def judge_h5(lines: Sequence[Line]) -> Judgement:
    """H5: held-out loss of pushing through against never having spiked, ln ratio; below 0 in every judged class.

    Never spiking is the arm `never` of `replay.arms.compare_arms`: the mildest of a fixed list of remedies that keeps
    the spike away, taken back at its end where that is enough and kept to the end of the arm where it is not. What a
    remedy that is kept does to the calm steps is in its loss, so the detail also has the spikes whose remedy was taken
    back, by themselves; they are no part of the verdict.
    """
    spikes = _spikes(lines)
    found = _by_class(spikes, "push", "never")
    back = _by_class([spike for spike in spikes if spike.taken_back], "push", "never")
    cures = Counter(f"{spike.cause} {_cure_words(spike)}" for spike in spikes)
    detail = {
        **_tables("push less never", found),
        **_tables("push less never, remedy taken back", back),
        **_tables("push less never, training loss", _by_class(spikes, "push", "never", of=log_training_ratio)),
        **_tables("push less never, ln distance", _by_class(spikes, "push", "never", of=_log_distance)),
        "spikes by remedy": {name: float(count) for name, count in sorted(cures.items())},
    }
    return _judged(lines, found, ("push", "never"), detail)


def judge_h6(lines: Sequence[Line]) -> Judgement:
    """H6: held-out loss of pushing through against rewinding and skipping, ln ratio; below 0 in every judged class.

    Skipped are the batches from two steps before the onset to the spike's end. The detail has the sham, which leaves
    out as many random batches, how often each took the spike away, and the hazard of another spike up to the reading:
    shares of arms with Wilson's intervals, and the mean difference of push and skip, runs resampled. They are no part
    of the verdict.
    """
    spikes = _spikes(lines)
    found = _by_class(spikes, "push", "skip")
    hazards = {
        f"{cause} {arm}": hazard(spike.arms[arm] for spike in some if arm in spike.arms)
        for cause, some in _classes(spikes).items()
        for arm in ("push", "skip", "sham_skip", "half")
    }
    detail = {
        **_tables("push less skip", found),
        **_tables("push less skip, training loss", _by_class(spikes, "push", "skip", of=log_training_ratio)),
        **_tables("push less sham_skip", _by_class(spikes, "push", "sham_skip")),
        **_tables("skip less sham_skip", _by_class(spikes, "skip", "sham_skip")),
        **_tables("push less half", _by_class(spikes, "push", "half")),
        "share of spikes removed": {
            f"{cause} {arm}": _share_removed(some, arm)
            for cause, some in _classes(spikes).items()
            for arm in ("skip", "sham_skip")
        },
        **_hazard_tables(hazards),
        **_tables("hazard of push less skip", _by_class(spikes, "push", "skip", of=spiked_again, mean=True)),
    }
    return _judged(lines, found, ("push", "skip"), detail)


def _judged(
    lines: Sequence[Line],
    found: Mapping[str, Paired],
    arms: tuple[str, str],
    detail: Mapping[str, Mapping[str, float]],
) -> Judgement:
    spikes = _classes(_spikes(lines))
    judged = [cause for cause, measured in found.items() if measured.num >= LEAST_SPIKES]
    verdicts: dict[str, Verdict] = {
        cause: below_zero(Interval(found[cause].value, found[cause].low, found[cause].high)) for cause in judged
    }
    together_ = pooled([_pairs(spikes[cause], *arms) for cause in judged])
    lost = {
        f"{cause} {arm}": float(sum(math.isinf(spike.arms[arm].loss) for spike in some if arm in spike.arms))
        for cause, some in spikes.items()
        for arm in arms
    }
    shared = {
        "verdict by class": as_numbers(verdicts),
        "spikes with both arms": {cause: float(measured.num) for cause, measured in found.items()},
        "runs": {cause: float(measured.num_runs) for cause, measured in found.items()},
        "lost arms": {name: count for name, count in lost.items() if count},
    }
    return Judgement(
        verdict=together(verdicts),
        effect=together_.value,
        interval=(together_.low, together_.high),
        meaning=f"ln held-out loss of {arms[0]} less {arms[1]}, 10 spike lengths later: median of a class, mean of the "
        f"{len(judged)} classes with {LEAST_SPIKES} spikes",
        detail=shared | dict(detail),
    )


# ------------------------------------------------------------------------------------------------------- pieces


def _work(job: Job) -> Line:
    """In a worker: one line."""
    return arms_of(*job).to_line()


def _id(plan: ArmsPlan, seed: int, nth: int) -> str:
    return f"{plan.specimen}-{seed}#{nth}"


def _quota(plan: ArmsPlan, spikes_per_class: int) -> int:
    return math.ceil(plan.part * spikes_per_class)


def _wanting(plan: ArmsPlan, lines: Sequence[Line], spikes_per_class: int) -> list[Job]:
    """The jobs that may make up for what a plan's quota lacks, the next seeds in order."""
    own = [line for line in lines if line["name"] == plan.specimen]
    quota = _quota(plan, spikes_per_class)
    lacking = quota - sum(bool(line["arms"]) for line in own)
    order = [(plan, i // len(plan.nths), plan.nths[i % len(plan.nths)]) for i in range(TRIES * quota)]
    return order[len(own) :][: max(0, lacking)]


def _spikes(lines: Sequence[Line]) -> list[ArmsLine]:
    """Those that have arms."""
    return [spike for spike in map(ArmsLine.from_line, lines) if spike.arms]


def _classes(spikes: Sequence[ArmsLine]) -> dict[str, list[ArmsLine]]:
    causes = sorted({spike.cause for spike in spikes}, key=lambda cause: int(cause.removeprefix("C")))
    return {cause: [spike for spike in spikes if spike.cause == cause] for cause in causes}


def _pairs(
    spikes: Sequence[ArmsLine], arm: str, minus: str, of: Callable[[Arm, Arm], float] | None = None
) -> list[Pair]:
    return pairs(((spike.run, spike.arms) for spike in spikes), arm, minus, of=of)


def _by_class(
    spikes: Sequence[ArmsLine],
    arm: str,
    minus: str,
    *,
    of: Callable[[Arm, Arm], float] | None = None,
    mean: bool = False,
) -> dict[str, Paired]:
    """By class, where there is any spike with both arms."""
    found = {cause: _pairs(some, arm, minus, of) for cause, some in _classes(spikes).items()}
    known = {cause: [pair for pair in some if not math.isnan(pair.difference)] for cause, some in found.items()}
    return {cause: paired(some, of="mean" if mean else "median") for cause, some in known.items() if some}


def _log_distance(arm: Arm, minus: Arm) -> float:
    """nan where an arm went nowhere, or was lost."""
    known = all(math.isfinite(one.distance) and one.distance > 0 for one in (arm, minus))
    return math.log(arm.distance / minus.distance) if known else math.nan


def _share_removed(spikes: Sequence[ArmsLine], arm: str) -> float:
    had = [spike.arms[arm].spiked for spike in spikes if arm in spike.arms]
    return math.nan if not had else 1 - sum(had) / len(had)


def _cure_words(spike: ArmsLine) -> str:
    if spike.cure is None:
        return "none"
    assert spike.window is not None
    cell, first, end = spike.cure
    name = "clip" if cell.startswith("clip=") else cell
    start, _, _, over = spike.window
    since = ", from the snapshot on" if first == start else ""
    return f"{name}{since}{'' if end == over else ', kept'}"


def _tables(title: str, found: Mapping[str, Paired]) -> dict[str, dict[str, float]]:
    return {
        title: {cause: measured.value for cause, measured in found.items()},
        f"{title}: low": {cause: measured.low for cause, measured in found.items()},
        f"{title}: high": {cause: measured.high for cause, measured in found.items()},
    }


def _hazard_tables(found: Mapping[str, Hazard]) -> dict[str, dict[str, float]]:
    known = {name: measured for name, measured in found.items() if measured.total}
    return {
        "hazard of another spike": {name: measured.share for name, measured in known.items()},
        "hazard of another spike: low": {name: measured.low for name, measured in known.items()},
        "hazard of another spike: high": {name: measured.high for name, measured in known.items()},
    }
