from __future__ import annotations

import math

import pytest

from aftershock.report.groups import Group, RunFacts, judge

RATES = (1e-3, 1e-2, 1e-1)


def _run(lr: float, loss: float | None, *, seed: int = 0, status: str = "", arm: str = "a", **more: float) -> RunFacts:
    status = status or ("finished" if loss is not None else "diverged")
    return RunFacts(
        run_id=f"{arm}-{lr}-{seed}", size="s", arm=arm, lr=lr, seed=seed, status=status, final_loss=loss,
        initial_loss=6.0, num_block_params=100, **more,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip


def _one(runs: list[RunFacts]) -> Group:
    (group,) = judge(runs).groups
    return group


def test_sensitivity_by_hand() -> None:
    """oracle: (2.5 + 2.0 + min(nan -> 6, 6)) / 3 - 2.0."""
    group = _one([_run(1e-3, 2.5), _run(1e-2, 2.0), _run(1e-1, None)])
    assert group.lr_sensitivity == pytest.approx(1.5, abs=1e-12)  # a sum of three floats
    assert (group.best_lr, group.best_loss, group.l0, group.fails_from) == (1e-2, 2.0, 6.0, 1e-1)
    assert group.interval is None


def test_seeds_are_averaged_after_the_cap() -> None:
    """oracle: a diverged seed counts as l0 in its rate's mean."""
    runs = [_run(lr, loss, seed=seed) for seed, losses in enumerate([(2.5, 2.0, None), (2.5, 2.0, 2.2)])
            for lr, loss in zip(RATES, losses, strict=True)]  # fmt: skip
    group = _one(runs)
    assert group.points[2].loss == pytest.approx((6.0 + 2.2) / 2)
    assert group.lr_sensitivity == pytest.approx((2.5 + 2.0 + 4.1) / 3 - 2.0, abs=1e-12)
    assert group.interval is not None
    assert group.lr_sensitivity is not None
    low, high = group.interval
    assert low <= group.lr_sensitivity <= high
    assert (group.points[2].num_diverged, group.points[2].verdict) == (1, "fails")


def test_outcomes() -> None:
    """planted: one run of each kind."""
    runs = [
        _run(1e-4, 3.2),
        _run(1e-3, 2.0),
        _run(1e-2, 2.3),
        _run(3e-2, 2.5),
        _run(1e-1, None),
        _run(3e-1, None, status="running"),
        _run(1.0, None, status="failed"),
    ]
    outcomes = list(judge(runs).outcomes.values())
    assert outcomes == ["slow", "trained", "trained", "broken", "diverged", "unfinished", "unfinished"]


def test_a_low_rate_is_slow_not_failing() -> None:
    group = _one([_run(1e-3, 4.5), _run(1e-2, 2.0), _run(1e-1, 2.1)])
    assert group.points[0].verdict == "slow"
    assert group.fails_from is None


def test_fails_from_needs_every_higher_rate() -> None:
    """planted: a hole in the middle is no onset."""
    assert _one([_run(1e-3, None), _run(1e-2, 2.0), _run(1e-1, 2.1)]).fails_from is None
    assert _one([_run(1e-3, 2.0), _run(1e-2, None), _run(1e-1, 5.9)]).fails_from == 1e-2


@pytest.mark.parametrize(
    ("runs", "note"),
    [
        ([_run(lr, None) for lr in RATES], "every run diverged"),
        ([_run(1e-3, 2.0), _run(1e-2, None, status="missing")], "1 of 2 rates have no finished run"),
        ([_run(1e-3, 2.0)], "one rate only"),
        ([_run(1e-3, 7.0), _run(1e-2, 8.0)], "every run ended above its initial loss"),
        ([RunFacts(run_id="x", size="s", arm="a", lr=0.1, seed=0, status="running")],
         "no run has ended yet"),
    ],
)  # fmt: skip
def test_no_sensitivity_comes_with_a_reason(runs: list[RunFacts], note: str) -> None:
    """contract: missing stays missing."""
    group = _one(runs)
    assert (group.lr_sensitivity, group.note) == (None, note)


def test_a_partly_finished_rate_still_counts_and_says_so() -> None:
    group = _one([_run(1e-3, 2.4), _run(1e-2, 2.0), _run(1e-2, None, seed=1, status="running")])
    assert group.lr_sensitivity == pytest.approx(0.2, abs=1e-12)
    assert group.note == "1 of 3 runs not in yet"


def test_a_nan_loss_of_a_finished_run_is_a_divergence() -> None:
    judged = judge([_run(1e-3, 2.0), _run(1e-2, math.nan, status="finished")])
    assert judged.outcomes["a-0.01-0"] == "diverged"
    assert judged.groups[0].points[1].loss == 6.0


def test_sizes_are_ordered_by_parameters() -> None:
    runs = [
        RunFacts(run_id=size, size=size, arm="a", lr=0.1, seed=0, status="missing", num_block_params=params)
        for size, params in (("big", 900), ("new", None), ("small", 10))
    ]
    assert [group.size for group in judge(runs).groups] == ["small", "big", "new"]
