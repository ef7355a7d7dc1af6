"""Run by test_disk.py: children that save snapshots and are killed with -9, at every system call and at any time.

Prints one line of JSON: how many calls a save makes, and the last step that survived. Any unreadable outcome ends with
a traceback.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import torch
from torch import nn

from aftershock.guard.disk import restore_from
from aftershock.guard.recorder import FlightRecorder
from aftershock.guard.shelf import newest
from aftershock.guard.state import Training


def build() -> tuple[Training, nn.Linear]:
    model = nn.Linear(64, 64)
    return Training(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)), model


def save(folder: Path, first: int, last: int) -> None:
    """Snapshots of steps first..last-1; every weight of a step has the step's own value."""
    training, model = build()
    recorder = FlightRecorder(training)
    for step in range(first, last):
        with torch.no_grad():
            model.weight.fill_(step)
        recorder.take(step, step)
        recorder.save(folder, step, keep=2)


def last_whole(folder: Path) -> int:
    """The step that a resumed run starts from; the state must be that of one step, whole."""
    if newest(folder) is None:
        return -1
    training, model = build()
    at = restore_from(folder, training)
    assert bool((model.weight == at.step).all()), (at, model.weight)
    return at.step


def at_every_call(folder: Path) -> int:
    """Children die at the 1st, 2nd, ... call that the save makes to the system, until one gets through."""
    save(folder, 0, 2)
    before = last_whole(folder)
    for count in range(1, 1000):
        child = os.fork()
        if child == 0:
            left = count

            def hook(event: str, args: tuple[object, ...]) -> None:
                nonlocal left
                if event.startswith(("open", "os.", "shutil.")):
                    left -= 1
                    if left == 0:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)
            save(folder, before + 1, before + 2)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        after = last_whole(folder)
        assert after in (before, before + 1), (before, after)
        before = after
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            return count - 1
    raise AssertionError("the save never came to an end")


def _show_life(pipe: int) -> None:
    """A byte into `pipe` for each file that is opened."""

    def hook(event: str, args: tuple[object, ...]) -> None:
        if event == "open":
            os.write(pipe, b".")

    sys.addaudithook(hook)


def at_any_time(folder: Path, trials: int) -> int:
    """Children save without end and are killed from outside, after a random number of signs of life."""
    chance = random.Random(0)
    before = -1
    for _ in range(trials):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            _show_life(write)
            save(folder, before + 1, 1_000_000)
        os.close(write)
        left = chance.randrange(1, 60)
        while left > 0:
            left -= len(os.read(read, left))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)
        after = last_whole(folder)
        assert after >= before, (before, after)
        before = after
    return before


if __name__ == "__main__":
    torch.set_num_threads(1)
    top = Path(sys.argv[1])
    calls = at_every_call(top / "calls")
    shutil.rmtree(top / "calls")
    print(json.dumps({"calls": calls, "reached": at_any_time(top / "times", int(sys.argv[2]))}))
