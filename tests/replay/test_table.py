"""An explanation in the terminal: everything that a reader needs, in the order in which it is needed."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from aftershock.replay.edits.data import Row
from aftershock.replay.edits.rows import Guilty
from aftershock.replay.explain import Explanation
from aftershock.replay.table import (
    effect_text,
    excess_text,
    guilty_words,
    left_out_words,
    ordered,
    print_explanation,
    shams_words,
    window_words,
)
from aftershock.replay.verdict import Verdict


def _printed(explanation: Explanation, width: int = 400) -> str:
    out = io.StringIO()
    print_explanation(explanation, console=Console(file=out, width=width))
    return out.getvalue()


def test_the_verdict_comes_first_then_evidence_cells_and_parts(explanation: Explanation) -> None:
    """planted: one wrong row; every part says its own about it, in this order."""
    text = _printed(explanation)
    wanted = [
        explanation.words,
        "The spike begins at step 100",
        "3 of 3 unchanged replays have the recorded losses bit for bit",
        "evidence: + for, - against",
        "removes it, smallest change first",
        "effect [95 %]",
        "Shams: 3 of 3 still spike",
        "not tried: qk-clip",
        "Where it began",
        "Until when it could be averted",
        "What the model predicted meanwhile",
        "Without 1 row the spike does not come",
        "step 100: row 5.",
    ]
    places = [text.index(words) for words in wanted]
    assert places == sorted(places)


def test_every_cell_has_its_line(explanation: Explanation) -> None:
    """contract: those without the spike first, shams last; figures as they were found."""
    names = [one.name for one in ordered(explanation)]
    assert names[0] == "skip"
    assert [name for name in names if name.startswith("sham:")] == names[-3:]
    lines = _printed(explanation).splitlines()
    for one in explanation.cells:
        assert one.response is not None
        # The one in the table of cells: remedy and evidence name it as well, before that.
        line = next(line for line in lines if line.split()[:2] == [one.name, one.family])
        assert excess_text(one.response.peak_excess) in line
        assert effect_text(one.effect) in line


def test_it_fits_a_narrow_terminal(explanation: Explanation) -> None:
    """contract."""
    assert max(map(len, _printed(explanation, width=80).splitlines())) <= 80


def test_without_answers_there_is_no_table_of_them(explanation: Explanation) -> None:
    """contract: a spike that does not come back has controls and words, and nothing else."""
    verdict = Verdict("not_reproducible", (), 1.0, (), (), "Not reproducible: it does not come back.")
    bare = explanation._replace(
        verdict=verdict, cells=(), remedies=(), places=None, no_return=None, thinking=None, guilty=None, left_out={}
    )
    text = _printed(bare)
    assert text.startswith("Not reproducible")
    for words in ("evidence", "effect", "Shams", "Where it began", "Guilty"):
        assert words not in text


def test_shams_are_the_line_to_read_effects_from(explanation: Explanation) -> None:
    """contract: their number and peaks, or that there are none."""
    peaks = [one.response.peak_excess for one in explanation.cells if one.family == "sham" and one.response]
    low, middle, high = sorted(peaks)
    assert shams_words(explanation) == (
        f"Shams: 3 of 3 still spike, with peaks from {low:.2f} to {high:.2f}, median {middle:.2f}."
    )
    cells = tuple(one for one in explanation.cells if one.family != "sham")
    assert "No sham ran" in shams_words(explanation._replace(cells=cells))


def test_the_spike_in_words(explanation: Explanation) -> None:
    """contract: also one that is not finite, and one whose end was not seen."""
    assert "from a calm loss of 0.4144 to 94.31, calm again at step 101" in window_words(explanation)
    recorded = {step: loss for step, loss in explanation.recorded.items() if step < 100} | {100: math.nan}
    words = window_words(explanation._replace(recorded=recorded))
    assert "not calm again on record" in words
    recorded |= {100: math.inf}
    assert "to one that is not finite" in window_words(explanation._replace(recorded=recorded))


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (math.nan, "-"), (math.inf, "not finite"), (-0.004, "-0.00"), (1.256, "1.26")]
)
def test_excesses(value: float | None, text: str) -> None:
    """contract."""
    assert excess_text(value) == text


def test_effects_have_no_negative_zero(explanation: Explanation) -> None:
    """contract."""
    effect = explanation.cells[0].effect
    assert effect is not None
    told = effect_text(effect._replace(log_peak=-0.001, low=-math.inf, high=0.5))
    assert told == "+0.00 [-inf, +0.50]"
    assert effect_text(None) == "-"


def test_rows_are_told_by_batch_and_in_spans() -> None:
    """contract: with the micro-batch where it is not the first, and whether the search ended."""
    rows = (*(Row(7, 0, row) for row in (0, 1, 2, 5)), Row(7, 1, 3), Row(8, 0, 4))
    told = guilty_words(Guilty(rows, 9, smallest=False))
    assert told == (
        "Without 6 rows the spike does not come (perhaps fewer would do: the search was cut short; 9 replays): "
        "step 7: rows 0 to 2, 5; step 7 of micro-batch 1: row 3; step 8: row 4."
    )
    assert guilty_words(None) == ""


def test_reasons_are_told_once(explanation: Explanation) -> None:
    """contract."""
    out = explanation._replace(left_out={"a": "no x", "b": "no y", "c": "no x"})
    assert left_out_words(out) == ["a, c: no x", "b: no y"]
