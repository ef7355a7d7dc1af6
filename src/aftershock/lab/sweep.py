"""A sweep: the grid of sizes, arms, rates and seeds that answers one question, trained into one study folder.

A run's id is a hash of its config, so what is done is seen from what is there: start a sweep again after any death and
it trains only what is missing. Must not import torch at the top: a sweep that is complete should say so at once.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from aftershock.config import dump_yaml, from_dict, load_yaml, run_id, to_dict
from aftershock.lab.interventions import BASELINE, apply
from aftershock.lab.launch import Launcher, LocalLauncher, job_for
from aftershock.lab.recipe import PAPER_LRS, RunConfig, fleet_key
from aftershock.lab.sizes import parse_size, with_size
from aftershock.store import folder as fs
from aftershock.store.study import RunRef, write_manifest

if TYPE_CHECKING:
    from aftershock.lab.executor import Chunk, FleetTiming

RUNS = "runs"
TIMINGS = "timings.json"
PROGRESS = "progress.json"
"""Written by a job into its fleet's first run folder: steps done and in all, and the number of runs they are for."""
POLL_S = 0.2
TRIES = 2
"""A job that dies (out of memory, kill -9) is started once more; what fails twice is reported."""


@dataclass(frozen=True, kw_only=True)
class SweepSpec:
    """The grid: every size x arm x rate x seed of `base`. `sizes` empty keeps the base's own model.

    A seed draws both the weights and the batches. Sizes as in `lab.sizes`, arms as in `lab.interventions`.
    """

    name: str = "sweep"
    title: str = ""
    base: RunConfig = field(default_factory=RunConfig)
    sizes: tuple[str, ...] = ()
    arms: tuple[str, ...] = (BASELINE,)
    lrs: tuple[float, ...] = PAPER_LRS
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        for name in ("arms", "lrs", "seeds"):
            values = getattr(self, name)
            if not values:
                raise ValueError(f"a sweep needs at least one of {name}")
        for name in ("sizes", "arms", "lrs", "seeds"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"{name} has a value twice: {', '.join(map(str, values))}")


class PlannedRun(NamedTuple):
    """One run of a sweep: its place in the grid and its whole config."""

    ref: RunRef
    config: RunConfig


class SweepProgress(NamedTuple):
    """Runs done and in all, share of all training steps done, seconds so far and still to go (None: not known yet)."""

    num_done: int
    num_runs: int
    fraction: float
    elapsed_s: float
    left_s: float | None
    note: str


class SweepResult(NamedTuple):
    """The study folder; how many runs were there before, trained now, and failed, with the reason of each failure."""

    folder: Path
    num_kept: int
    num_trained: int
    failures: tuple[str, ...]


OnProgress = Callable[[SweepProgress], None]


def expand(spec: SweepSpec) -> list[PlannedRun]:
    """All runs of the grid, in the order sizes, arms, rates, seeds. Raises ValueError for a setting that cannot be."""
    planned: list[PlannedRun] = []
    for size_name in spec.sizes or ("",):
        sized = with_size(spec.base, parse_size(size_name)) if size_name else spec.base
        label = parse_size(size_name).label if size_name else _model_label(spec.base)
        for arm in spec.arms:
            for lr in spec.lrs:
                config = apply(_with_lr(sized, lr), arm).config
                for seed in spec.seeds:
                    seeded = dataclasses.replace(config, seed=seed, data_seed=seed)
                    ref = RunRef(run_id=run_id(seeded), size=label, arm=arm, lr=seeded.optim.lr, seed=seed)
                    planned.append(PlannedRun(ref, seeded))
    return planned


