"""Cells by name, and the grid that fits a subject."""

from __future__ import annotations

import math

import pytest

from aftershock.replay.cells import KINDS, cell, cells, default_grid, grid
from aftershock.replay.edits.clips import Clip
from aftershock.replay.edits.data import Replaced, Skipped, suspects
from aftershock.replay.edits.decay import Decay
from aftershock.replay.edits.optimizer import Betas, Eps
from aftershock.replay.edits.rates import FixedRate, ScaledRate
from aftershock.replay.edits.rows import guilty_rows, suspect_rows
from aftershock.replay.edits.shams import Ulp
from aftershock.replay.run import Cell, Edit
from aftershock.replay.runner import run_cell
from aftershock.replay.subject import Subject


def bad(subject: Subject) -> range:
    """The three bad batches of the subject: the loss is highest on the last of them."""
    return range(subject.window.peak - 2, subject.window.peak + 1)


@pytest.mark.parametrize(
    ("name", "family", "edit"),
    [
        ("lr*0.5", "rate", ScaledRate(factor=0.5)),
        ("lr=1e-3", "rate", FixedRate(lr=1e-3)),
        ("eps*1e3", "optimizer", Eps(factor=1e3)),
        ("wd*0:embeddings", "regularisation", Decay(factor=0.0, of="embeddings")),
        ("clip=off", "clip", Clip(norm=math.inf)),
        ("sham:ulp#3", "sham", Ulp(draw=3)),
    ],
)
def test_a_name_is_its_edit(subject: Subject, name: str, family: str, edit: Edit) -> None:
    """oracle: by hand."""
    assert cell(name, subject) == Cell(name=name, family=family, edit=edit)


def test_betas_say_what_becomes_of_the_moments(subject: Subject) -> None:
    """oracle: a beta that is not given is nan, which no comparison finds."""
    edit = cell("beta2=0.9:recompute", subject).edit
    assert isinstance(edit, Betas)
    assert (edit.beta2, math.isnan(edit.beta1), edit.moments) == (0.9, True, "recompute")


def test_every_form_is_read_and_has_its_family(subject: Subject) -> None:
    """contract: whatever `KINDS` says can be written can be read; no family is new."""
    families = ("control", "sham", "data", "rate", "optimizer", "clip", "precision", "architecture", "regularisation")
    for head, kind in KINDS.items():
        assert kind.family in (*families, "freeze", "state")
        for one in cells(kind.forms, subject):
            assert one.name.startswith(head)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lrr*0.5", "did you mean 'lr"),
        ("Skip", "did you mean 'skip'"),
        ("sham:skipp#1", "a sham cell is written 'sham:skip#1'"),
        ("sham:skip", "a sham cell is written"),
        ("lr*fast", r"a lr cell is written 'lr\*0.5'"),
        ("lr", "a lr cell is written"),
        ("skip#2", "a skip cell is written"),
        ("beta2*0.9", "a beta2 cell is written 'beta2=0.9'"),
        ("beta2=0.9:forget", "a beta2 cell is written"),
        ("beta2=1.5", "betas must lie in"),
        ("wd*-1", "from 0 on"),
        ("policy:stable", "did you mean 'stable-adamw'"),
        ("freeze", "a freeze cell is written"),
        ("", "no cell ''"),
    ],
)
def test_a_wrong_name_says_what_is_right(subject: Subject, name: str, said: str) -> None:
    """planted: mistakes of every part of a name."""
    with pytest.raises(ValueError, match=said):
        cell(name, subject)


def test_a_name_that_fits_nothing_in_the_model_says_so_in_the_grid(subject: Subject) -> None:
    """planted: it is a cell, but there is no such place."""
    found = grid(subject, ["freeze:innner", "dropout=0", "lr*0.5"])
    assert [one.name for one in found.cells] == ["control", "lr*0.5"]
    assert "'inner'" in found.left_out["freeze:innner"]
    assert found.left_out["dropout=0"] == "dropout is 0 already"


