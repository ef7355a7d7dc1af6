"""Where jobs run: the `Launcher` seam, and the local one, which is the default.

A job is one command on its run folders (one folder, or the K of a fleet). All a job needs and all it leaves is in them,
so any back-end can finish a half-done sweep by looking at what is there. Must not import torch.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

JobState = Literal["running", "done", "failed"]


class Job(NamedTuple):
    """`command` is complete; `log` takes its output. `folders` are what it writes."""

    name: str
    command: tuple[str, ...]
    folders: tuple[Path, ...]
    log: Path


class Launcher(Protocol):
    """Places jobs. `submit` starts one and returns a handle; never more than `max_parallel` are submitted at a time."""

    @property
    def max_parallel(self) -> int: ...

    def submit(self, job: Job) -> str: ...

    def poll(self, handle: str) -> JobState: ...

    def cancel(self, handle: str) -> None: ...


def job_for(
    folders: list[Path], *, fleet_size: int, log: Path, sinks: Sequence[str] = (), mirror: str | None = None
) -> Job:
    """The command that trains these run folders, so many at a time: `aftershock run FOLDER... --fleet-size K`."""
    paths = [str(folder.resolve()) for folder in folders]
    flags = ["--fleet-size", str(fleet_size)]
    flags += ["--sinks", *sinks] if sinks else []
    flags += ["--mirror", mirror] if mirror else []
    command = (sys.executable, "-m", "aftershock", "run", *paths, *flags)
    return Job(folders[0].name, command, tuple(folders), log)


class LocalLauncher:
    """Processes of one thread each on this machine. They die with the process that started them, even by kill -9.

    `num_processes=0` takes one a core that this process may use.
    """

    def __init__(self, *, num_processes: int = 0) -> None:
        if num_processes < 0:
            raise ValueError(f"the number of processes must be at least 1 (or 0: one a core), got {num_processes}")
        self._max_parallel = num_processes or _usable_cores()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def max_parallel(self) -> int:
        return self._max_parallel

    def submit(self, job: Job) -> str:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with job.log.open("ab") as log:
            # The job watches its standard input: end of file means that its parent is gone, however it went.
            process = subprocess.Popen(
                [*job.command, "--lifeline"], stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment
            )
        handle = str(process.pid)
        self._processes[handle] = process
        return handle

    def poll(self, handle: str) -> JobState:
        process = self._processes[handle]
        code = process.poll()
        if code is None:
            return "running"
        assert process.stdin is not None
        process.stdin.close()
        return "done" if code == 0 else "failed"

    def cancel(self, handle: str) -> None:
        process = self._processes[handle]
        process.kill()
        process.wait()
        self.poll(handle)


def _usable_cores() -> int:
    """Cores this process may run on: a container or a batch system may give fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
