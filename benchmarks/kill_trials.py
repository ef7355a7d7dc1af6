"""A small guarded run, killed with -9 at a random moment and resumed, until it ends: python -m benchmarks.kill_trials

Each trial is one run with faults in its data, a rewind included, in a folder of its own. Its processes are forked from
one that is warm, so a trial takes a fraction of a second. Checked after each: every event of the uninterrupted run is
there once, every folder can be read, no snapshot is damaged, and the final weights have the same bits.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from aftershock.guard.events import read_events, standing
from aftershock.guard.guard import Guard
from aftershock.guard.incidentrecord import read_incidents
from aftershock.guard.shelf import listed, verify
from aftershock.guard.skiplist import SkipList

BATCHES = 60
FAULTS = {25: math.nan, 26: math.nan, 27: math.nan, 44: math.nan}
"""Three bad batches in a row are a rewind, one alone is a skip."""
RESULT = "result.json"
MEMORY = Path("/dev/shm")
"""What was written before a kill -9 is there afterwards, synced or not, so memory serves as well as a disk here."""
MOST_KILLS = 4
"""Kills in one trial; then it may end."""
COMING_AND_GOING = ("attached", "resumed", "audited")


class Trial(NamedTuple):
    """How one run went; `faults` is empty when it was as it should be."""

    kills: int
    resumed_at: tuple[int, ...]
    faults: tuple[str, ...]


def train(folder: Path, mode: str) -> None:
    """The run, in this process, from wherever its folder stands; what it ends with goes to a file."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = torch.randn(BATCHES, 8, 4, generator=torch.Generator().manual_seed(1))
    settings: dict[str, Any] = {"snapshot_every": 5, "save_every": 5, "mode": mode}
    with Guard(model, optimizer, folder=folder, resume=True, **settings) as guard:
        for x in guard.batches(data):
            loss = (model(x) - x.sum(1, keepdim=True)).square().mean() * FAULTS.get(guard.batch_id - 1, 1.0)
            loss.backward()
            guard.step(loss)
        digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
        result = {"weights": digest, "steps": guard.step_count, "policy": guard.policy.state_dict()}
        tmp = folder / f"{RESULT}.tmp"
        tmp.write_text(json.dumps(result))
        tmp.rename(folder / RESULT)


def _signs_of_life(pipe: int) -> None:
    """A byte into `pipe` for each call that opens, makes, renames or removes a file."""

    def hook(event: str, args: tuple[object, ...]) -> None:
        if event.startswith(("open", "os.", "shutil.")):
            os.write(pipe, b".")

    sys.addaudithook(hook)


