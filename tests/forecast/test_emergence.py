"""forecast.emergence and its command: nothing above the cut-off is looked at, planted curves, coverage, bad input."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from aftershock.forecast.command import Fit, fits_table, summary
from aftershock.forecast.curves import sigmoid
from aftershock.forecast.emergence import LEVEL, MEMBERS, ScoreFits, fit_scores
from aftershock.forecast.scores import ScoreTable, read_scores

CHECKOUT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("AFTERSHOCK_SCORES", CHECKOUT.parent / "shared" / "data"))
CUTOFF = 1e22
FEW = 30
"""Resamples: enough to see that intervals and forecasts are right, not for the last digit."""


def planted_rows(
    task: str, *, seed: int, midpoint: float = 22.0, slope: float = 1.5, chance: float = 0.25, ceiling: float = 1.0
) -> list[str]:
    """Runs of eight families of five sizes, noise 0.02, and a shift of 0.04 that a family's members share."""
    rng = np.random.default_rng(seed)
    rows = []
    for family in range(8):
        shift = 0.04 * rng.normal()
        for size, x in enumerate(np.sort(rng.uniform(20, 23.5, size=5))):
            level = chance + (ceiling - chance) * sigmoid(slope * (x - midpoint))
            score = level + shift + 0.02 * rng.normal()
            rows.append(f"{task},f{family}-{size},f{family},{10**x:.6g},{np.clip(score, 0, 1):.5f},{chance}")
    return rows


def planted_table(folder: Path, rows: list[str], *, header: str = "task,model,family,flops,score,chance") -> ScoreTable:
    path = folder / "scores.csv"
    path.write_text("\n".join([header, *rows, ""]), encoding="utf-8")
    return read_scores(path)


def many_tasks(folder: Path) -> ScoreTable:
    rng = np.random.default_rng(7)
    rows = []
    for task in range(10):
        shape = {"midpoint": rng.uniform(20.5, 23.5), "slope": math.exp(rng.normal(0.3, 0.3))}
        rows += planted_rows(
            f"t{task}", seed=task, chance=float(rng.choice([0, 0.25])), ceiling=rng.uniform(0.6, 1), **shape
        )
    return planted_table(folder, rows)


def test_intervals_cover_and_forecasts_beat_line_and_sigmoid(tmp_path: Path) -> None:
    """planted: ten sigmoids of unknown ceilings, with families. Coverage of all held-out scores, and mean errors."""
    fits = fit_scores(many_tasks(tmp_path), cutoff=CUTOFF, num_resamples=FEW).fits
    runs = sum(fit.num_held_out for fit in fits)
    covered = sum(fit.covered * fit.num_held_out for fit in fits) / runs
    assert runs > 100
    # 0.9 is meant. A task's errors go together, so ten tasks leave it uncertain by about 0.05; the interval is
    # never narrower than a normal's, which makes it err upwards.
    assert 0.8 <= covered <= 0.99
    mean = {name: np.mean([fit.error[name] for fit in fits]) for name in ("line", "sigmoid", "forecast")}
    assert mean["forecast"] < min(mean["line"], mean["sigmoid"])


def test_scores_above_the_cutoff_are_not_looked_at(tmp_path: Path) -> None:
    """property: turned upside down, they change the errors and nothing that was foretold."""
    table = planted_table(tmp_path, planted_rows("t", seed=1))
    (curve,) = table.curves
    above_N = curve.log_flops_N > math.log10(CUTOFF)
    turned = dataclasses.replace(curve, score_N=np.where(above_N, 1 - curve.score_N, curve.score_N))
    ((first,), *_), ((second,), *_) = (
        fit_scores(ScoreTable([one], []), cutoff=CUTOFF, num_resamples=FEW) for one in (curve, turned)
    )
    assert first.error["forecast"] != second.error["forecast"]
    for name in ("weight", "best", "forecast", "low", "high"):
        assert getattr(first, name) == getattr(second, name)


