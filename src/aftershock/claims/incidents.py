"""The study of incidents: the first spike of each run, recorded and run again with one thing changed at a time.

One line a spike, see `claims.incident.Incident`; what the claims make of them is in `claims.incident_criteria`.
Must not import torch at the top: reading lines does not need it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aftershock.claims.claim import Line
from aftershock.claims.incident import Answer, Belief, FirstPlace, Incident, Mind
from aftershock.claims.lines import OnLine, code_digest, work_through

if TYPE_CHECKING:
    from aftershock.replay.runner import CellResult
    from aftershock.replay.subject import Subject
    from aftershock.workload import Workload

SEEDS = (0, 1, 2)
MORE = (0, 1, 2, 3, 4)
"""Of specimens that cost a few seconds an incident."""
SAMPLED = 0.75
"""Share of the full batch: less of it is so noisy that a language model's spikes hardly rise above its band."""
SHAMS = 3
"""Replays beside the unchanged one from which the place that moved first is read."""
DEPENDS = ("replay", "lab/zoo", "claims/incidents.py", "claims/incident.py", "workload.py")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A specimen of the zoo to record: `share` of its full batch, drawn anew for each step, below 1 makes its batches
    differ, so that there are others to take; `steps` ends the run sooner than the specimen does (0: where it ends)."""

    name: str
    specimen: str
    share: float = 1.0
    steps: int = 0
    seeds: tuple[int, ...] = SEEDS


PLANS: tuple[Plan, ...] = (
    Plan(name="lag_99", specimen="lag_99", seeds=MORE),
    Plan(name="lag_999", specimen="lag_999", seeds=MORE),
    Plan(name="memorising_sampled", specimen="memorising", share=SAMPLED),
    Plan(name="edge_of_stability_sampled", specimen="edge_of_stability", share=SAMPLED, seeds=MORE),
    Plan(name="logit_growth", specimen="logit_growth", steps=520),
    Plan(name="embedding_decay_sampled", specimen="embedding_decay", share=SAMPLED),
    Plan(name="repeated_ngrams", specimen="repeated_ngrams"),
    Plan(name="shuffled_targets", specimen="shuffled_targets"),
    Plan(name="poisoned_shard", specimen="poisoned_shard"),
    Plan(name="slingshot_sampled", specimen="slingshot", share=SAMPLED),
    Plan(name="bf16_loss", specimen="bf16_loss", steps=520),
    Plan(name="norm_against_decay_sampled", specimen="norm_against_decay", share=SAMPLED, seeds=MORE),
)
"""One of each spontaneous specimen and three planted in the data. Those that train on one and the same batch at every
step are sampled where they then still spike; the two lag specimens do not, and in bf16_loss nothing ever ends."""

CELLS = (
    *("control#2", "control#3"),  # beside the first, which a grid has by itself
    *("sham:skip#1", "sham:skip#2", "sham:skip#3", "sham:ulp#1", "sham:ulp#2", "sham:permute#1"),
    *("skip", "replace", "earlier", "earlier:replace"),
    *("wd*0.5", "wd*0.25", "wd*0.1", "wd*0"),
    *("beta1=0.5", "dropout=0", "dropout*2", "dropout=0.1"),
)
"""And the values of beta2 that fit, see `replay.candidates`."""


def run_incidents(folder: Path, *, processes: int = 1, on_progress: OnLine | None = None) -> list[Line]:
    """The lines of all plans and seeds, those on file in `folder` or made now, see `claims.lines.work_through`."""
    jobs = {incident_id(plan, seed): (plan, seed) for plan in PLANS for seed in plan.seeds}
    return work_through(folder, jobs, _work, code=code_digest(*DEPENDS), processes=processes, on_progress=on_progress)


def incident_id(plan: Plan, seed: int) -> str:
    """Of the first spike of a plan's run."""
    return f"{plan.name}-{seed}#0"


def incident(plan: Plan, seed: int) -> Incident:
    """Record the first spike and replay its cells, in this process, on one thread."""
    from aftershock.lab.zoo.labels import label
    from aftershock.lab.zoo.registry import specimen
    from aftershock.replay.recording import record

    began, chosen = time.process_time(), specimen(plan.specimen)
    with seeded_thread(seed):
        workload = chosen.build(seed).workload
        if plan.share < 1:
            sample(workload, plan.share, seed=seed)
        known: dict[str, Any] = {
            "id": incident_id(plan, seed),
            "name": plan.name,
            "cause": chosen.cause,
            "kind": chosen.kind,
            "seed": seed,
            "share": plan.share,
            "clip": workload.clip_norm,
            "num_params": num_inner(workload),
            "steps": plan.steps or chosen.steps,
        }
        # The zoo's own rule for what a spike is: the recorder's is quicker to alarm and blind to a slow rise.
        subject = record(workload, steps=known["steps"], label=label, tail=0)
        found = {} if subject is None else _replayed(subject)
    return Incident(**known, **found, seconds=time.process_time() - began)