def run_sweep(
    spec: SweepSpec,
    folder: str | Path,
    *,
    launcher: Launcher | None = None,
    on_progress: OnProgress | None = None,
    runs_dir: str | Path = RUNS,
    sinks: Sequence[str] = (),
    mirror: str | None = None,
) -> SweepResult:
    """Train what is missing of `spec` in `folder` and return when all of it is there.

    `runs_dir` is where the run folders lie, relative to `folder` or absolute; sweeps may share one. `sinks` and
    `mirror` go to every job (see `store.sinks.sink_from_spec`, `store.mirror`).
    Raises ValueError for a bad setting, unreadable data, or a folder that another sweep is working in - all before
    anything is trained. A run that fails twice does not stop the others: see `SweepResult.failures`.
    """
    launcher = LocalLauncher() if launcher is None else launcher
    planned = expand(spec)
    folder = Path(folder)
    with fs.disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = fs.FolderLock(folder)
        try:
            write_manifest(
                folder, name=spec.name, title=spec.title, runs=[p.ref for p in planned], runs_dir=str(runs_dir)
            )
            fs.atomic_write(folder / "sweep.yaml", dump_yaml(spec).encode())
            sweep = _Sweep(folder, folder / runs_dir, planned, launcher, on_progress, sinks, mirror)
            return sweep.run()
        finally:
            lock.release()


def is_complete(run_folder: Path) -> bool:
    """Whether a run needs no more training: it finished, or it diverged, which is a result."""
    try:
        return json.loads((run_folder / fs.DONE).read_bytes())["status"] in ("finished", "diverged")
    except (FileNotFoundError, ValueError, KeyError):
        return False