def _start(folder: Path, mode: str) -> tuple[int, int]:
    """Fork a process that trains; its id, and the pipe on which it shows life."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return child, read
    code = 1
    try:
        os.close(read)
        _signs_of_life(write)
        train(folder, mode)
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def _ends(child: int, pipe: int, *, after: int, delay_s: float) -> int | None:
    """Kill the process `delay_s` after its sign of life number `after`; its exit status if it ended before."""
    left = after
    while left > 0:
        got = len(os.read(pipe, min(left, 4096)))
        if not got:
            break
        left -= got
    if left <= 0:
        select.select([], [], [], delay_s)
        os.kill(child, signal.SIGKILL)
    os.close(pipe)
    status = os.waitpid(child, 0)[1]
    return None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def run_whole(folder: Path, mode: str) -> tuple[int, float]:
    """Without a kill: the signs of life it shows, and the seconds it takes."""
    folder.mkdir(parents=True)
    begun = time.perf_counter()
    child, pipe = _start(folder, mode)
    signs = 0
    while got := len(os.read(pipe, 4096)):
        signs += got
    os.close(pipe)
    status = os.waitpid(child, 0)[1]
    if status:
        raise RuntimeError(f"the run without a kill ended with status {status}")
    return signs, time.perf_counter() - begun


def _events(folder: Path) -> list[tuple[str, int, int]]:
    found = [(e.kind, e.step, e.batch_id) for e in standing(read_events(folder))]
    return [one for one in found if one[0] not in COMING_AND_GOING]


def try_once(folder: Path, whole: Path, mode: str, chance: random.Random, *, signs: int, step_s: float) -> Trial:
    """One run killed again and again, held against the one that was not."""
    folder.mkdir(parents=True)
    kills, status = 0, None
    while status is None:
        kill = kills < MOST_KILLS
        after = chance.randrange(1, signs) if kill else sys.maxsize
        child, pipe = _start(folder, mode)
        status = _ends(child, pipe, after=after, delay_s=chance.random() * step_s)
        kills += status is None
    faults = [] if status == 0 else [f"exit status {status}"]
    faults += _differences(folder, whole) if status == 0 else []
    resumed = tuple(e.step for e in read_events(folder) if e.kind == "resumed")
    return Trial(kills, resumed, tuple(faults))


def _differences(folder: Path, whole: Path) -> list[str]:
    faults = []
    ours, theirs = (json.loads((path / RESULT).read_text()) for path in (folder, whole))
    faults += [f"{name} differ" for name in theirs if repr(ours[name]) != repr(theirs[name])]
    events, expected = _events(folder), _events(whole)
    if events != expected:
        faults.append(f"events {events} where the uninterrupted run has {expected}")
    try:
        for path in listed(folder / "snapshots"):
            verify(path)
        incidents = read_incidents(folder)
        for incident in incidents:
            if incident.snapshot is not None:
                for path in listed(incident.snapshot):
                    verify(path)
        skips = [one[:2] for one in SkipList.read(folder / "skip.yaml").ranges]
    except (ValueError, OSError) as error:
        return [*faults, f"unreadable: {error}"]
    if not any(one.kind == "nonfinite" for one in incidents):
        faults.append("no incident is left")
    if skips != [one[:2] for one in SkipList.read(whole / "skip.yaml").ranges]:
        faults.append(f"skip list {skips}")
    return faults


def run_trials(top: Path, *, trials: int, seed: int) -> list[Trial]:
    """`trials` runs below `top`, both rewind modes in turn; folders of faulty ones stay."""
    torch.set_num_threads(1)
    logging.getLogger("aftershock.guard").setLevel(logging.CRITICAL)
    chance = random.Random(seed)
    whole: dict[str, tuple[Path, int, float]] = {}
    for mode in ("in_place", "restart"):
        run_whole(top / f"warm-{mode}", mode)
        whole[mode] = (top / f"whole-{mode}", *run_whole(top / f"whole-{mode}", mode))
    done = []
    for number in range(trials):
        mode = ("in_place", "restart")[number % 2]
        path, signs, seconds = whole[mode]
        folder = top / f"trial-{number:04d}"
        done.append(try_once(folder, path, mode, chance, signs=signs, step_s=seconds / BATCHES))
        if not done[-1].faults:
            shutil.rmtree(folder)
    return done


def warm_up(top: Path) -> None:
    """Whatever is imported and compiled at the first use, here and not in every child."""
    logging.getLogger("aftershock.guard").setLevel(logging.CRITICAL)
    for mode in ("in_place", "restart"):
        path = top / f"parent-{mode}"
        path.mkdir(parents=True)
        train(path, mode)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work; by default a temporary folder")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as temporary:
        top = arguments.folder or Path(temporary)
        warm_up(top)
        done = run_trials(top, trials=arguments.trials, seed=arguments.seed)
        seconds = time.perf_counter() - begun
        wrong = [(number, trial) for number, trial in enumerate(done) if trial.faults]
        for number, trial in wrong[:20]:
            print(f"trial {number}: {'; '.join(trial.faults)}")
        kills = sum(trial.kills for trial in done)
        print(
            f"{len(done)} trials, {kills} kills, {sum(len(t.resumed_at) for t in done)} resumed: {len(wrong)} wrong; "
            f"{seconds:.0f} s, {seconds / max(1, len(done)):.2f} s a trial, seed {arguments.seed}"
        )
        if wrong and arguments.folder is None:
            print("give --folder to keep what is left of the wrong ones")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
