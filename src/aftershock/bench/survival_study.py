"""Trains the runs of the fault injection study in worker processes, one JSON line for each that is finished.

A study that is interrupted goes on where it stopped; lines of older code are trained again.
Must not import torch at the top: workers do.
"""

from __future__ import annotations

import ast
import datetime
import gc
import hashlib
import inspect
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

from aftershock.bench.corpus import SCORING_SEEDS, TUNING_SEEDS, Progress
from aftershock.bench.survival import DEFAULT, SHARING, Job, full_grid, judge
from aftershock.bench.survival_record import Study, rows_of
from aftershock.bench.survival_run import REFERENCES, SETTINGS, Ended, Happened, train
from aftershock.config import nearest
from aftershock.lab.workers import worker_pool
from aftershock.store.environment import describe_environment
from aftershock.store.folder import JsonLines, disk_errors, read_lines, to_json

RUNS = "guard-runs.jsonl"
COMMAND = "aftershock bench guard --rerun"
ROOMS = ("guard", "lab/zoo", "signals/detect")
"""What a guarded run depends on, and `bench/survival_run.py`; a line that was written with other code is not used."""

NEEDY = {
    "qk_clip": "the attention layers of a model",
    "zloss_switch": "a loss that reads its dial",
    "precision_switch": "a loop that changes its precision",
    "chain": "policies to chain",
}
"""Policies that need a part of the user's own, and what."""


def run_study(
    folder: Path,
    *,
    specimens: Sequence[str] = (),
    policies: Sequence[str] = (),
    seeds: int | None = None,
    processes: int = 2,
    on_progress: Progress | None = None,
) -> Study:
    """Train what is missing of the grid in `folder`, judge it, and sum it up.

    Each policy (without `policies` every one that can be had without a part of the user's own) on each specimen with
    the first `seeds` (5) seeds, scoring ones before the others.

    Raises ValueError on an unknown name and on a number of seeds that is not 1 to 10, before anything is trained.
    """
    from aftershock.lab.zoo.registry import ZOO, specimen

    chosen = [specimen(name) for name in (specimens or tuple(ZOO))]
    kinds = {one.name: one.kind for one in chosen}
    drawn = _first(5 if seeds is None else seeds)
    named = known_policies(policies)
    jobs = full_grid(kinds, named, drawn)
    runs = train_missing(folder, jobs, processes=processes, on_progress=on_progress)
    judged = judge(runs, kinds=kinds, onsets={one.name: one.onset for one in chosen})
    here = describe_environment()
    return Study(
        rows=rows_of(judged, scoring=SCORING_SEEDS),
        scoring_seeds=sorted({job.seed for job in jobs if job.seed in SCORING_SEEDS}),
        tuning_seeds=sorted({job.seed for job in jobs if job.seed in TUNING_SEEDS}),
        core_seconds=round(sum(run.seconds for run in runs)),
        code=_joined(code_digest(policy) for policy in named),
        versions={name: version for name, version in here["versions"].items() if version is not None},
        machine={key: here[key] for key in ("platform", "cpu", "cores", "python")},
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        command=" ".join(
            [
                COMMAND,
                *(("--policies", *policies) if policies else ()),
                *(() if seeds is None else ("--seeds", str(seeds))),
            ]
        ),
    )


def known_policies(names: Sequence[str]) -> tuple[str, ...]:
    """The policies meant by `names`, the default first. Raises ValueError for one that there is not, or is needy."""
    from aftershock.guard.policies import POLICIES

    able = tuple(name for name in POLICIES if name not in NEEDY)
    for name in names:
        if name in NEEDY:
            raise ValueError(f"policy {name} needs {NEEDY[name]}; the study runs those that need nothing of the sort")
        if name not in POLICIES:
            raise ValueError(f"unknown policy {name!r}{nearest(name, able)}")
    return tuple(sorted(dict.fromkeys(names or able), key=lambda name: name != DEFAULT))


