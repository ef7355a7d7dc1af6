"""Work by number in forked processes: each has a copy of everything that was there when it was forked.

A worker does one number after another, so what a fork costs (tens of milliseconds with torch loaded) is paid once a
worker and not once a number. Knows no cells. Must not import anything of ours.
"""

from __future__ import annotations

import math
import multiprocessing
import time
import warnings
from collections.abc import Callable, Generator
from multiprocessing.connection import Connection, wait
from typing import Any, Literal, NamedTuple, TypeVar

import torch

T = TypeVar("T")
Work = Callable[[int], T]

GRACE_S = 10.0
"""A worker that has not ended by itself this long after the time is up is ended."""


class Lost(NamedTuple):
    """Why a number has no answer. "budget": the time was up before it began; "late": it did not end then; "error": it
    raised, or its worker died. `words` say more."""

    why: Literal["budget", "late", "error"]
    words: str = ""


class _Worker(NamedTuple):
    pipe: Connection
    process: Any


def can_fork() -> bool:
    """Whether workers can be forked: not with a GPU, since neither CUDA nor autograd's threads outlive a fork."""
    return "fork" in multiprocessing.get_all_start_methods() and not torch.accelerator.is_available()


def run_forked(
    work: Work[T], count: int, *, processes: int, deadline: float = math.inf
) -> Generator[tuple[int, T | Lost], None, None]:
    """`work(0)` to `work(count - 1)` as their answers come in, begun in that order.

    - `processes`: workers of one thread each. One whose work raised may have left its copy of things as they should
      not be: it ends, and another is forked
    - `deadline` of `time.monotonic()`: from then on none begins, and `work` is expected to end by itself within
      `GRACE_S`

    Closing it ends the workers.
    """
    waiting, idle, under_way = list(range(count)), list[_Worker](), dict[Connection, tuple[_Worker, int]]()
    try:
        while waiting or under_way:
            while waiting and len(under_way) < processes:
                number = waiting.pop(0)
                if time.monotonic() >= deadline:
                    yield number, Lost("budget")
                    continue
                worker = idle.pop() if idle else _fork(work)
                worker.pipe.send(number)
                under_way[worker.pipe] = (worker, number)
            left = None if math.isinf(deadline) else max(0.0, deadline + GRACE_S - time.monotonic())
            ready = wait(list(under_way), timeout=left) if under_way else []
            for pipe in ready or list(under_way):
                assert isinstance(pipe, Connection)
                worker, number = under_way.pop(pipe)
                answer = _received(worker) if ready else _ended(worker)
                if not isinstance(answer, Lost):
                    idle.append(worker)
                yield number, answer
    finally:
        for worker in idle:
            worker.pipe.send(None)
            worker.process.join()
        for worker, _ in under_way.values():
            _ended(worker)


def _fork(work: Work[Any]) -> _Worker:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, work), daemon=True)
    with warnings.catch_warnings():
        # From Python 3.12 on: threads of this process are not in the fork. torch's are not waited for.
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    theirs.close()  # so that a worker's death is the end of the pipe
    return _Worker(ours, process)


def _serve(pipe: Connection, work: Work[Any]) -> None:
    """In the worker."""
    torch.set_num_threads(1)
    try:
        while (number := pipe.recv()) is not None:
            try:
                answer = work(number)
            except Exception as failed:
                pipe.send(Lost("error", f"{type(failed).__name__}: {failed}"))
                return
            pipe.send(answer)
    except (EOFError, BrokenPipeError):  # whoever asked is gone
        return


def _received(worker: _Worker) -> Any:
    try:
        answer = worker.pipe.recv()
    except EOFError:
        worker.process.join()
        return Lost("error", f"the worker died with exit code {worker.process.exitcode}")
    if isinstance(answer, Lost):
        worker.process.join()
    return answer


def _ended(worker: _Worker) -> Lost:
    worker.process.terminate()
    worker.process.join()
    return Lost("late", f"did not end within {GRACE_S:g} s after the time was up")
