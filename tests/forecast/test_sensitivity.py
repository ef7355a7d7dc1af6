"""LR sensitivity: a public table, the definition's properties, seeds and their interval, and bad CSV files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aftershock.forecast.sensitivity import (
    LossRow,
    bootstrap_sensitivity,
    failing_lr,
    lr_sensitivity,
    read_losses_csv,
    run_fails,
    sensitivity_table,
)

LRS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
L0 = 10.84
# Final test loss per rate, sensitivity over 7, and as published (over 6): flxst/output-embedding-centering, 25c6fb9.
PUBLISHED = [
    ("16M none", (3.961, 3.881, 3.850, 3.841, 3.857, 4.269, 5.065), 0.262, 0.306),
    ("16M z-loss", (3.961, 3.878, 3.848, 3.836, 3.841, 3.854, 3.955), 0.046, 0.054),
    ("29M none", (3.688, 3.614, 3.591, 3.592, 3.596, 4.298, 5.107), 0.336, 0.391),
    ("29M z-loss", (3.687, 3.613, 3.585, 3.586, 3.580, 3.599, 3.606), 0.028, 0.033),
    ("109M none", (3.261, 3.211, 3.202, 3.208, 3.230, 3.344, 5.023), 0.295, 0.344),
    ("109M z-loss", (3.261, 3.211, 3.202, 3.204, 3.230, 3.279, 3.735), 0.101, 0.118),
]
BEST_LR = {"16M none": 1e-2, "16M z-loss": 1e-2, "29M none": 3e-3, "29M z-loss": 3e-2, "109M none": 3e-3}

LOSS = st.floats(0, 10) | st.sampled_from([None, math.nan, math.inf, -math.inf, 1e9])
CURVE = st.lists(LOSS, max_size=8).flatmap(lambda rest: st.permutations([3.0, *rest]))


def slow_sensitivity(losses: list[float | None], l0: float) -> float:
    """The definition, one rate at a time."""
    best, total = l0, 0.0
    for loss in losses:
        if loss is not None and math.isfinite(loss) and loss < best:
            best = loss
    for loss in losses:
        if loss is None or math.isnan(loss) or math.isinf(loss) or loss > l0:
            total += l0 - best
        else:
            total += loss - best
    return total / len(losses)


# ------------------------------------------------------------------------------------------------------ the metric


@pytest.mark.parametrize(("group", "losses", "over_7", "over_6"), PUBLISHED)
def test_oracle_published_table(group: str, losses: tuple[float, ...], over_7: float, over_6: float) -> None:
    """Tolerance: the table prints three decimals. Dividing by 6, as its authors do, is off by 5e-3 or more."""
    assert lr_sensitivity(losses, L0) == pytest.approx(over_7, abs=1e-3)
    assert lr_sensitivity(losses, L0) * 7 / 6 == pytest.approx(over_6, abs=1e-3)


def test_oracle_published_table_by_group() -> None:
    rows = [LossRow(group, lr, loss) for group, losses, _, _ in PUBLISHED for lr, loss in zip(LRS, losses, strict=True)]
    table = sensitivity_table(rows, L0)
    assert [entry.group for entry in table] == [group for group, *_ in PUBLISHED]
    for entry, (_, losses, over_7, _) in zip(table, PUBLISHED, strict=True):
        assert entry.lr_sensitivity == pytest.approx(over_7, abs=1e-3)
        assert entry.best_loss == min(losses)
        assert entry.best_lr == BEST_LR.get(entry.group, 3e-3)
    assert json.loads(json.dumps(table[0]._asdict())).keys() == {"group", "lr_sensitivity", "best_lr", "best_loss"}


@given(CURVE, st.floats(3, 20))
def test_oracle_slow_definition(losses: list[float | None], l0: float) -> None:
    """Tolerance: rounding of a sum of up to 9 terms of at most 20."""
    fast = lr_sensitivity(losses, l0)
    assert fast == pytest.approx(slow_sensitivity(losses, l0), abs=1e-12)
    best = min(loss for loss in losses if loss is not None and math.isfinite(loss))
    assert 0 <= fast <= l0 - best


@given(st.floats(0, 10), st.integers(1, 9))
def test_constant_curve_is_zero(loss: float, num_rates: int) -> None:
    assert lr_sensitivity([loss] * num_rates, 10.0) == 0


@pytest.mark.parametrize("diverged", [None, math.nan, math.inf, -math.inf, 50.0, 10.0])
def test_diverged_counts_as_l0(diverged: float | None) -> None:
    assert lr_sensitivity([4.0, diverged], 10.0) == 3.0


@pytest.mark.parametrize(
    ("losses", "l0", "words"),
    [
        ([], 1.0, "the curve has no losses"),
        ([None, math.nan, math.inf], 1.0, "every run of the curve diverged, so it has no best loss"),
        ([3.0], math.nan, "l0, the loss at initialisation, must be a finite number, got nan"),
        ([3.0, 4.0, None], 2.0, r"every loss of the curve lies above l0=2 \(the lowest is 3\)"),
    ],
)
def test_planted_bad_curve(losses: list[float | None], l0: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        lr_sensitivity(losses, l0)


# ------------------------------------------------------------------------------------------------------- the table


def test_seeds_are_capped_then_averaged() -> None:
    """One of two seeds diverged at 0.1: (5 + 10) / 2 = 7.5; capping after averaging would give 10."""
    rows = [LossRow("a", 0.1, 5.0), LossRow("a", 0.01, 4.0), LossRow("a", 0.1, 1e6), LossRow("a", 0.01, 3.0)]
    (entry,) = sensitivity_table(rows, 10.0)
    assert entry == ("a", (7.5 - 3.5) / 2, 0.01, 3.5)


@given(st.permutations([("a", 0.1, 5.0), ("a", 0.01, 4.0), ("b", 0.01, 2.0), ("b", 0.1, None)]))
def test_equivalence_under_the_order_of_rows(rows: list[tuple[str, float, float | None]]) -> None:
    table = sensitivity_table([LossRow(*row) for row in rows], 10.0)
    assert sorted(table) == [("a", 0.5, 0.01, 4.0), ("b", 4.0, 0.01, 2.0)]
    assert table[0].group == rows[0][0]


def test_a_tie_goes_to_the_lowest_rate() -> None:
    (entry,) = sensitivity_table([LossRow("a", 0.1, 4.0), LossRow("a", 0.01, 4.0)], 10.0)
    assert entry.best_lr == 0.01


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "there are no losses; give at least one row"),
        ([LossRow("a", 0.1, None)], "every run of group 'a' diverged"),
        ([LossRow("a", 0.1, 30.0)], "every loss of group 'a' lies above l0=10"),
        ([LossRow("a", 0.0, 3.0)], "group 'a': a learning rate must be a positive number, got 0"),
        ([LossRow("a", math.nan, 3.0)], "must be a positive number, got nan"),
        (
            [LossRow("a", 0.1, 3.0), LossRow("b", 0.1, 3.0), LossRow("b", 0.3, 3.0), LossRow("a", 3e-5, 1.0)],
            r"groups 'a' and 'b' have different learning rates \(only 'a': 3e-05; only 'b': 0.3\)",
        ),
        (
            [LossRow("a", 0.1, 3.0), LossRow("b", 0.1, 3.0), LossRow("b", 0.3, 3.0)],
            r"\(only 'a': none; only 'b': 0.3\)",
        ),
    ],
)
def test_planted_bad_rows(rows: list[LossRow], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sensitivity_table(rows, 10.0)


# ------------------------------------------------------------------------------------------------------ the interval


def noisy_rows(spread: float, num_seeds: int = 3) -> list[LossRow]:
    noise = np.random.default_rng(0).normal(size=(2, len(LRS), num_seeds)) * spread
    return [
        LossRow(group, lr, base + float(noise[g, r, s]))
        for g, group in enumerate(("flat", "steep"))
        for r, (lr, base) in enumerate(zip(LRS, PUBLISHED[1 - g][1], strict=True))
        for s in range(num_seeds)
    ]


def test_interval_holds_the_estimate_and_grows_with_the_spread() -> None:
    narrow, wide = (bootstrap_sensitivity(noisy_rows(spread), L0) for spread in (0.01, 0.1))
    for entry in (*narrow, *wide):
        assert entry.low <= entry.lr_sensitivity <= entry.high
    for small, large in zip(narrow, wide, strict=True):
        assert large.high - large.low > 3 * (small.high - small.low)
    assert narrow[0].high < narrow[1].low
    assert [entry[:2] for entry in narrow] == [entry[:2] for entry in sensitivity_table(noisy_rows(0.01), L0)]


def test_interval_is_deterministic_and_blind_to_other_groups() -> None:
    both = bootstrap_sensitivity(noisy_rows(0.1), L0)
    alone = bootstrap_sensitivity([row for row in noisy_rows(0.1) if row.group == "steep"], L0)
    assert both[1:] == alone
    assert both != bootstrap_sensitivity(noisy_rows(0.1), L0, seed=1)


def test_interval_without_spread_is_a_point() -> None:
    (entry,) = bootstrap_sensitivity([LossRow("a", lr, loss) for lr, loss in ((0.1, 6.0), (0.01, 4.0))] * 2, 10.0)
    assert (entry.low, entry.high) == (1.0, 1.0)


def test_interval_leaves_out_resamples_in_which_nothing_trained() -> None:
    """Half of them here; counted as 0 they would pull the low end there. Trained ones give (10 - x) / 2 only."""
    rows = [LossRow("a", lr, loss) for lr, loss in ((0.01, 4.0), (0.01, None), (0.1, None), (0.1, None))]
    (entry,) = bootstrap_sensitivity(rows, 10.0)
    assert (entry.low, entry.high) == (1.5, 3.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"level": 95.0}, "level must lie between 0 and 1, got 95"),
        ({"num_resamples": 0}, "num_resamples must be at least 1, got 0"),
    ],
)
def test_planted_bad_interval_settings(changes: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        bootstrap_sensitivity(noisy_rows(0.1), L0, **changes)  # pyright: ignore[reportArgumentType]


def test_planted_single_seed_has_no_interval() -> None:
    with pytest.raises(ValueError, match=r"group 'a' has one run at learning rate 0.1; .* two seeds"):
        bootstrap_sensitivity([LossRow("a", 0.1, 3.0)], L0)


# ----------------------------------------------------------------------------------------------------------- CSV


def write(folder: Path, text: str) -> Path:
    path = folder / "losses.csv"
    path.write_bytes(text.encode())
    return path


@given(
    rows=st.lists(
        st.tuples(
            st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1),
            st.floats(1e-9, 1e3),
            st.floats(allow_nan=False, allow_infinity=False) | st.none(),
        ),
        min_size=1,
        max_size=6,
    ),
    order=st.permutations(["group", "lr", "loss"]),
)
def test_round_trip_of_rows(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, float, float | None]], order: list[str]
) -> None:
    lines = [",".join(order)]
    for group, lr, loss in rows:
        quoted = '"' + group.replace('"', '""') + '"'
        cells = {"group": quoted, "lr": repr(lr), "loss": "" if loss is None else repr(loss)}
        lines.append(",".join(cells[name] for name in order))
    read = read_losses_csv(write(tmp_path_factory.mktemp("csv"), "\n".join(lines)))
    assert [row[:2] for row in read] == [row[:2] for row in rows]
    for row, (_, _, loss) in zip(read, rows, strict=True):
        assert row.loss is not None
        assert math.isnan(row.loss) if loss is None else row.loss == loss


def test_csv_as_people_write_it(tmp_path: Path) -> None:
    """Byte order mark, capitals, spaces, empty lines, CRLF, and every spelling of a diverged run."""
    text = "\ufeffLoss, Group ,LR\r\n\r\n3.5, a, 1e-3\r\n,a,0.01\r\nnan,a,0.1\r\n NaN ,a,.3\r\n-inf,a,1\r\n\r\n"
    rows = read_losses_csv(write(tmp_path, text))
    assert rows[0] == ("a", 1e-3, 3.5)
    assert [row.lr for row in rows] == [1e-3, 0.01, 0.1, 0.3, 1.0]
    assert all(row.loss is not None and math.isnan(row.loss) for row in rows[1:])
    assert sensitivity_table(rows, 10.0)[0].lr_sensitivity == pytest.approx(6.5 * 4 / 5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no rows; give a header line group,lr,loss"),
        ("group,lr,loss\n", "holds no rows"),
        ("group,lr,los\na,1,2\n", "unknown column 'los'; did you mean 'loss'?"),
        ("group,lr,loss,step\na,1,2,3\n", "unknown column 'step'"),
        ("group,lr\na,1\n", "missing column loss; the header must name"),
        ("group,lr,lr,loss\na,1,1,2\n", "column 'lr' is given twice"),
        ("group,lr,loss\na,1,2\na,x,2\n", "line 3: lr 'x' is not a number"),
        ("group,lr,loss\n\na,1,oops\n", "line 3: loss 'oops' is not a number"),
        ("group,lr,loss\na,,2\n", "line 2: lr '' is not a number"),
        ("group,lr,loss\na,-1,2\n", "line 2: lr must be a positive number, got -1"),
        ("group,lr,loss\na,nan,2\n", "line 2: lr must be a positive number, got nan"),
        ("group,lr,loss\na,1\n", "line 2: has 2 cells, the header 3"),
        ("group,lr,loss\na,1,2,3\n", "line 2: has 4 cells, the header 3"),
        ("group,lr,loss\n,1,2\n", "line 2: the group is empty"),
        ("group,lr,loss\n,,\n", "line 2: the group is empty"),
        ('group,lr,loss\n"a,1,2\n', "line 2: not readable as CSV"),
    ],
)
def test_planted_bad_csv(tmp_path: Path, text: str, words: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=words.replace("?", r"\?")) as caught:
        read_losses_csv(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_planted_unreadable_csv(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none.csv: no such file; give a CSV file"):
        read_losses_csv(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="not readable as a CSV text file"):
        read_losses_csv(tmp_path)
    (tmp_path / "latin.csv").write_bytes(b"group,lr,loss\ncaf\xe9,1,2\n")
    with pytest.raises(ValueError, match=r"latin.csv: not readable as a CSV text file"):
        read_losses_csv(tmp_path / "latin.csv")


# ------------------------------------------------------------------------------------------------- where training fails

STABLE = (3.389, 2.718, 2.467, 2.293, 2.322, 2.454, 2.535)
BREAKING = (3.386, 2.722, 2.467, 2.285, 2.383, 2.753, 2.951)


def test_planted_failing_rate_is_found() -> None:
    """planted: the gain is 4.1, so a loss of 2.70 or more fails; low rates lose more than that and do not count."""
    assert failing_lr(LRS, STABLE, 6.4) is None
    assert failing_lr(LRS, BREAKING, 6.4) == 1e-1
    assert failing_lr(LRS[::-1], BREAKING[::-1], 6.4) == 1e-1
    assert failing_lr(LRS, [*BREAKING[:4], None, 2.3, math.inf], 6.4) == 3e-2


def test_planted_run_fails_beyond_a_tenth_of_the_gain() -> None:
    assert not run_fails(2.4, best=2.0, l0=6.1)
    assert run_fails(2.5, best=2.0, l0=6.1)
    assert all(run_fails(loss, best=2.0, l0=6.1) for loss in (None, math.nan, math.inf, 6.2))


@pytest.mark.parametrize(
    ("lrs", "losses", "l0", "words"),
    [
        ((0.1,), (2.0, 3.0), 6.0, "1 rates and 2 losses"),
        ((0.1, 0.1), (2.0, 3.0), 6.0, "distinct"),
        ((0.1, -0.1), (2.0, 3.0), 6.0, "positive"),
        ((0.1, 0.3), (None, math.nan), 6.0, "every run"),
        ((), (), 6.0, "no losses"),
        ((0.1, 0.3), (2.0, 3.0), math.nan, "l0"),
    ],
)
def test_failing_lr_refuses(lrs: tuple[float, ...], losses: tuple[float | None, ...], l0: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        failing_lr(lrs, losses, l0)
