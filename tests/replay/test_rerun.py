"""A run that its own config builds again: which spike is taken, whether the record came out again, and no spike."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from aftershock.replay.controls import run_controls
from aftershock.replay.recording import find_spikes
from aftershock.replay.rerun import Rerun, retrain
from aftershock.replay.subject import Subject
from aftershock.workload import Workload

Build = Callable[..., Workload]
STEPS = 240


def rerun(make: Build, losses: dict[int, float], *, steps: int = STEPS, notes: tuple[str, ...] = ()) -> Rerun:
    return Rerun("runs/a", losses, steps, lambda step: (make(), 0), find_spikes, notes)


@pytest.fixture(scope="module")
def losses(subject: Subject) -> dict[int, float]:
    """As they were recorded by the loop of `recording.record`, which a test of its own holds to one by hand."""
    return {step: subject.recorded[step] for step in range(min(STEPS, len(subject.recorded)))}


def test_its_losses_come_out_again(make: Build, losses: dict[int, float], subject: Subject) -> None:
    """round trip: the same window, every bit, and unchanged replays that have the spike."""
    found = retrain(rerun(make, losses))
    assert found.subject.window == subject.window
    assert (found.first, found.before, found.off) == (None, 0.0, 0.0)
    assert found.subject.notes == ()
    assert "runs/a: a spike from step 150 until step 152, highest at step" in found.words
    assert found.words.endswith("Trained again from the start, all 206 recorded losses came out again, bit for bit.")
    assert run_controls(found.subject).kind == "deterministic"


def test_what_came_out_otherwise_is_said(make: Build, losses: dict[int, float]) -> None:
    """planted: one loss off by 0.01 long before the spike, one by 2 within it, and the reason that the run knows."""
    other = losses | {10: losses[10] + 0.01, 151: losses[151] + 2}
    found = retrain(rerun(make, other, notes=("it was trained in a fleet of 4",)))
    assert found.first == 10
    assert found.before == pytest.approx(0.01)
    assert found.off == pytest.approx(2.0)
    assert "did not come out again to the bit (it was trained in a fleet of 4): the first other one is at step 10" in (
        found.words
    )
    assert len(found.subject.notes) == 1
    assert found.subject.recorded[10] == losses[10]


def test_a_log_with_gaps_is_no_hindrance(make: Build, losses: dict[int, float], subject: Subject) -> None:
    """planted: of every tenth step only; the spike is between them, and what was logged is compared."""
    found = retrain(rerun(make, {step: loss for step, loss in losses.items() if step % 10 == 0}))
    assert found.subject.window == subject.window
    assert "all 21 recorded losses came out again" in found.words


def test_it_goes_on_from_where_it_was_built(make: Build, losses: dict[int, float], subject: Subject) -> None:
    """equivalence: built before step 25, asked for one before 30, it has the same spike."""
    asked: list[int] = []

    def build(step: int) -> tuple[Workload, int]:
        asked.append(step)
        workload = make()
        for index in range(25):
            workload.backward(index)
            workload.optimizer.step()
            assert workload.scheduler is not None
            workload.scheduler.step()
            workload.optimizer.zero_grad()
        return workload, 25

    found = retrain(rerun(make, losses)._replace(build=build))
    assert asked == [30]
    assert found.subject.window == subject.window
    assert "Trained again from the snapshot of step 25, all 181 recorded losses" in found.words


def test_a_step_chooses_the_spike(make: Build, losses: dict[int, float]) -> None:
    """planted: within the spike it is that spike; where the rule sees none, what rises there, by hand."""
    assert retrain(rerun(make, losses), step=151).subject.window == retrain(rerun(make, losses)).subject.window
    blind = rerun(make, losses)._replace(label=lambda losses: [])
    with pytest.raises(ValueError, match="at step 152: 9.*; --step 152 asks about it all the same"):
        retrain(blind)
    window = retrain(blind, step=151).subject.window
    assert (window.onset, window.peak, window.end) == (151, 152, 153)


def test_a_run_that_broke_is_a_subject(make: Build, losses: dict[int, float]) -> None:
    """planted: batches from step 100 on are infinite; the lab's log ends with the first loss that was not finite."""

    def broken() -> Workload:
        workload = make()
        fine = workload.batch
        workload.batch = lambda i: (fine(i)[0], fine(i)[1] * (math.inf if i >= 100 else 1.0))
        return workload

    cut = {step: losses[step] for step in range(100)} | {100: math.inf}
    found = retrain(rerun(broken, cut, steps=100))
    assert found.first is None
    assert (found.subject.window.onset, found.subject.window.start) == (100, 60)
    assert "a spike from step 100 to the end" in found.words


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (None, r"no spike in its 120 losses. The highest above the median .*; which is within their spread"),
        (500, "--step 500 is not one of runs/a, whose losses are of steps 0 to 119"),
        (0, "--step 0 is not one of"),
    ],
)
def test_no_spike_is_a_sentence(make: Build, losses: dict[int, float], step: int | None, words: str) -> None:
    """planted: the calm steps before the spike; and steps that there are not."""
    calm = {at: losses[at] for at in range(120)}
    with pytest.raises(ValueError, match=words) as caught:
        retrain(rerun(make, calm, steps=120), step=step)
    assert "\n" not in str(caught.value)


def test_a_step_at_which_nothing_rises(make: Build, losses: dict[int, float]) -> None:
    """planted: the lowest of the calm losses."""
    low = min(range(60, 120), key=lambda at: losses[at])
    with pytest.raises(ValueError, match=f"from step {low} on the loss does not rise"):
        retrain(rerun(make, losses), step=low)


def test_a_spike_that_does_not_come_again(make: Build, losses: dict[int, float]) -> None:
    """planted: recorded at step 60, where the same steps are calm."""
    with pytest.raises(ValueError, match="spikes at step 60 as recorded, and trained again it does not: a reason"):
        retrain(rerun(make, {**{s: losses[s] for s in range(120)}, 60: 1e3}, steps=120, notes=("a reason",)))


def test_a_spike_with_the_first_step(make: Build) -> None:
    """planted: nothing before it is healthy."""
    with pytest.raises(ValueError, match="spikes with its first step"):
        retrain(rerun(make, {0: math.nan, 1: math.nan}, steps=2))