def sample(workload: Workload, share: float, *, seed: int) -> None:
    """Make every batch of `workload` that share of its rows, drawn by seed and index; its full batch is batch 0."""
    import torch

    from aftershock.replay.edits.data import num_rows, take_rows

    batch = workload.batch
    total = num_rows(batch(0))

    def some(index: int) -> Any:
        numbers = torch.Generator().manual_seed(1_000_003 * seed + index)
        return take_rows(batch(index), torch.randperm(total, generator=numbers)[: round(share * total)].tolist())

    workload.batch = some


def num_inner(workload: Workload) -> int:
    """Parameters without those of tables and head, the N of scaling laws."""
    outer = ("embed", "position", "head")
    return sum(p.numel() for name, p in workload.model.named_parameters() if not name.startswith(outer))


@contextlib.contextmanager
def seeded_thread(seed: int) -> Iterator[None]:
    """One thread, and torch's random numbers started at `seed`; both are afterwards as they were."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


def _work(job: tuple[Plan, int]) -> Line:
    """In a worker: one line."""
    return incident(*job).to_line()


def _replayed(subject: Subject) -> dict[str, Any]:
    """All fields of an incident that need its replays."""
    from aftershock.replay.candidates import candidates
    from aftershock.replay.cells import grid
    from aftershock.replay.controls import judge_controls
    from aftershock.replay.response import recovery
    from aftershock.replay.runner import run_grid

    window, base = subject.window, subject.baseline
    betas = [name for name in candidates(subject) if name.startswith("beta2=")]
    chosen = grid(subject, [*CELLS, *betas])
    results = list(run_grid(subject, chosen.cells, processes=1))
    left_out = dict(chosen.left_out)
    answers: dict[str, Answer] = {}
    for result in results:
        answer = _answer(result, subject)
        if answer is None:
            left_out[result.name] = result.error or "it took no step"
        else:
            answers[result.name] = answer
    back = recovery(subject.recorded, window.peak, base)
    return {
        "window": tuple(window),
        "ended": window.end <= max(subject.recorded),
        "height": base.height,
        "band": base.band,
        "threshold": base.threshold,
        "unit": base.unit,
        "recovery": None if back is None else back - window.peak,
        "controls": judge_controls(subject, [r for r in results if r.family == "control"]).kind,
        "answers": answers,
        "first": _first(subject, left_out),
        "belief": _belief(subject, left_out),
        "left_out": left_out,
    }


def _answer(result: CellResult, subject: Subject) -> Answer | None:
    response = result.response(subject.baseline)
    if response is None:
        return None
    return Answer(
        family=result.family,
        present=response.present,
        peak_excess=response.peak_excess,
        peak_step=response.peak_step,
        duration=response.duration,
        stopped=result.stopped,
    )


def _first(subject: Subject, left_out: dict[str, str]) -> dict[str, FirstPlace]:
    """By level, the place that moved first; where that cannot be said, why is in `left_out`."""
    from aftershock.replay.localise import localise

    try:
        places = localise(subject, shams=SHAMS, processes=1)
    except ValueError as error:
        left_out["localise"] = str(error)
        return {}
    return {
        level: FirstPlace(
            place=first.place,
            num_places=sum(move.level == level for move in places.moves),
            times=first.times,
            replays=first.replays,
            clear=first.clear,
        )
        for level, first in places.first.items()
    }


def _belief(subject: Subject, left_out: dict[str, str]) -> Belief | None:
    """What a language model believed; of any other, None, and why is in `left_out`."""
    from aftershock.lab.zoo.nets import ByteLM
    from aftershock.replay.thinking import Point, thinking

    if not isinstance(subject.workload.model, ByteLM):
        left_out["thinking"] = "not a language model"
        return None

    def mind(point: Point) -> Mind:
        return Mind(
            entropy=point.entropy,
            from_unigram=point.from_unigram,
            from_bigram=point.from_bigram,
            agreement=point.agreement,
            by_frequency={f"{bucket.low} to {bucket.high - 1}": bucket.loss for bucket in point.by_frequency},
        )

    try:
        found = thinking(subject)
    except ValueError as error:
        left_out["thinking"] = str(error)
        return None
    return Belief(found.kind, {point.name: mind(point) for point in found.points})
