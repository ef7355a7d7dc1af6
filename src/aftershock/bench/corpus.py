"""The corpus of the benchmark: specimens of the zoo x seeds as run folders, and what a detector and its judge see of
them.

A run folder that is finished is not trained again, so an interrupted corpus goes on where it stopped.
Must not import torch at the top: reading a corpus does not need it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from aftershock.bench.scoring import GRACE, HORIZON, Target
from aftershock.lab.workers import worker_pool
from aftershock.store.folder import CONFIG
from aftershock.store.reader import RunReader

if TYPE_CHECKING:
    from aftershock.lab.zoo.specimen import Specimen

TUNING_SEEDS, SCORING_SEEDS = (0, 2, 4, 6, 8), (1, 3, 5, 7, 9)
"""Settings and signals are chosen on the first, and every number reported is of the second."""
LOSS = "loss/train/mean"
SIGNALS = (
    LOSS,
    "grad/all/norm",
    "update/all/norm",
    "optim/max/rms_t",
    "optim/max/rms_t_share",
    "grad/embed/over_median",
    "output/log_z",
    "attention/max/logit",
    "curvature/all/directional",
)
"""What detectors may look at, where a run has it."""
MAX_TARGETS = 3
"""Spikes of one run that count; it is read up to the recovery from the last of them. Some specimens spike dozens of
times a run, and would drown the others."""

Progress = Callable[[int, int], None]
"""Told how many of how many are done."""


class Signal(NamedTuple):
    """A signal over the steps that have a row of it."""

    steps: list[int]
    values: list[float]


class Trace(NamedTuple):
    """One run as the benchmark sees it: its signals and what to warn of, in steps 0 .. num_steps - 1."""

    specimen: str
    kind: str
    seed: int
    signals: dict[str, Signal]
    targets: tuple[Target, ...]
    num_steps: int


def train_corpus(
    folder: Path,
    specimens: Sequence[str],
    *,
    seeds: Sequence[int] = (*TUNING_SEEDS, *SCORING_SEEDS),
    processes: int = 2,
    on_progress: Progress | None = None,
) -> list[Path]:
    """Train what is missing of `specimens` x `seeds` in `folder`; returns all run folders, by specimen, then seed.

    Each of `processes` workers uses one thread.
    """
    wanted = [(name, seed, run_folder(folder, name, seed)) for name in specimens for seed in seeds]
    missing = [job for job in wanted if not is_trained(job[2])]
    done = len(wanted) - len(missing)
    if on_progress is not None:
        on_progress(done, len(wanted))
    if missing:
        with worker_pool(processes) as pool:
            for future in as_completed([pool.submit(_train, *job) for job in missing]):
                future.result()
                done += 1
                if on_progress is not None:
                    on_progress(done, len(wanted))
    return [path for _, _, path in wanted]


def run_folder(folder: Path, specimen: str, seed: int) -> Path:
    """Where the run of a specimen and seed lies in a corpus."""
    return folder / f"{specimen}-{seed}"


def is_trained(folder: Path) -> bool:
    """Whether a run folder has come to its end, a healthy one or not."""
    return (folder / CONFIG).is_file() and RunReader(folder).status in ("finished", "diverged")


def read_trace(folder: Path, specimen: Specimen, seed: int) -> Trace:
    """A trained run with its labels. Raises ValueError when it has no training loss."""
    from aftershock.lab.zoo.labels import label

    reader = RunReader(folder)
    recorded = set(reader.scalar_names())
    loss = reader.scalars(LOSS)
    first = int(loss.steps[0])
    signals = {}
    for name in SIGNALS:
        if name in recorded:
            series = reader.scalars(name)
            signals[name] = Signal((series.steps - first).tolist(), series.values[name].tolist())
    steps, values = signals[LOSS]
    bounds = [*steps, steps[-1] + 1]  # a spike that never ends has the step after the last one as its end
    spikes = [(bounds[s.onset], bounds[s.peak], bounds[s.end]) for s in label(values)]
    fault = None if specimen.onset is None else specimen.onset - first
    if specimen.kind == "healthy":  # healthy by construction: whatever the label says, there is nothing to warn of
        spikes = []
    targets, num_steps = place_targets(spikes, fault=fault, num_steps=bounds[-1])
    cut = {name: _until(series, num_steps) for name, series in signals.items()}
    return Trace(specimen.name, specimen.kind, seed, cut, targets, num_steps)


class Placed(NamedTuple):
    """Targets of a run, and the steps of it that are read."""

    targets: tuple[Target, ...]
    num_steps: int


def place_targets(spikes: Sequence[tuple[int, int, int]], *, fault: int | None, num_steps: int) -> Placed:
    """Targets from labelled spikes (onset, peak, end), ascending; `fault` is the faulty step of a planted one.

    The first spike that peaks at the fault or later is the fault's: it opens there. Without such a spike the run is
    read up to the fault, since what comes after is neither healthy nor a spike. After `MAX_TARGETS` spikes it is read
    up to where the next would open, at most for the grace of the last.
    """
    targets: list[Target] = []
    ours = next((i for i, (_, peak, _) in enumerate(spikes) if fault is not None and peak >= fault), None)
    if fault is not None and ours is None:
        num_steps = min(num_steps, max(fault, 1))
    for index, (onset, peak, end) in enumerate(spikes):
        opens = max(0, onset - HORIZON)
        if index == ours:
            assert fault is not None
            opens, onset = fault, min(max(onset, fault), peak)
        if targets:
            opens = max(opens, targets[-1].end + 1)
        if len(targets) == MAX_TARGETS:
            last = targets[-1].end
            return Placed(tuple(targets), min(num_steps, max(min(last + GRACE + 1, opens), last + 1)))
        if onset < num_steps:
            targets.append(Target(min(opens, onset), onset, peak, end))
    return Placed(tuple(targets), num_steps)


def _until(series: Signal, num_steps: int) -> Signal:
    count = sum(step < num_steps for step in series.steps)
    return Signal(series.steps[:count], series.values[:count])


def _train(name: str, seed: int, folder: Path) -> None:
    """In a worker: one run, from nothing."""
    from aftershock.lab.zoo.record import record
    from aftershock.lab.zoo.registry import specimen

    if (folder / CONFIG).is_file():  # a run of ours that was interrupted
        shutil.rmtree(folder)
    record(specimen(name), seed=seed, folder=folder)
