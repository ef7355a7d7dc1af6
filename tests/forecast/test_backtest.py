"""Forecasts of sizes that were trained: which repeats there are, that no fit sees its target, how they are counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aftershock import cli
from aftershock.forecast.backtest import FAILING, backtest, seed_blocks, tallies
from aftershock.forecast.observations import Observations, judged
from aftershock.forecast.outlook import forecast
from aftershock.lab.sizes import parse_size

Plant = Callable[..., Observations]
SIZES = ("16x2", "32x2", "48x2", "96x2")


@given(st.integers(1, 30), st.integers(1, 10))
def test_blocks_hold_every_seed_once(number: int, size: int) -> None:
    """contract: in order, each of the size asked for but the last, which is smaller only where it is the only one."""
    blocks = seed_blocks(range(number), size)
    assert [seed for block in blocks for seed in block] == list(range(number))
    assert all(len(block) == size for block in blocks[:-1])
    assert size <= len(blocks[-1]) < 2 * size or len(blocks) == 1


def test_every_repeat_is_the_forecast_from_its_own_runs(plant: Plant) -> None:
    """equivalence: sizes up to one, a block of seeds, and the same check as that forecast's own."""
    found = plant(sizes=SIZES, seeds=range(6))
    tested = backtest(found)
    assert [(one.target, one.sizes[-1], one.seeds) for one in tested.repeats] == [
        (target, largest, seeds)
        for target, largest in (("48x2", "32x2"), ("96x2", "32x2"), ("96x2", "48x2"))
        for seeds in ((0, 1, 2), (3, 4, 5))
    ]
    one = tested.repeats[-1]
    seen = found._replace(runs=tuple(run for run in found.runs if run.size != "96x2" and run.seed in one.seeds))
    alone = forecast(seen, parse_size("96x2"), later=found.only("96x2"))
    assert (one.rate, one.check) == (alone.failing.rate, alone.check)
    assert one.times == pytest.approx(4.0)


def test_a_law_that_goes_on_is_foretold_and_one_that_breaks_is_not(plant: Plant) -> None:
    """planted: the largest size fails two decades lower than the others' law has it, and moves no forecast of it."""
    kept = plant(sizes=SIZES, seeds=range(6), sigma=0.05)
    small = tuple(run for run in kept.runs if run.size != "96x2")
    broken = kept._replace(runs=judged(small + plant(sizes=("96x2",), seeds=range(6), sigma=0.05, level=-2.9).runs))
    good, bad = backtest(kept), backtest(broken)
    assert [one.rate for one in good.repeats] == [one.rate for one in bad.repeats]
    assert good.within_a_rung == good.num_rungs > 0
    ours = [one.check for one in bad.repeats if one.target == "96x2" and one.check is not None]
    assert ours
    assert all(check.rungs is not None and check.rungs > 1 for check in ours)
    held = {tally.key: tally.share for tally in good.tallies}
    fell = {tally.key: tally.share for tally in bad.tallies}
    assert held[FAILING] > fell[FAILING]
    assert held["early_logit"] > 0.8 > fell["early_logit"]


def test_tallies_are_sums_over_repeats(plant: Plant) -> None:
    """oracle: counted again from the checks, and the extremes are those of single forecasts."""
    tested = backtest(plant(sizes=SIZES, seeds=range(6)))
    checks = [one.check for one in tested.repeats if one.check is not None]
    for tally in tested.tallies:
        if tally.key == FAILING:
            pairs = [(sum(seed.inside for seed in check.seeds), len(check.seeds)) for check in checks]
        else:
            rows = [row for check in checks for row in check.quantities if row.key == tally.key]
            pairs = [(row.num_inside, row.num_runs) for row in rows]
        assert (tally.held, tally.of) == tuple(map(sum, zip(*pairs, strict=True)))
        assert tally.lowest == min(a / b for a, b in pairs) <= tally.share <= tally.highest
    assert tallies([]) == ()


def test_a_target_too_far_is_a_refused_repeat(plant: Plant) -> None:
    """contract: it is listed with its reason, and counts for nothing."""
    tested = backtest(plant(sizes=("16x2", "24x2", "192x2")))
    (one,) = tested.repeats
    assert "beyond the 2 sizes trained" in one.refused
    assert (one.check, tested.num_rungs, tested.tallies) == (None, 0, ())


def test_the_command_prints_and_writes_the_same(
    write_study: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """equivalence: figures of the JSON are those of the table."""
    folder = str(write_study(sizes=("16x2", "32x2", "48x2"), seeds=(0, 1, 2, 3)))
    assert cli.main(["forecast", folder, "--backtest", "--fit-seeds", "2", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [one["seeds"] for one in record["repeats"]] == [[0, 1], [2, 3]]
    assert cli.main(["forecast", folder, "--backtest", "--fit-seeds", "2"]) == 0
    text = capsys.readouterr().out
    assert f"{record['within_a_rung']} of {record['num_rungs']} failing rates foretold within one rung" in text
    for tally in record["tallies"]:
        assert any(tally["title"] in line and f" {tally['held']:,} " in line for line in text.splitlines())


@pytest.mark.parametrize(
    ("sizes", "flags", "words"),
    [
        (("16x2", "32x2"), [], "has 2 sizes, 16x2, 32x2; a backtest forecasts a size from two smaller ones"),
        (("16x2", "32x2", "48x2"), ["--fit-seeds", "0"], "a forecast takes at least one seed, got 0"),
        (("16x2", "32x2", "48x2"), ["--to", "96x2"], "got --to SIZE and --backtest"),
    ],
)
def test_what_cannot_be_tried_is_refused(
    write_study: Callable[..., Path],
    sizes: tuple[str, ...],
    flags: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """contract: one sentence and status 2."""
    assert cli.main(["forecast", str(write_study(sizes=sizes)), "--backtest", *flags]) == 2
    assert words in capsys.readouterr().err


def test_seeds_of_a_fit_need_a_backtest(capsys: pytest.CaptureFixture[str]) -> None:
    """contract: a flag without its command is named."""
    assert cli.main(["forecast", "nowhere", "--to", "96x2", "--fit-seeds", "2"]) == 2
    assert "--fit-seeds is for --backtest" in capsys.readouterr().err
