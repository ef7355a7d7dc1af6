"""forked: answers by number, what becomes of work that fails, dies or is late, and how many workers it takes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
import torch

from aftershock.replay import forked
from aftershock.replay.forked import Lost, can_fork, run_forked

pytestmark = pytest.mark.skipif(not can_fork(), reason="workers cannot be forked here")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_number_is_answered_by_few_workers(processes: int) -> None:
    """equivalence: as a loop would have it, from no more workers than asked for, none of them this process."""
    answers = dict(run_forked(lambda number: (number**2, os.getpid()), 20, processes=processes))
    found = {number: answer[0] for number, answer in answers.items() if not isinstance(answer, Lost)}
    assert found == {number: number**2 for number in range(20)}
    pids = {answer[1] for answer in answers.values() if not isinstance(answer, Lost)}
    assert os.getpid() not in pids
    assert 1 <= len(pids) <= processes


def test_a_worker_that_failed_is_not_asked_again() -> None:
    """planted: what it may have left wrong does not reach the next number; the same of one that dies."""
    left = list[str]()

    def work(number: int) -> list[str]:
        if number == 2:
            left.append("a change that was not put back")
            raise ValueError("no such thing")
        if number == 4:
            os._exit(7)
        return left

    answers = dict(run_forked(work, 6, processes=1))
    assert answers[2] == Lost("error", "ValueError: no such thing")
    assert answers[4] == Lost("error", "the worker died with exit code 7")
    assert [answers[number] for number in (0, 1, 3, 5)] == [[]] * 4


def test_when_the_time_is_up_none_begins_and_a_late_one_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """contract: every number has its answer; the one under way is given its grace."""
    monkeypatch.setattr(forked, "GRACE_S", 0.1)

    def work(number: int) -> int:
        if number:
            time.sleep(60)
        return number

    begun = time.monotonic()
    answers = dict(run_forked(work, 4, processes=1, deadline=begun + 1.0))
    assert time.monotonic() - begun < 30
    assert answers[0] == 0
    assert answers[1] == Lost("late", "did not end within 0.1 s after the time was up")
    assert [answers[2], answers[3]] == [Lost("budget")] * 2


def test_a_caller_that_stops_listening_leaves_no_worker() -> None:
    """contract: closing the iterator ends the workers, busy or idle."""
    running = run_forked(lambda number: os.getpid() if number == 0 else time.sleep(60), 3, processes=2)
    _, pid = next(running)
    running.close()
    assert isinstance(pid, int)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