def test_the_same_again_and_a_curve_alone(tmp_path: Path) -> None:
    """property: deterministic; a curve's forecast does not know the other curves, only its interval does."""
    table = planted_table(tmp_path, planted_rows("t", seed=1) + planted_rows("u", seed=2, midpoint=23))
    both, again = (fit_scores(table, cutoff=CUTOFF, num_resamples=FEW) for _ in range(2))
    assert str(both) == str(again)  # nan is nan
    (alone,) = fit_scores(table, cutoff=CUTOFF, num_resamples=FEW, tasks=["u"]).fits
    assert alone.forecast == both.fits[1].forecast
    assert alone.weight == both.fits[1].weight


def test_a_family_carries_its_shift_upwards(tmp_path: Path) -> None:
    """planted: one family 0.15 above the others. Its largest member is foretold nearer than a nameless one."""
    rows = planted_rows("t", seed=3)
    good = [f"t,good-{i},good,{10**x:.6g},{0.25 + 0.75 * sigmoid(1.5 * (x - 22)) + 0.15:.5f},0.25"
            for i, x in enumerate((20.5, 21.0, 21.5, 22.4))]  # fmt: skip
    named = planted_table(tmp_path, rows + good)
    nameless = planted_table(tmp_path, rows + [row.replace(",good,", ",,") for row in good])
    truth = 0.25 + 0.75 * float(sigmoid(1.5 * 0.4)) + 0.15
    missed = []
    for table in (named, nameless):
        (curve,) = table.curves
        curve = curve.where(curve.log_flops_N <= 22.4 + 1e-6)
        (fit,) = fit_scores(ScoreTable([curve], []), cutoff=10**22.3, num_resamples=FEW).fits
        missed.append(abs(fit.forecast - truth))
    assert missed[0] < missed[1] - 0.05


def test_a_jump_with_a_smooth_companion_is_said(tmp_path: Path) -> None:
    """planted: accuracy p^12 beside p; the sentence says it, and a curve that rises all along gets none."""
    x_N = np.linspace(19, 23, 50)
    p_N = sigmoid(1.2 * (x_N - 20.0))
    rows = [f"jump,m{i},{10**x:.6g},{p**12:.6f},{p:.6f}" for i, (x, p) in enumerate(zip(x_N, p_N, strict=True))]
    rows += [f"rise,m{i},{10**x:.6g},{p:.6f}," for i, (x, p) in enumerate(zip(x_N, p_N, strict=True))]
    table = planted_table(tmp_path, rows, header="task,model,flops,score,companion")
    jump, rise = fit_scores(table, cutoff=CUTOFF, num_resamples=FEW).fits
    assert "this jump may be in the metric only" in jump.sentence
    assert rise.jump is None
    assert rise.sentence == ""


def test_scores_come_back_in_their_own_unit(tmp_path: Path) -> None:
    """equivalence: percent, and a score where lower is better, give the same fit in another unit."""
    rows = planted_rows("t", seed=4)
    (plain,) = fit_scores(planted_table(tmp_path, rows), cutoff=CUTOFF, num_resamples=FEW).fits

    def changed(change: str, high: str) -> ScoreFits:
        cells = [row.split(",") for row in rows]
        new = [
            [*c[:4], *(str(100 * float(v) if change == "x100" else 1 - float(v)) for v in c[4:]), high] for c in cells
        ]
        header = "task,model,family,flops,score,chance,high"
        table = planted_table(tmp_path, [",".join(c) for c in new], header=header)
        return fit_scores(table, cutoff=CUTOFF, num_resamples=FEW)

    ((percent,), *_), ((lower,), *_) = changed("x100", "100"), changed("1-", "0")
    # Decimal digits of the file; the grid's choice does not hang on the last bits here.
    assert percent.forecast == pytest.approx(100 * plain.forecast, rel=1e-6)
    assert percent.error["line"] == pytest.approx(100 * plain.error["line"], rel=1e-6)
    assert (1 - lower.high, 1 - lower.low) == pytest.approx((plain.low, plain.high), rel=1e-6)


def test_at_a_compute_that_no_run_has(tmp_path: Path) -> None:
    """contract: further out the interval is wider, and there is no score to compare with."""
    table = planted_table(tmp_path, planted_rows("t", seed=5, midpoint=23.5, slope=1.0))
    near, far = (fit_scores(table, cutoff=1e25, at=at, num_resamples=FEW).fits[0] for at in (5e23, 5e24))
    assert far.high - far.low > near.high - near.low
    assert math.isnan(far.actual)
    assert math.isnan(far.error["forecast"])
    assert far.num_held_out == 0
    assert (near.flops, far.flops) == (5e23, 5e24)