def test_the_default_grid_is_short_and_begins_with_what_tells_most(subject: Subject) -> None:
    """contract: control, then shams among the first cells; no name twice; never more than asked for."""
    names = [one.name for one in default_grid(subject)]
    assert names[0] == "control"
    assert {"sham:ulp#1", "sham:skip#1", "skip", "lr*0.5"} <= set(names[:6])
    assert 25 <= len(names) <= 40
    assert len(set(names)) == len(names)
    assert [one.name for one in default_grid(subject, most=3)] == names[:3]
    with pytest.raises(ValueError, match="at least the control"):
        default_grid(subject, most=0)


def test_bad_batches_are_told_from_innocent_ones(subject: Subject) -> None:
    """planted: without the three bad batches no spike comes; every sham keeps it, wherever it begins."""
    base = subject.baseline
    for one in grid(subject).cells:
        data = one.name in ("skip", "replace", "replace:before", "earlier:replace")
        if not (data or one.family in ("sham", "control")):
            continue
        response = run_cell(subject, one).response(base)
        assert response is not None
        assert response.present != data, one.name


def test_skipping_and_replacing_move_the_right_batches(subject: Subject) -> None:
    """oracle: indices by hand, where the recording has no end and where it has."""
    first, last = suspects(subject.window)[0], suspects(subject.window)[-1]
    count = last - first + 1
    run = subject.run()
    Skipped(steps=tuple(suspects(subject.window)), stop=last + count + 3).change(run)
    assert [run.index_of(step) for step in (first - 1, first, first + 1)] == [first - 1, last + 1, last + 2]
    assert [run.keep_going(step, 0.0) for step in (last, last + 1, last + 2)] == [True, True, False]
    run = subject.run()
    Skipped(steps=(3, 5)).change(run)
    assert [run.index_of(step) for step in range(2, 6)] == [2, 4, 6, 7]
    run = subject.run()
    Replaced(steps=suspects(subject.window), later=1000).change(run)
    assert [run.index_of(step) for step in (first - 1, first, last, last + 1)] == [
        first - 1,
        1000,
        1000 + count - 1,
        last + 1,
    ]
    cut = Replaced(steps=suspects(subject.window), stop=last + 5)
    with pytest.raises(ValueError, match="replace:before"):
        cut.check(subject.run())


def test_bisection_finds_the_guilty_rows(subject: Subject) -> None:
    """planted: all 16 rows of three batches are bad; 5 of one batch are asked about, with 27 innocent ones."""
    guilty = [row for row in suspect_rows(subject) if row.step == bad(subject)[0] and row.row in (2, 3, 7, 11, 12)]
    innocent = [row for row in suspect_rows(subject) if row.step not in bad(subject)][:27]
    asked: list[frozenset] = []

    def spikes(one: Cell) -> bool:
        asked.append(one.edit.rows)  # pyright: ignore[reportAttributeAccessIssue] - it is WithoutRows
        return not set(guilty) <= one.edit.rows  # pyright: ignore[reportAttributeAccessIssue]

    found = guilty_rows(subject, spikes, rows=sorted([*guilty, *innocent]), most_cells=200)
    assert found is not None
    assert (set(found.rows), found.smallest, found.cells) == (set(guilty), True, len(asked))
    assert guilty_rows(subject, lambda one: True) is None
    few = guilty_rows(subject, spikes, rows=sorted([*guilty, *innocent]), most_cells=3)
    assert few is not None
    assert (few.smallest, set(guilty) <= set(few.rows)) == (False, True)


def test_bisection_drives_replays(subject: Subject) -> None:
    """planted: of the steps about the spike, the bad ones are found by replays."""
    base = subject.baseline

    def spikes(one: Cell) -> bool:
        response = run_cell(subject, one).response(base)
        assert response is not None
        return response.present

    found = guilty_rows(subject, spikes, most_cells=12)
    assert found is not None
    assert {row.step for row in found.rows} & set(bad(subject))
