from __future__ import annotations

from aftershock.bench.corpus import MAX_TARGETS, place_targets
from aftershock.bench.scoring import GRACE, HORIZON, Target


def test_a_spontaneous_spike_opens_before_its_onset_and_after_the_one_before() -> None:
    """planted."""
    targets, steps = place_targets([(100, 103, 110), (120, 121, 130)], fault=None, num_steps=500)
    assert targets == (Target(100 - HORIZON, 100, 103, 110), Target(111, 120, 121, 130))
    assert steps == 500


def test_a_planted_fault_opens_at_its_step() -> None:
    """planted: nobody can foresee it, so what alarms before is false; a spike before it is a spontaneous one."""
    found = place_targets([(100, 103, 110), (203, 204, 210)], fault=200, num_steps=500)
    assert found.targets == (Target(100 - HORIZON, 100, 103, 110), Target(200, 203, 204, 210))
    early = place_targets([(195, 204, 210)], fault=200, num_steps=500)
    assert early.targets == (Target(200, 200, 204, 210),)


def test_a_fault_without_a_spike_ends_the_run() -> None:
    """planted: what comes after it is neither healthy nor a spike."""
    assert place_targets([(50, 52, 60)], fault=200, num_steps=500) == (
        (Target(50 - HORIZON, 50, 52, 60),),
        200,
    )
    assert place_targets([], fault=200, num_steps=500) == ((), 200)


def test_a_run_that_spikes_for_ever_is_read_up_to_the_last_that_counts() -> None:
    """planted: up to where the next one opens, and at most for the grace."""
    far = [(100 * i, 100 * i + 2, 100 * i + 10) for i in range(1, 9)]
    targets, steps = place_targets(far, fault=None, num_steps=1000)
    assert len(targets) == MAX_TARGETS
    assert steps == targets[-1].end + GRACE + 1
    near = [(100 + 30 * i, 101 + 30 * i, 103 + 30 * i) for i in range(8)]
    targets, steps = place_targets(near, fault=None, num_steps=1000)
    assert steps == targets[-1].end + 1
