"""Differences of arms over many spikes: which runs count together, and what is said of them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from aftershock.replay.paired import (
    LIMIT,
    Arm,
    Pair,
    hazard,
    log_ratio,
    log_training_ratio,
    paired,
    pairs,
    pooled,
    spiked_again,
)
from aftershock.replay.response import wilson


def arm(loss: float, *, again: int | None = None, training: float = 1.0) -> Arm:
    return Arm(steps=100, spiked=True, again=again, loss=loss, training=training, distance=1.0)


def noisy(num_runs: int, each: int, *, mean: float = 0.0) -> list[Pair]:
    """Runs that differ, whose spikes do not."""
    random = np.random.default_rng(1)
    levels = random.normal(mean, 1.0, num_runs)
    return [Pair(f"run {i}", float(level)) for i, level in enumerate(levels) for _ in range(each)]


class TestPaired:
    def test_against_every_draw_there_is(self) -> None:
        """oracle: five runs have 3,125 draws; 2,000 of them at random have about the same percentiles."""
        found = [Pair(str(i), x) for i, x in enumerate((-1.0, -0.2, 0.1, 0.4, 2.0))]
        means = [np.mean(draw) for draw in itertools.product([pair.difference for pair in found], repeat=5)]
        measured = paired(found, of="mean")
        assert measured.value == pytest.approx(0.26)
        # a percentile of 2,000 draws lies within 0.1 of the true one where the draws' deviation is 0.45
        assert (measured.low, measured.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.1)

    def test_spikes_of_one_run_are_not_independent(self) -> None:
        """equivalence: four equal spikes of each run say what one says; taken for runs they would say too much."""
        once, often = noisy(10, 1), noisy(10, 4)
        assert paired(once)[:3] == paired(often)[:3]
        alone = paired([Pair(str(i), pair.difference) for i, pair in enumerate(often)], of="mean")
        together = paired(often, of="mean")
        assert alone.high - alone.low < 0.7 * (together.high - together.low)
        assert (paired(often).num, paired(often).num_runs) == (40, 10)

    def test_a_word_only_where_the_interval_excludes_0(self) -> None:
        """planted: a clear difference either way, none, and too few runs to say."""
        assert paired(noisy(20, 1, mean=-3.0)).word == "lower"
        assert paired(noisy(20, 1, mean=3.0)).word == "higher"
        assert paired(noisy(20, 1)).word == ""
        few = paired(noisy(4, 10, mean=-30.0))
        assert (few.word, few.num, few.num_runs) == ("", 40, 4)
        assert few.value < -25
        assert math.isnan(few.low)
        assert math.isnan(paired([]).value)

    def test_one_lost_arm_moves_no_median(self) -> None:
        """property: of twenty."""
        found = [Pair(str(i), -0.1) for i in range(19)]
        assert paired([*found, Pair("lost", LIMIT)]) == (-0.1, -0.1, -0.1, 20, 20)

    def test_no_class_counts_for_more(self) -> None:
        """equivalence: the mean of the classes' medians, whatever their sizes."""
        many, few = noisy(30, 2, mean=1.0), noisy(6, 1, mean=-2.0)
        measured = pooled([many, few])
        assert measured.value == pytest.approx((paired(many).value + paired(few).value) / 2)
        assert measured.low < measured.value < measured.high
        assert math.isnan(pooled([many, noisy(4, 1)]).low)
        assert math.isnan(pooled([]).value)
        assert math.isnan(pooled([many, []]).value)


class TestPairs:
    def test_only_spikes_with_both_arms(self) -> None:
        """contract."""
        spikes = [("a", {"push": arm(2.0), "skip": arm(1.0)}), ("b", {"push": arm(2.0)})]
        assert pairs(spikes, "push", "skip") == [Pair("a", math.log(2.0))]
        assert pairs(spikes, "push", "skip", of=log_training_ratio) == [Pair("a", 0.0)]

    def test_lost_arms(self) -> None:
        """contract: a lost arm is worse than any, two of them are equal; a loss without a ratio is refused."""
        assert log_ratio(arm(math.inf), arm(1.0)) == LIMIT
        assert log_ratio(arm(1.0), arm(math.inf)) == -LIMIT
        assert log_ratio(arm(math.inf), arm(math.inf)) == 0
        assert log_ratio(arm(0.0), arm(1.0)) == -LIMIT
        for loss in (-1.0, math.nan):
            with pytest.raises(ValueError, match="compared by their ratio"):
                log_ratio(arm(1.0), arm(loss))

    def test_hazards(self) -> None:
        """oracle: Wilson's interval; the mean of the differences is the difference of the shares."""
        push, skip = [arm(1.0, again=7 if i < 6 else None) for i in range(20)], [arm(1.0) for _ in range(20)]
        measured = hazard(push)
        assert measured == (6, 20, 0.3, *wilson(6, 20))
        assert hazard([]).total == 0
        spikes = [(str(i), {"push": a, "skip": b}) for i, (a, b) in enumerate(zip(push, skip, strict=True))]
        assert paired(pairs(spikes, "push", "skip", of=spiked_again), of="mean").value == pytest.approx(0.3)
