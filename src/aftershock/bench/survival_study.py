"""Trains the runs of the fault injection study in worker processes, one JSON line for each that is finished.

A study that is interrupted goes on where it stopped; lines of older code are trained again.
Must not import torch at the top: workers do.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

from aftershock.bench.corpus import SCORING_SEEDS, TUNING_SEEDS, Progress
from aftershock.bench.survival import DEFAULT, Job, full_grid, judge, reduced_grid
from aftershock.bench.survival_record import Study, rows_of
from aftershock.bench.survival_run import Ended, Happened, train
from aftershock.config import nearest
from aftershock.lab.workers import worker_pool
from aftershock.store.environment import describe_environment
from aftershock.store.folder import JsonLines, disk_errors, read_lines, to_json

RUNS = "guard-runs.jsonl"
COMMAND = "aftershock bench guard --rerun"
ROOMS = ("guard", "lab/zoo", "signals/detect")
"""What a run depends on, and `bench/survival_run.py`; a line that was written with other code is not used."""

NEEDY = ("chain", "qk_clip", "beta_switch", "eps_switch", "zloss_switch", "precision_switch")
"""Policies that cannot be made without settings."""


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

    Without `policies` the reduced grid (see `survival`); else each of them ("all": every one that needs no settings) on
    each specimen; both with the first `seeds` (5) seeds, scoring ones before the others.

    Raises ValueError on an unknown name and on a number of seeds that is not 1 to 10, before anything is trained.
    """
    from aftershock.lab.zoo.registry import ZOO, specimen

    chosen = [specimen(name) for name in (specimens or tuple(ZOO))]
    kinds = {one.name: one.kind for one in chosen}
    drawn = _first(5 if seeds is None else seeds)
    jobs = full_grid(kinds, known_policies(policies), drawn) if policies else reduced_grid(kinds, drawn)
    runs = train_missing(folder, jobs, processes=processes, on_progress=on_progress)
    judged = judge(runs, kinds=kinds, onsets={one.name: one.onset for one in chosen})
    here = describe_environment()
    return Study(
        rows=rows_of(judged, scoring=SCORING_SEEDS),
        scoring_seeds=sorted({job.seed for job in jobs if job.seed in SCORING_SEEDS}),
        tuning_seeds=sorted({job.seed for job in jobs if job.seed in TUNING_SEEDS}),
        core_seconds=round(sum(run.seconds for run in runs)),
        code=code_digest(),
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
    """The policies meant by `names`. Raises ValueError for one that there is not, or that cannot stand alone."""
    from aftershock.guard.policies import POLICIES

    if not names:
        return (DEFAULT,)
    able = tuple(name for name in POLICIES if name not in NEEDY)
    for name in () if tuple(names) == ("all",) else names:
        if name in NEEDY:
            raise ValueError(f"policy {name} needs settings of its own; the study runs those that need none")
        if name not in POLICIES:
            raise ValueError(f"unknown policy {name!r}{nearest(name, able)}")
    return able if tuple(names) == ("all",) else tuple(names)


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
        code = code_digest()
        lines = JsonLines(folder / RUNS)
        try:
            with worker_pool(processes) as pool:
                futures = {pool.submit(_train, job): job for job in missing}
                for number, future in enumerate(as_completed(futures), total - len(missing) + 1):
                    run = future.result()
                    done[futures[future]] = run
                    lines.append((to_json(_plain(run) | {"code": code}) + "\n").encode())
                    if on_progress is not None:
                        on_progress(number, total)
            lines.sync()
        finally:
            lines.close()
    return [done[job] for job in jobs]


def read_runs(folder: Path) -> list[Ended]:
    """The runs on file that were trained with the code as it is now."""
    path, code = folder / RUNS, code_digest()
    if not path.is_file():
        return []
    return [_run(line) for line in read_lines(path.read_bytes(), str(path)) if line.pop("code", None) == code]


def code_digest() -> str:
    """Of the sources that a run depends on: two runs with one digest are comparable."""
    package = Path(__file__).resolve().parents[1]
    files = [path for room in ROOMS for path in sorted((package / room).rglob("*.py"))]
    digest = hashlib.sha256()
    for path in [*files, package / "bench" / "survival_run.py"]:
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _first(count: int) -> tuple[int, ...]:
    seeds = (*SCORING_SEEDS, *TUNING_SEEDS)
    if not 1 <= count <= len(seeds):
        raise ValueError(f"seeds must be 1 to {len(seeds)}, got {count}")
    return seeds[:count]


def _train(job: Job) -> Ended:
    """In a worker: one run."""
    from aftershock.lab.zoo.registry import specimen

    return train(specimen(job.specimen), policy=job.policy, seed=job.seed)


def _plain(run: Ended) -> dict[str, Any]:
    return run._asdict() | {"events": [list(event) for event in run.events]}


def _run(line: dict[str, Any]) -> Ended:
    fields: dict[str, Any] = line | {"events": [Happened(*event) for event in line["events"]]}
    return Ended(**fields)
