"""The whole explanation: of a spike that comes back, within a budget, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from aftershock.replay.explain import PARTS, Explanation, _Explaining, replay
from aftershock.replay.recording import record
from aftershock.replay.subject import Subject
from aftershock.workload import Workload

CELLS = ("sham:ulp#1", "sham:skip#1", "skip", "replace", "earlier", "lr*0.5", "clip*2", "qk-norm", "freeze:inner")


@pytest.fixture(scope="module")
def found(make: Callable[..., Workload]) -> Explanation:
    subject = record(make(), steps=400)
    assert subject is not None
    return replay(subject, cells=CELLS, parts=("places", "no_return", "rows"), processes=1)


def test_bad_batches_are_named_with_the_remedy(found: Explanation) -> None:
    """planted: three batches with wrong targets: class C7, leaving them out helps, and the controls have the bits."""
    assert found.controls.kind == "deterministic"
    assert found.verdict.cause == "C7"
    assert found.remedies[0].cell == "skip"
    assert "Ladder()" in found.words
    assert "qk-norm" in found.left_out


def test_the_parts_are_there(found: Explanation) -> None:
    """planted: the rows that are guilty are the wrong ones, and the place and point of no return were looked for."""
    assert found.guilty is not None
    assert {row.step for row in found.guilty.rows} <= {150, 151, 152}
    assert found.places is not None
    assert found.no_return is not None
    assert found.thinking is None  # not asked for


def test_a_budget_is_kept_and_what_it_cost_is_said(make: Callable[..., Workload]) -> None:
    """contract: no time for anything but what was begun; nothing is left out without a word."""
    subject = record(make(), steps=400)
    assert isinstance(subject, Subject)
    with pytest.raises(ValueError, match="no unchanged replay took a step"):
        replay(subject, minutes=1e-9, processes=1)
    explaining = _Explaining(subject, 60.0, 1, None, lambda what, done, total: expire(what))

    def expire(what: str) -> None:
        if what == "controls":
            explaining._seconds = 1e-6

    short = explaining.all(CELLS, 40, PARTS)
    assert short.controls.kind == "deterministic"
    assert all(asked.stopped == "budget" for asked in short.cells)
    said = " ".join(short.notes)
    assert "not reached in time: sham:ulp#1" in said
    assert all(f"{part}: not reached in time" in said for part in PARTS)


def test_what_cannot_be_asked_is_refused(make: Callable[..., Workload]) -> None:
    """contract: before any replay."""
    subject = record(make(), steps=400)
    assert isinstance(subject, Subject)
    with pytest.raises(ValueError, match="no cell 'lr~2'"):
        replay(subject, cells=["lr~2"], processes=1, parts=())
    with pytest.raises(ValueError, match="unknown part"):
        replay(subject, parts=("plaices",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="minutes must be above 0"):
        replay(subject, minutes=0)
    with pytest.raises(ValueError, match="with its workload"):
        replay("some/incident")
