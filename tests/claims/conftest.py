"""Synthetic results: the full grid of a claim's own study, with losses and signals that a test plants."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import pytest

from aftershock.claims.catalog import find_claim
from aftershock.claims.claim import RunResult, Signal, Trial
from aftershock.lab.sizes import parse_size

L0 = 6.4

Loss = Callable[[str, str, float, int], float | None]
Signals = Callable[[str, str, float, int], Mapping[str, Sequence[float]]]
Plant = Callable[..., list[RunResult]]


@pytest.fixture
def plant() -> Plant:
    """`plant("P2", loss, signals)`: the runs of P2's study; both are functions of size, arm, rate and seed."""

    def build(claim_id: str, loss: Loss, signals: Signals | None = None) -> list[RunResult]:
        trial = find_claim(claim_id).trial
        assert isinstance(trial, Trial)
        sweep = trial.sweep
        runs = []
        for size, arm, lr, seed in itertools.product(sweep.sizes, sweep.arms, sweep.lrs, sweep.seeds):
            values = signals(size, arm, lr, seed) if signals else {}
            runs.append(
                RunResult(
                    size=size,
                    arm=arm,
                    lr=lr,
                    seed=seed,
                    num_params=parse_size(size).num_block_params,
                    initial_loss=L0,
                    final_loss=loss(size, arm, lr, seed),
                    signals={name: Signal(range(len(series)), series) for name, series in values.items()},
                )
            )
        return runs

    return build