def train_missing(
    folder: Path, jobs: Sequence[Job], *, processes: int = 2, on_progress: Progress | None = None
) -> list[Ended]:
    """The runs of `jobs`, those on file or trained now. Each of `processes` workers uses one thread."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        done = {Job(run.specimen, run.policy, run.seed): run for run in read_runs(folder)}
    missing = [job for job in jobs if job not in done]
    total = len(jobs)
    if on_progress is not None:
        on_progress(total - len(missing), total)
    if missing:
        codes = {policy: code_digest(policy) for policy in {job.policy for job in missing}}
        lines = JsonLines(folder / RUNS)
        try:
            with worker_pool(processes) as pool:
                futures = [pool.submit(_train, together) for together in _together(missing)]
                for future in as_completed(futures):
                    for run in future.result():
                        done[Job(run.specimen, run.policy, run.seed)] = run
                        lines.append((to_json(_plain(run) | {"code": codes[run.policy]}) + "\n").encode())
                    if on_progress is not None:
                        on_progress(sum(job in done for job in jobs), total)
            lines.sync()
        finally:
            lines.close()
    return [done[job] for job in jobs]


def read_runs(folder: Path) -> list[Ended]:
    """The runs on file that were trained with the code as it is now."""
    path = folder / RUNS
    if not path.is_file():
        return []
    lines = read_lines(path.read_bytes(), str(path))
    codes = {policy: code_digest(policy) for policy in {str(line["policy"]) for line in lines}}
    return [_run(line) for line in lines if line.pop("code", None) == codes[line["policy"]]]


def code_digest(policy: str) -> str:
    """Of the sources that a run under `policy` depends on: two runs of it with one digest are comparable.

    Of the policies only its own module and what that imports of the others, and no guard where a run has none.
    """
    package = Path(__file__).resolve().parents[1]
    own = _modules(policy)
    rooms = ("lab/zoo",) if policy in REFERENCES else ROOMS
    files = [path for room in rooms for path in sorted((package / room).rglob("*.py"))]
    kept = [path for path in files if path.parent.name != "policies" or path in own]
    digest = hashlib.sha256()
    for path in [*kept, package / "bench" / "survival_run.py"]:
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _modules(policy: str) -> set[Path]:
    """The files of a policy: its module and those of the same room that it imports."""
    from aftershock.guard.policies import POLICIES

    todo = [] if policy not in POLICIES else [Path(inspect.getfile(POLICIES[policy])).resolve()]
    found: set[Path] = set()
    while todo:
        path = todo.pop()
        found.add(path)
        nodes = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.ImportFrom)]
        names = [str(node.module) for node in nodes if str(node.module).startswith("aftershock.guard.policies.")]
        todo += [new for name in names if (new := path.with_name(f"{name.rpartition('.')[2]}.py")) not in found]
    return found


def _joined(digests: Iterable[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]


def _first(count: int) -> tuple[int, ...]:
    seeds = (*SCORING_SEEDS, *TUNING_SEEDS)
    if not 1 <= count <= len(seeds):
        raise ValueError(f"seeds must be 1 to {len(seeds)}, got {count}")
    return seeds[:count]


def _together(jobs: Sequence[Job]) -> list[list[Job]]:
    """Jobs that can share the beginning of their runs in one list, in the order of their first."""
    found: dict[Job, list[Job]] = {}
    for job in jobs:
        shares = job.policy in SHARING and hasattr(os, "fork")
        found.setdefault(job._replace(policy=SHARING[0]) if shares else job, []).append(job)
    return list(found.values())


def _train(jobs: Sequence[Job]) -> list[Ended]:
    """In a worker. Python's collector waits for the end: within a run it finds nothing and takes 5 %."""
    from aftershock.bench.survival_shared import train_together
    from aftershock.lab.zoo.registry import specimen

    one, seed = specimen(jobs[0].specimen), jobs[0].seed
    gc.disable()
    try:
        if len(jobs) > 1:
            return train_together(one, [job.policy for job in jobs], seed)
        return [train(one, policy=job.policy, seed=seed, settings=SETTINGS.get(job.policy)) for job in jobs]
    finally:
        gc.enable()
        gc.collect()


def _plain(run: Ended) -> dict[str, Any]:
    return run._asdict() | {"events": [list(event) for event in run.events]}


def _run(line: dict[str, Any]) -> Ended:
    fields: dict[str, Any] = line | {"events": [Happened(*event) for event in line["events"]]}
    return Ended(**fields)