class _Sweep:
    """The bookkeeping of one `run_sweep`: which runs are missing, which jobs are out, and how far they are."""

    def __init__(
        self,
        folder: Path,
        runs: Path,
        planned: Sequence[PlannedRun],
        launcher: Launcher,
        on_progress: OnProgress | None,
        sinks: Sequence[str],
        mirror: str | None,
    ) -> None:
        self.sinks, self.mirror = sinks, mirror
        self.folder, self.runs, self.launcher, self.on_progress = folder, runs, launcher, on_progress
        self.num_runs = len({p.ref.run_id for p in planned})
        unique = {p.ref.run_id: p for p in planned}
        self.missing = [p for p in unique.values() if not is_complete(runs / p.ref.run_id)]
        self.num_kept = self.num_runs - len(self.missing)
        self.started = time.monotonic()

    def run(self) -> SweepResult:
        if not self.missing:
            self._report(0.0, 0.0, [], "complete")
            return SweepResult(self.folder, self.num_kept, 0, ())
        for item in self.missing:
            path = self.runs / item.ref.run_id / fs.CONFIG
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                fs.atomic_write(path, dump_yaml(item.config).encode())
        chunks = self._plan()
        failures = self._work(chunks)
        num_trained = sum(is_complete(self.runs / item.ref.run_id) for item in self.missing)
        return SweepResult(self.folder, self.num_kept, num_trained, tuple(failures))

    def _plan(self) -> list[Chunk]:
        """Chunks of the missing runs; timings are kept beside the runs, so that no restart and no other study that
        shares them repeats one."""
        from aftershock.lab.data import build_batches
        from aftershock.lab.executor import FleetTiming, plan, time_fleet

        path = self.runs.parent / TIMINGS
        known = json.loads(path.read_bytes()) if path.exists() else {}
        groups: dict[RunConfig, list[RunConfig]] = {}
        for item in self.missing:
            groups.setdefault(fleet_key(item.config), []).append(item.config)
        timings: dict[RunConfig, FleetTiming] = {}
        for data in dict.fromkeys(key.data for key in groups):
            batches = build_batches(data)  # also checks the data, before any job starts
            for key, configs in groups.items():
                if key.data != data:
                    continue
                name = run_id(key)
                if name not in known:
                    self._report(0.0, None, [], f"timing {_model_label(key)}")
                    timing = time_fleet(configs, batches=batches)
                    known[name] = {"seconds": timing.seconds, "best": timing.best}
                seconds = {int(size): value for size, value in known[name]["seconds"].items()}
                timings[key] = FleetTiming(seconds, known[name]["best"])
        fs.atomic_write(path, json.dumps(known, indent=1).encode())
        return plan([m.config for m in self.missing], num_processes=self.launcher.max_parallel, timings=timings)

    def _work(self, chunks: Sequence[Chunk]) -> list[str]:
        """Submit chunks as places get free, until none is left; cancel all on any exception."""
        waiting = [(chunk, 1) for chunk in chunks]
        running: dict[str, tuple[Chunk, int]] = {}
        total_s = sum(chunk.seconds for chunk in chunks)
        done_s = 0.0
        failures: list[str] = []
        try:
            while waiting or running:
                while waiting and len(running) < self.launcher.max_parallel:
                    chunk, attempt = waiting.pop(0)
                    log = self.folder / "logs" / f"{self._name(chunk)}.log"
                    job = job_for(
                        self._folders(chunk),
                        fleet_size=chunk.fleet_size,
                        log=log,
                        sinks=self.sinks,
                        mirror=self.mirror,
                    )
                    running[self.launcher.submit(job)] = (chunk, attempt)
                time.sleep(POLL_S)
                for handle, (chunk, attempt) in list(running.items()):
                    state = self.launcher.poll(handle)
                    if state == "running":
                        continue
                    del running[handle]
                    if not self._folders(chunk):
                        done_s += chunk.seconds
                    elif attempt < TRIES:
                        waiting.insert(0, (chunk, attempt + 1))
                    else:
                        failures.append(self._failure(chunk))
                live = [chunk for chunk, _ in running.values()]
                in_work_s = sum(self._fraction(chunk) * chunk.seconds for chunk in live)
                self._report((done_s + in_work_s) / total_s, total_s, live, "")
        except BaseException:
            for handle in running:
                self.launcher.cancel(handle)
            raise
        return failures

    def _name(self, chunk: Chunk) -> str:
        return self.missing[chunk.indices[0]].ref.run_id

    def _folders(self, chunk: Chunk) -> list[Path]:
        """Where the runs of a chunk go that still need training."""
        folders = [self.runs / self.missing[i].ref.run_id for i in chunk.indices]
        return [folder for folder in folders if not is_complete(folder)]

    def _fraction(self, chunk: Chunk) -> float:
        """Share of its steps a running job has done: a fleet tells of them in its first member's folder."""
        unfinished = self._folders(chunk)
        done = float(len(chunk.indices) - len(unfinished))
        for folder in unfinished:
            try:
                record = json.loads((folder / PROGRESS).read_bytes())
                done += record["runs"] * record["step"] / record["steps"]
            except (FileNotFoundError, ValueError, KeyError):
                continue
        return min(1.0, done / len(chunk.indices))

    def _failure(self, chunk: Chunk) -> str:
        log = self.folder / "logs" / f"{self._name(chunk)}.log"
        lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
        reason = lines[-1] if lines else "it left no message"
        names = ", ".join(folder.name for folder in self._folders(chunk))
        return f"runs {names} failed {TRIES} times: {reason} (see {log})"

    def _report(self, fraction: float, total_s: float | None, live: Sequence[Chunk], note: str) -> None:
        if self.on_progress is None:
            return
        elapsed = time.monotonic() - self.started
        # The plan's seconds before there is anything to go by; what this machine really does after that.
        planned_s = None if total_s is None else total_s / self.launcher.max_parallel
        left = planned_s if fraction < 0.02 else elapsed * (1 - fraction) / fraction
        num_done = self.num_runs - sum(not is_complete(self.runs / m.ref.run_id) for m in self.missing)
        note = note or ", ".join(sorted({_model_label(self.missing[c.indices[0]].config) for c in live}))
        self.on_progress(SweepProgress(num_done, self.num_runs, fraction, elapsed, left, note))


def load_spec(path: str | Path) -> SweepSpec:
    """A SweepSpec from YAML, `base` holding only what differs from the defaults. Errors name the file and the key."""
    return load_yaml(SweepSpec, path)


def _with_lr(config: RunConfig, lr: float) -> RunConfig:
    data = to_dict(config)
    data["optim"]["lr"] = lr
    # A rate below the floor could not decay to it; the paper's floor is absolute, so say so rather than move it.
    return from_dict(RunConfig, data, where=f"rate {lr:g}")


def _model_label(config: RunConfig) -> str:
    model = config.model
    return f"{model.width}x{model.depth}" if model.kind == "decoder" else f"{model.kind}{model.hidden}"
