"""Plans: what information a curve carries, that the choice is the best there is, and what is refused."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest

from aftershock.forecast.observations import Observations
from aftershock.forecast.plan import (
    Candidate,
    bracket_information,
    choose,
    interval_width,
    make_plan,
    parse_budget,
    seconds_by_size,
)
from aftershock.lab.sizes import Size, parse_size

Plant = Callable[..., Observations]


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("1.5h", 5400), ("1d", 86400)])
def test_budgets(text: str, seconds: float) -> None:
    """contract."""
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["2", "h", "0h", "-1h", "2 weeks", ""])
def test_no_budget(text: str) -> None:
    """contract."""
    with pytest.raises(ValueError, match="a number and a unit, such as 90s, 30m or 2h"):
        parse_budget(text)


@pytest.mark.parametrize("step", [0.1, 0.5, 1.0])
def test_information_is_the_curvature_of_the_likelihood(step: float) -> None:
    """oracle: minus the second difference of the expected log mass, by a sum over brackets and positions."""
    sigma, h = 0.2, 1e-3
    rungs = np.arange(-40, 41) * step
    values = []
    for offset in np.linspace(0, step, 40, endpoint=False):

        def mass(mean: float) -> np.ndarray:
            ends = np.array([0.5 * (1 + math.erf((rung - mean) / sigma / math.sqrt(2))) for rung in rungs])
            return np.maximum(np.diff(ends), 1e-300)

        p = mass(float(offset))
        score = (np.log(mass(float(offset) + h)) - np.log(mass(float(offset) - h))) / (2 * h)
        values.append(float((p * score**2).sum()))
    # eight positions stand for the average there; with rungs five sigma apart it is uneven
    assert bracket_information(sigma, step) == pytest.approx(float(np.mean(values)), rel=0.05)


def test_finer_rungs_tell_more_and_never_more_than_the_value_itself() -> None:
    """property."""
    values = [bracket_information(0.2, step) for step in (0.01, 0.25, 0.5, 1.0)]
    assert values == sorted(values, reverse=True)
    assert values[0] <= 1 / 0.2**2 * (1 + 1e-9)


def candidates() -> list[Candidate]:
    sizes = [(-0.5, 1.0), (0.0, 4.0), (0.4, 10.0)]
    return [
        Candidate(Size(16, 2, 1), np.array([1.0, n, n**2]), (0.1,), seconds, information=5.0) for n, seconds in sizes
    ]


def test_the_first_choice_is_the_best_gain_per_second() -> None:
    """oracle: every single purchase tried."""
    known, target = np.diag([1.0, 4.0, 20.0]), np.array([1.0, 1.2, 1.44])
    options = candidates()
    width = interval_width(known, target, 0.2)
    gains = [
        (width - interval_width(known + 5.0 * np.outer(each.x_C, each.x_C), target, 0.2)) / each.seconds
        for each in options
    ]
    bought, _, _ = choose(options, known, target, 0.2, budget_s=10.0)
    assert bought[0] == int(np.argmax(gains))


def test_greedy_is_nearly_the_best_set() -> None:
    """oracle: all sets within the budget tried; greedy gains at least 90 % of what the best set gains."""
    known, target, budget = np.diag([1.0, 4.0, 20.0]), np.array([1.0, 1.2, 1.44]), 30.0
    options = candidates()
    start = interval_width(known, target, 0.2)
    best = start
    for counts in itertools.product(range(31), range(8), range(4)):
        if sum(n * each.seconds for n, each in zip(counts, options, strict=True)) <= budget:
            total = known + sum(5.0 * n * np.outer(e.x_C, e.x_C) for n, e in zip(counts, options, strict=True))
            best = min(best, interval_width(np.asarray(total), target, 0.2))
    bought, spent, information = choose(options, known, target, 0.2, budget_s=budget)
    assert spent <= budget
    assert spent == pytest.approx(sum(options[i].seconds for i in bought))
    assert start - interval_width(information, target, 0.2) >= 0.9 * (start - best)


def test_costs_come_from_the_runs(plant: Plant) -> None:
    """planted: a tenth of a millisecond a parameter, no fixed cost."""
    offset, factor, exponent = seconds_by_size(plant())
    assert offset + factor * 1e5**exponent == pytest.approx(10.0, rel=1e-3)


def test_a_plan_keeps_its_budget_and_narrows(plant: Plant) -> None:
    """contract: sizes between the smallest trained and the target, ladders around where they should fail."""
    found = plant()
    plan = make_plan(found, parse_size("96x2"), budget_s=600.0)
    assert 0 < plan.seconds <= 600.0
    assert plan.width_now > plan.width_then > plan.floor
    assert plan.purchases
    for purchase in plan.purchases:
        size = parse_size(purchase.size)
        assert 6144 <= size.num_block_params < parse_size("96x2").num_block_params
        assert size.width % 16 == 0
        failing = 10 ** (-0.9 - 0.3 * (math.log10(size.num_block_params) - 4.3))
        assert min(purchase.lrs) < failing < max(purchase.lrs)
    assert sum(purchase.seconds for purchase in plan.purchases) == pytest.approx(plan.seconds)
    less = make_plan(found, parse_size("96x2"), budget_s=60.0)
    assert less.width_then > plan.width_then


def test_what_is_bought_does_narrow_the_forecast(plant: Plant) -> None:
    """planted: the runs of a plan, added, leave an interval about as wide as the plan expects."""
    found = plant()
    plan = make_plan(found, parse_size("96x2"), budget_s=1500.0)
    bought = found
    for number, purchase in enumerate(plan.purchases, start=1):
        seeds = tuple(range(100, 100 + purchase.num_seeds))
        more = plant(sizes=(purchase.size,), rates=purchase.lrs, seeds=seeds, draw=number)
        bought = bought._replace(runs=bought.runs + more.runs)
    later = make_plan(bought, parse_size("96x2"), budget_s=1500.0)
    assert later.width_now < plan.width_now
    assert later.width_now == pytest.approx(plan.width_then, abs=0.35)  # the scatter is learned anew


@pytest.mark.parametrize(
    ("level", "budget_s", "words"),
    [(2.0, 600.0, "no run fails .* add higher rates"), (-0.9, 1e-3, "buys no curve; the cheapest, 16x2")],
)
def test_no_plan(plant: Plant, level: float, budget_s: float, words: str) -> None:
    """contract."""
    with pytest.raises(ValueError, match=words):
        make_plan(plant(level=level), parse_size("96x2"), budget_s=budget_s)


def test_a_target_out_of_reach_has_no_plan(plant: Plant) -> None:
    """contract."""
    with pytest.raises(ValueError, match="times beyond"):
        make_plan(plant(), parse_size("2048x2"), budget_s=600.0)
