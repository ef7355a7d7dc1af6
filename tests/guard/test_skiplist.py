"""The skip list: ranges merge, survive the file, say where a mistake is, and follow the data to another unit."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aftershock.guard.skiplist import SkipList, SkipRange, Unit, convert_id

RANGES = st.lists(
    st.tuples(st.integers(0, 40), st.integers(1, 10)).map(lambda p: SkipRange(p[0], p[0] + p[1])), max_size=8
)


@given(RANGES)
def test_membership_is_that_of_the_plain_union(ranges: list[SkipRange]) -> None:
    """property: against a set of ids; sorted, without overlap, whatever the order of adding."""
    union = {i for one in ranges for i in range(one.start, one.stop)}
    skips = SkipList(ranges)
    assert [i in skips for i in range(60)] == [i in union for i in range(60)]
    assert all(a.stop <= b.start for a, b in zip(skips.ranges, skips.ranges[1:], strict=False))
    again = SkipList(reversed(ranges))
    assert [(r.start, r.stop) for r in again.ranges] == [(r.start, r.stop) for r in skips.ranges] or union == {
        i for one in again.ranges for i in range(one.start, one.stop)
    }


@given(RANGES, st.integers(0, 60))
def test_first_kept_is_the_next_id_outside(ranges: list[SkipRange], at: int) -> None:
    """oracle: a search step by step."""
    skips, slow = SkipList(ranges), at
    while slow in {i for one in ranges for i in range(one.start, one.stop)}:
        slow += 1
    assert skips.first_kept(at) == slow


@pytest.mark.parametrize("name", ["skip.yaml", "skip.json"])
@given(ranges=RANGES)
def test_file_round_trip(tmp_path_factory: pytest.TempPathFactory, name: str, ranges: list[SkipRange]) -> None:
    """round trip: file and state, unit included."""
    skips = SkipList(ranges, unit=Unit(64, 1000))
    if ranges:
        skips.add(3, 9, "loss spike: 5 sigma")
    path = tmp_path_factory.mktemp("skips") / name
    skips.write(path)
    for back in (SkipList.read(path), SkipList.from_state(skips.state_dict())):
        assert back.ranges == skips.ranges
        assert back.unit == skips.unit


def test_a_range_over_others_takes_their_reasons() -> None:
    """contract."""
    skips = SkipList([SkipRange(1, 3, "a"), SkipRange(8, 9, "b"), SkipRange(20, 21, "far")])
    skips.add(2, 9, "c")
    assert [(r.start, r.stop, r.reason) for r in skips.ranges] == [(1, 9, "a; b; c"), (20, 21, "far")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("skip:\n- {start: 1, stop: 2}\n- {start: 5, stop: 5}\n", "line 3: range \\[5, 5\\) must have"),
        ("skip:\n- start: 1\n", "line 2: a range needs `stop`"),
        ("skip:\n- start: 1\n  stop: two\n", "line 3: `stop` must be a whole number, got 'two'"),
        ("skip:\n- start: 1\n  end: 2\n", "line 3: 'end' unknown"),
        ("skip:\n- start: 1\n  start: 2\n", "line 3: 'start' stands there twice"),
        ("skip: 5\n", "line 1: `skip` must be a list"),
        ("unit: {}\n", "no `skip:`"),
        ("skip: [\n", "line 2: not YAML"),
        ("- 1\n", "line 1: expected"),
        ("unit:\n  samples_per_batch: x\nskip: []\n", "line 2: `samples_per_batch` must be"),
    ],
)
def test_a_mistake_names_its_line(tmp_path: Path, text: str, said: str) -> None:
    """planted: each mistake a person makes while editing."""
    path = tmp_path / "skip.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        SkipList.read(path)


def test_a_file_by_hand_without_a_unit_is_in_ids_of_the_run(tmp_path: Path) -> None:
    """contract."""
    path = tmp_path / "skip.yaml"
    path.write_text("skip:\n- start: 4\n  stop: 6\n")
    skips = SkipList.read(path)
    skips.convert(Unit(8, 100))
    assert 5 in skips
    assert skips.unit == Unit(8, 100)


@given(RANGES, st.integers(1, 5), st.integers(1, 5))
def test_another_unit_skips_at_least_the_same_samples(ranges: list[SkipRange], old: int, new: int) -> None:
    """property: every sample that was skipped still is; epochs of 60 samples."""
    a, b = Unit(old, 60 // old), Unit(new, 60 // new)
    if 60 % old or 60 % new:
        return
    skips = SkipList(ranges, unit=a)
    moved = SkipList(ranges, unit=a)
    moved.convert(b)
    for sample in range(240):
        epoch, rest = divmod(sample, 60)
        if epoch * (60 // old) + rest // old in skips:
            assert epoch * (60 // new) + rest // new in moved


@pytest.mark.parametrize(("old", "new"), [(Unit(None, 10), Unit(4, 10)), (Unit(4, 10), Unit(4, None))])
def test_units_that_do_not_tell_are_refused(old: Unit, new: Unit) -> None:
    """planted."""
    with pytest.raises(ValueError, match="cannot be read"):
        convert_id(3, old, new)


@pytest.mark.parametrize("pair", [(3, 3), (-1, 2), (5, 1)])
def test_an_empty_range_is_refused(pair: tuple[int, int]) -> None:
    """planted."""
    with pytest.raises(ValueError, match="0 <= start < stop"):
        SkipList().add(*pair, "why")
