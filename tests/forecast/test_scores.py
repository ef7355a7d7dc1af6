"""forecast.scores: what a CSV may hold, how curves are told apart, and what is refused with which sentence."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from aftershock.forecast.scores import ScoreTable, join_tables, read_scores


def table_of(folder: Path, text: str) -> ScoreTable:
    path = folder / "scores.csv"
    path.write_text(text, encoding="utf-8")
    return read_scores(path)


def test_a_curve_ascends_in_compute(tmp_path: Path) -> None:
    """round trip: values, order, and the share of the range."""
    table = table_of(tmp_path, "task,model,flops,score,chance,high\nt,b,1e22,60,25,100\nt,a,1e21,40,25,100\n")
    (curve,) = table.curves
    np.testing.assert_allclose(curve.log_flops_N, [21, 22])
    assert curve.model_N.tolist() == ["a", "b"]
    np.testing.assert_allclose(curve.fraction_N, [0.4, 0.6])
    assert curve.chance_fraction == 0.25
    assert [curve.to_score(y) for y in curve.fraction_N.tolist()] == curve.score_N.tolist()
    assert table.notes == []
    assert curve.where(curve.model_N == "b").score_N.tolist() == [60.0]


def test_compute_is_six_params_tokens(tmp_path: Path) -> None:
    """equivalence: flops given, and params and tokens; a row's own flops win."""
    given = "task,params,tokens,flops,score\nt,1e9,2e10,,0.5\nt,1e9,2e10,1.2e21,0.5\n"
    np.testing.assert_allclose(
        table_of(tmp_path, given).curves[0].log_flops_N, [math.log10(1.2e20), math.log10(1.2e21)]
    )


def test_lower_is_better_turns_round(tmp_path: Path) -> None:
    """contract: high 0 says that 0 is best and 1 worst; a Brier score needs no column for it."""
    stated, known = "task,flops,score,high\nt,1e21,0.7,0\n", "task,metric,flops,score\nt,brier,1e21,0.7\n"
    for text in (stated, known):
        (curve,) = table_of(tmp_path, text).curves
        assert curve.fraction_N[0] == pytest.approx(0.3)  # 1 - 0.7 in binary
        assert curve.to_score(0.3) == pytest.approx(0.7)


def test_sources_and_shots_are_never_mixed(tmp_path: Path) -> None:
    """contract: one curve for each, with a label that tells them apart, and no more words than that takes."""
    rows = "mmlu,acc,ours,5,1e21,.3\nmmlu,acc,theirs,5,1e21,.4\nmmlu,acc,theirs,0,1e21,.2\narc,acc,ours,5,1e21,.3\n"
    table = table_of(tmp_path, "task,metric,source,shots,flops,score\n" + rows)
    assert [curve.label for curve in table.curves] == [
        "mmlu acc ours 5-shot",
        "mmlu acc theirs 5-shot",
        "mmlu acc theirs 0-shot",
        "arc acc",
    ]


def test_groups_are_models_with_checkpoints_else_families(tmp_path: Path) -> None:
    """contract."""
    rows = "t,m1,fam,1e20,.1\nt,m1,fam,2e20,.2\nt,m2,fam,3e20,.2\nt,m3,,4e20,.2\nt,,,5e20,.2\n"
    (curve,) = table_of(tmp_path, "task,model,family,flops,score\n" + rows).curves
    assert curve.group_N.tolist() == ["m1", "m1", "fam", "m3", ""]


def test_the_companion_is_found_in_other_rows_or_its_column(tmp_path: Path) -> None:
    """contract: a smooth metric of the same task, source and shots; unbounded ones are no curves themselves."""
    rows = "t,acc,a,1e20,.1\nt,acc,b,1e21,.5\nt,perplexity,b,1e21,7\nt,brier,a,1e20,.9\nu,acc,a,1e20,.1\n"
    table = table_of(tmp_path, "task,metric,model,flops,score\n" + rows)
    assert [curve.label for curve in table.curves] == ["t acc", "t brier", "u acc"]
    accuracy, brier, other = table.curves
    assert (accuracy.companion, accuracy.smooth, brier.companion, brier.smooth) == ("brier", False, "", True)
    np.testing.assert_array_equal(accuracy.companion_N, [0.9, np.nan])
    assert np.isnan(other.companion_N).all()
    (column,) = table_of(tmp_path, "task,flops,score,companion\nt,1e20,.1,.7\nt,1e21,.5,\n").curves
    assert column.companion == "companion"
    np.testing.assert_array_equal(column.companion_N, [0.7, np.nan])


def test_rows_without_compute_are_left_out_and_counted(tmp_path: Path) -> None:
    """contract: unknown and untrained models, each with a sentence."""
    table = table_of(tmp_path, "task,model,flops,score\nt,a,,.1\nt,b,0,.1\nt,c,1e21,.1\nt,d,,.1\n")
    assert table.curves[0].model_N.tolist() == ["c"]
    assert table.notes == [
        "2 rows have no known compute and are left out; fill in flops, or both params and tokens, to use them",
        "1 rows have compute 0 (untrained models) and are left out",
    ]
    both = join_tables(table, table)
    assert (len(both.curves), len(both.notes)) == (2, 4)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no rows; give a header line"),
        ("task,score,flops\n", "no row has a score and a known compute; add rows"),
        ("task,score,flops\nt,.1,\n", "1 rows have no known compute and are left out; fill in flops"),
        ("task,flops\nt,1e20\n", "missing column score"),
        ("task,score,params\nt,.1,1e9\n", "missing column flops \\(or both params and tokens\\)"),
        ("task,score,flop\nt,.1,1e9\n", "unknown column 'flop'; did you mean 'flops'\\?; rename or remove it"),
        ("task,score,flops,compute\nt,.1,1,1\n", "two columns hold flops; keep one"),
        ("task,score,flops\nt,.1\n", "line 2: has 2 cells, the header 3"),
        ("task,score,flops\nt,good,1e20\n", "line 2: score 'good' is not a number"),
        ("task,score,flops\nt,,1e20\n", "line 2: a score must be a finite number, got ''; leave the line out"),
        ("task,score,flops\n,.1,1e20\n", "line 2: the task is empty"),
        ("task,score,flops\nt,.1,-1\n", "line 2: compute must be a positive number"),
        ("task,score,flops\nt,63.2,1e20\n", "line 2: score 63.2 lies outside 0 to 1; add a column high"),
        ("task,score,flops,chance\nt,.1,1e20,25\n", "chance 25 lies outside 0 to 1; give it in the score's unit"),
        ("task,score,flops,chance\nt,.1,1e20,.2\nt,.1,1e21,.3\n", "chance 0.3 differs from 0.2 elsewhere in the same"),
        ("task,metric,score,flops\nt,loss,2,1e20\n", "holds only loss, nll, perplexity, which have no range"),
        ('task,score,flops\nt,".1,1e20\n', "not readable as CSV"),
    ],
)
def test_bad_input_is_refused(tmp_path: Path, text: str, said: str) -> None:
    """contract: a sentence that names the place and says what to add."""
    with pytest.raises(ValueError, match=said):
        table_of(tmp_path, text)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    """contract."""
    with pytest.raises(ValueError, match="no such file; give a CSV file with the columns task, score and flops"):
        read_scores(tmp_path / "nowhere.csv")
