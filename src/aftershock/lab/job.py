"""What `aftershock run FOLDER...` does: train the runs of these folders, as fleets, in this process, on one thread."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from aftershock.config import load_yaml
from aftershock.lab.data import build_batches
from aftershock.lab.fleet import Fleet, check_same
from aftershock.lab.recipe import RunConfig
from aftershock.lab.sweep import PROGRESS
from aftershock.lab.train import OnStep, train_fleet
from aftershock.store.folder import atomic_write
from aftershock.store.sinks import sink_from_spec
from aftershock.store.writer import RunWriter

PROGRESS_INTERVAL_S = 0.5


def run_folders(
    folders: Sequence[Path],
    *,
    fleet_size: int = 0,
    device: str = "cpu",
    sinks: Sequence[str] = (),
    mirror: str | None = None,
) -> list[dict[str, Any]]:
    """Train the run of each folder's `config.yaml`, `fleet_size` at a time (0: all at once); returns the summaries.

    Raises ValueError where a folder has no config, the configs cannot share a fleet, or another process writes one.
    """
    torch.set_num_threads(1)
    configs = [load_yaml(RunConfig, folder / "config.yaml") for folder in folders]
    check_same(configs)
    batches = build_batches(configs[0].data)
    size = fleet_size or len(folders)
    summaries: list[dict[str, Any]] = []
    for start in range(0, len(folders), size):
        here = slice(start, start + size)
        fleet = Fleet(configs[here], batches=batches, device=device)
        with ExitStack() as stack:
            writers = [
                stack.enter_context(
                    RunWriter.open(
                        folder,
                        config=config,
                        env={"data": batches.describe()},
                        sinks=[sink_from_spec(spec) for spec in sinks],
                        mirror=None if mirror is None else f"{mirror.rstrip('/')}/{folder.name}",
                    )
                )
                for folder, config in zip(folders[here], configs[here], strict=True)
            ]
            on_step = _progress_file(folders[start] / PROGRESS, num_runs=fleet.size)
            summaries += train_fleet(fleet, writers, on_step=on_step)
    return summaries


def watch_lifeline() -> None:
    """End this process at once when its standard input ends: whoever started it is gone."""

    def wait() -> None:
        sys.stdin.buffer.read()
        os._exit(75)  # EX_TEMPFAIL of sysexits.h: the run is unfinished and may be started again

    threading.Thread(target=wait, daemon=True).start()


def _progress_file(path: Path, *, num_runs: int) -> OnStep:
    last = 0.0

    def on_step(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= PROGRESS_INTERVAL_S or done == total:
            last = time.monotonic()
            atomic_write(path, json.dumps({"step": done, "steps": total, "runs": num_runs}).encode())

    return on_step
