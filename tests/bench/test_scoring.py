from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aftershock.bench.scoring import (
    GRACE,
    HORIZON,
    LEADS,
    REFRACTORY,
    Tally,
    Target,
    catchable,
    episodes,
    num_healthy_steps,
    tally,
)

STEPS = 400


@st.composite
def _targets(draw: st.DrawFn) -> list[Target]:
    """Up to four spikes in a run, each opening after the end of the one before, planted ones at their onset."""
    found: list[Target] = []
    free = 0
    for _ in range(draw(st.integers(0, 4))):
        onset = free + draw(st.integers(0, 80))
        peak = onset + draw(st.integers(0, 12))
        end = peak + draw(st.integers(1, 40))
        if end >= STEPS:
            break
        planted = draw(st.booleans())
        found.append(Target(onset if planted else max(free, onset - HORIZON), onset, peak, end))
        free = end + 1
    return found


_ALARMS = st.sets(st.integers(0, STEPS - 1), max_size=60).map(sorted)


def _slow(alarms: list[int], targets: list[Target], lead: int) -> tuple[int, int, int]:
    """The definition read word by word, a step at a time: caught, false, false on healthy steps."""
    starts, standing = [], 0
    for step in range(STEPS):
        standing = max(0, standing - 1)
        if step in alarms and standing == 0:
            starts.append(step)
            standing = REFRACTORY
    owner: dict[int, int | None] = {}
    for step in range(STEPS):
        owner[step] = None
        for index, target in enumerate(targets):
            if target.opens <= step <= target.end + GRACE:
                owner[step] = index  # a later target takes over where it opens in the grace of the one before
    caught = false = quiet = 0
    done: set[int] = set()
    for start in starts:
        index = owner[start]
        if index is None:
            quiet += 1
            false += 1
        elif index not in done:
            done.add(index)
            target = targets[index]
            if any(step <= target.peak - lead for step in range(target.opens, target.end)):
                caught += start <= target.peak - lead
                false += start > target.peak - lead
    return caught, false, quiet


@given(_ALARMS, _targets())
def test_the_tally_is_the_definition(alarms: list[int], targets: list[Target]) -> None:
    """oracle: against a step-by-step reading of the definition."""
    found = tally(episodes(alarms), targets)
    slow = [_slow(alarms, targets, lead) for lead in LEADS]
    assert found.caught == tuple(s[0] for s in slow)
    assert found.false == tuple(s[1] for s in slow)
    assert found.quiet_false == slow[0][2]


@given(_targets())
def test_healthy_steps_are_those_that_no_target_owns(targets: list[Target]) -> None:
    """oracle: counted one by one."""
    busy = {step for t in targets for step in range(t.opens, min(t.end + GRACE, STEPS - 1) + 1)}
    assert num_healthy_steps(targets, STEPS) == STEPS - len(busy)


@given(_ALARMS, _targets())
def test_a_longer_lead_never_catches_more(alarms: list[int], targets: list[Target]) -> None:
    """property."""
    caught = tally(episodes(alarms), targets).caught
    assert list(caught) == sorted(caught, reverse=True)


@given(_targets())
def test_an_alarm_without_end_is_seen_by_every_spontaneous_spike(targets: list[Target]) -> None:
    """property: the refractory time is short enough not to hide a warning."""
    spontaneous = [t for t in targets if t.onset - t.opens == HORIZON]
    found = tally(episodes(range(STEPS)), targets)
    for target, first in zip(targets, found.first, strict=True):
        if target in spontaneous:
            assert first is not None
            assert first <= target.peak - max(LEADS)


def test_an_alarm_that_goes_on_is_counted_again() -> None:
    """planted: else a rule that never stops alarming had one false alarm a run."""
    assert len(episodes(range(160))) == 160 / REFRACTORY
    assert episodes([]) == []


def test_late_early_and_further_alarms() -> None:
    """planted: one spike with onset 100 and peak 104."""
    target = Target(100 - HORIZON, 100, 104, 110)

    def at(*steps: int) -> Tally:
        return tally(episodes(steps), [target])

    assert at(103) == Tally((1, 1, 0, 0, 0), (0, 0, 1, 1, 1), 0, (103,))
    assert at(100 - HORIZON).caught == (1, 1, 1, 1, 1)
    assert at(100 - HORIZON - 1) == Tally((0,) * 5, (1,) * 5, 1, (None,))
    assert at(90, 110, 130).false == (0,) * 5  # beyond the first: neither
    assert at(110 + GRACE).false == (1,) * 5  # the first, and late
    assert at(110 + GRACE + 1).quiet_false == 1


def test_a_fault_that_nobody_can_foresee_is_left_out() -> None:
    """planted: it strikes at the peak itself, so no lead of 1 exists; an alarm there is no false one."""
    target = Target(50, 50, 50, 52)
    assert [catchable(target, lead) for lead in LEADS] == [True, False, False, False, False]
    assert tally([50], [target]) == Tally((1, 0, 0, 0, 0), (0,) * 5, 0, (50,))