def test_without_a_cutoff_four_fifths_lie_below(tmp_path: Path) -> None:
    """contract."""
    (fit,) = fit_scores(planted_table(tmp_path, planted_rows("t", seed=6)), num_resamples=FEW).fits
    assert (fit.num_runs, fit.num_held_out) == (32, 8)


def test_a_curve_that_cannot_be_fitted_does_not_stop_the_others(tmp_path: Path) -> None:
    """contract: too few runs, and one size only, each with a sentence that says what to add."""
    few = [f"few,m{i},,{i + 1}e20,.3,.25" for i in range(4)]
    one = [f"one,m{i},,1e21,.3,.25" for i in range(9)]
    fits = fit_scores(planted_table(tmp_path, planted_rows("t", seed=8) + few + one), cutoff=CUTOFF, num_resamples=FEW)
    assert [fit.label for fit in fits.fits] == ["t"]
    assert fits.refused == [
        "few: 4 runs up to the cut-off 1e+22, a fit needs 8; add runs of smaller models, or raise the cut-off",
        "one: only 1 different values of compute up to the cut-off 1e+22, a fit needs 3; add models of other sizes",
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cutoff": -1.0}, "cutoff must be a positive number of FLOPs, got -1.0"),
        ({"at": math.inf}, "at must be a positive number of FLOPs, got inf"),
        ({"tasks": ["u"]}, "no task 'u'; the file has t"),
        ({"cutoff": 1e25}, "no run has more compute than the cut-off 1e\\+25; lower it, or say at which"),
        ({"cutoff": 1e19}, "no curve can be fitted: t: 0 runs up to the cut-off 1e\\+19, a fit needs 8; add runs"),
    ],
)
def test_bad_input_is_refused(tmp_path: Path, options: dict[str, object], said: str) -> None:
    """contract."""
    with pytest.raises(ValueError, match=said):
        fit_scores(planted_table(tmp_path, planted_rows("t", seed=9)), **options)  # type: ignore[arg-type]


def test_the_command_prints_a_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """contract: both say the same, JSON without nan, and rows that were left out are told of."""
    planted_table(tmp_path, planted_rows("t", seed=1) + ["t,new,,,.5,.25"])
    path = tmp_path / "scores.csv"
    assert Fit(file=path, cutoff=CUTOFF, json=True).run() == 0
    told = json.loads(capsys.readouterr().out)
    (fit,) = told["fits"]
    assert told["cutoff"] == CUTOFF
    assert fit["error"]["mixture"] is None  # one curve is no mixture
    assert set(fit["weight"]) == set(MEMBERS)
    assert fit["low"] < fit["forecast"] < fit["high"]
    assert Fit(file=path, cutoff=CUTOFF, task=("t",)).run() == 0
    out = capsys.readouterr().out
    for word in ("adj. logit", f"{fit['error']['forecast']:.3f}", f"{fit['low']:.3f} to {fit['high']:.3f}"):
        assert word in out
    assert "1 rows have no known compute and are left out" in out
    table = read_scores(path)
    fits = fit_scores(table, cutoff=CUTOFF)
    assert fits_table(fits).row_count == 1
    assert f"{LEVEL:.0%}".replace("%", " %") in summary(fits)


@pytest.mark.skipif(not FOLDER.is_dir(), reason="no public scores: set AFTERSHOCK_SCORES to the folder of the files")
def test_public_scores_are_foretold_better_than_by_line_or_sigmoid() -> None:
    """contract: on real models, fitted up to 8.4e22 FLOPs and scored above, in the mean over multiple-choice tasks."""
    table = read_scores(FOLDER / "bigbench_scores.csv")
    chosen = [c for c in table.curves if c.metric == "multiple_choice_acc" and c.source == "ExpEmergence"]
    fits = fit_scores(ScoreTable(chosen, table.notes), cutoff=8.4e22, num_resamples=FEW).fits
    mean = {name: np.mean([fit.error[name] for fit in fits]) for name in ("line", "sigmoid", "forecast")}
    assert mean["forecast"] < min(mean["line"], mean["sigmoid"])
