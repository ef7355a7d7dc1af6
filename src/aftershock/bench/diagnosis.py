"""The benchmark of verdicts: incidents of the zoo whose cause is known, replayed and judged without being told.

An incident is a specimen and a seed, trained in a plain loop until its first spike is over. Seeds `BUILDING` were
looked at while the signature matrix was written; no figure here is of them. One JSON line each, so an interrupted study
goes on. Must not import torch at the top: workers do.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from aftershock.bench.corpus import Progress
from aftershock.lab.workers import worker_pool
from aftershock.store.folder import JsonLines, disk_errors, read_lines, to_json

if TYPE_CHECKING:
    from aftershock.lab.zoo.specimen import Specimen
    from aftershock.replay.subject import Subject

BUILDING = (0, 1, 2, 3, 4, 5)
"""Seeds that the signature matrix was built on, or that showed what it lacked."""
JUDGED = (6, 7, 8)
RUNS = "replay-runs.jsonl"
ROOMS = ("replay", "lab/zoo", "guard/state.py", "guard/recorder.py")
"""What a verdict depends on; a line that was written with other code is not used."""
SHAMS = ("sham:ulp#1", "sham:skip#1", "sham:ulp#2", "sham:skip#2")


class Incident(NamedTuple):
    """One verdict beside the truth.

    - `cause`: the true class; `ranked`: (class, share) as the verdict has them, `unknown` the share of none of them
    - `verdict`: its kind; `identical`: whether unchanged replays have the recorded bits, for a planted disturbance up
      to the step at which it struck
    - `answers`: (question, yes) of the cells and symptoms; `cells`: replays that it took
    - `remedy`: the smallest change that removes the spike; None where none did
    """

    specimen: str
    seed: int
    cause: str
    spiked: bool
    window: list[int]
    controls: str
    identical: bool
    verdict: str
    ranked: list[list[Any]]
    unknown: float
    answers: list[list[Any]]
    remedy: str | None
    cells: int
    seconds: float

    @property
    def place(self) -> int | None:
        """Where the true class stands, 1 is first; None where it is not among them."""
        causes = [cause for cause, _ in self.ranked]
        return causes.index(self.cause) + 1 if self.cause in causes else None


def capture(specimen: Specimen, seed: int) -> Subject | None:
    """The first spike of a specimen, recorded with what happens to its process; None where it does not spike.

    A spontaneous one is found by `lab.zoo.labels.label`, as the zoo counts spikes. Random numbers are torch's, started
    at `seed`.
    """
    import torch

    from aftershock.lab.zoo.labels import label
    from aftershock.replay.recording import find_spikes, record

    torch.manual_seed(seed)
    trial = specimen.build(seed)
    struck = trial.disturbance
    return record(
        trial.workload,
        steps=specimen.steps,
        label=label if specimen.kind == "spontaneous" else find_spikes,
        before_step=None if struck is None else struck.before_forward,
        after_backward=None if struck is None else struck.after_backward,
    )


def diagnose(specimen: Specimen, seed: int, *, processes: int = 1) -> Incident:
    """Record an incident and judge it by the cells that the signature matrix asks for."""
    import torch

    from aftershock.replay.explain import replay
    from aftershock.replay.signatures import QUESTIONS

    began = time.monotonic()
    with torch.random.fork_rng([]):
        subject = capture(specimen, seed)
        if subject is None:
            took = time.monotonic() - began
            return Incident(specimen.name, seed, specimen.cause, False, [], "", True, "", [], 1.0, [], None, 0, took)
        asked = list(dict.fromkeys([*SHAMS, *(cell for question in QUESTIONS.values() for cell in question.cells)]))
        found = replay(subject, cells=asked, parts=(), processes=processes)
    verdict, controls = found.verdict, found.controls
    first = controls.first_difference
    same = first is None or (specimen.onset is not None and first >= specimen.onset and controls.spread == 0)
    return Incident(
        specimen=specimen.name,
        seed=seed,
        cause=specimen.cause,
        spiked=True,
        window=list(found.window),
        controls=controls.kind,
        identical=same,
        verdict=verdict.kind,
        ranked=[[one.cause, round(one.share, 4)] for one in verdict.ranked],
        unknown=round(verdict.unknown, 4),
        answers=[[one.question, one.yes] for one in verdict.answers],
        remedy=found.remedies[0].cell if found.remedies else None,
        cells=len(found.cells),
        seconds=round(time.monotonic() - began, 1),
    )


def diagnose_zoo(
    folder: Path,
    *,
    specimens: Sequence[str] = (),
    seeds: Sequence[int] = JUDGED,
    processes: int = 2,
    on_progress: Progress | None = None,
) -> list[Incident]:
    """Every spiking specimen, and those that nothing was tuned on, or only `specimens`; with each of `seeds`.

    What is on file in `folder` is not judged again. Raises ValueError for an unknown specimen or a healthy one.
    """
    from aftershock.lab.zoo.registry import UNSEEN, ZOO, specimen

    chosen = [specimen(name) for name in specimens] or [*ZOO.values(), *UNSEEN.values()]
    healthy = [one.name for one in chosen if one.kind == "healthy"]
    if specimens and healthy:
        raise ValueError(f"{healthy[0]} is a healthy specimen: it has no spike to explain")
    jobs = [(one.name, seed) for seed in seeds for one in chosen if one.kind != "healthy"]
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        done = {(line.specimen, line.seed): line for line in read_incidents(folder)}
    missing = [job for job in jobs if job not in done]
    code, lines = code_digest(), JsonLines(folder / RUNS)
    try:
        if missing:
            with worker_pool(processes) as pool:
                futures = {pool.submit(_diagnose, *job): job for job in missing}
                for number, future in enumerate(as_completed(futures), len(jobs) - len(missing) + 1):
                    found = future.result()
                    done[futures[future]] = found
                    lines.append((to_json(found._asdict() | {"code": code}) + "\n").encode())
                    if on_progress is not None:
                        on_progress(number, len(jobs))
            lines.sync()
    finally:
        lines.close()
    return [done[job] for job in jobs]


def read_incidents(folder: Path) -> list[Incident]:
    """The incidents on file that were judged by the code as it is now."""
    path, code = folder / RUNS, code_digest()
    if not path.is_file():
        return []
    found = [line for line in read_lines(path.read_bytes(), str(path)) if line.pop("code", None) == code]
    return [Incident(**line) for line in found]


def code_digest() -> str:
    """Of the sources that a verdict depends on."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for room in ROOMS:
        root = package / room
        for path in [root] if root.is_file() else sorted(root.rglob("*.py")):
            digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _diagnose(name: str, seed: int) -> Incident:
    """In a worker."""
    from aftershock.lab.zoo.registry import specimen

    return diagnose(specimen(name), seed)
