"""Sampler: against scalar Python integers, for uniformity, and for independence of everything but (seed, step, row)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aftershock.lab.data.sampler import offsets, shuffle

MASK = 2**64 - 1
SEEDS = st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=4)


def slow_mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def slow_offset(seed: int, step: int, row: int, num_windows: int) -> int:
    step_hash = slow_mix((slow_mix(seed) + step) & MASK)
    return slow_mix((step_hash + row) & MASK) % num_windows


def test_oracle_of_splitmix64_itself() -> None:
    # First output for seed 1234567 (Rosetta Code, "Pseudo-random numbers/Splitmix64").
    assert slow_mix(1234567) == 6457827717110365317


@given(SEEDS, st.integers(0, 2**40), st.integers(1, 5), st.integers(1, 2**62))
def test_oracle_scalar_python(seeds: list[int], step: int, batch_size: int, num_windows: int) -> None:
    fast_KB = offsets(np.array(seeds), step, batch_size, num_windows)
    slow = [[slow_offset(seed, step, row, num_windows) for row in range(batch_size)] for seed in seeds]
    assert fast_KB.dtype == np.int64
    assert fast_KB.tolist() == slow


@given(SEEDS, st.integers(0, 10**6))
def test_equivalence_of_a_replica_alone_and_in_company(seeds: list[int], step: int) -> None:
    together_KB = offsets(np.array(seeds), step, 4, 1000)
    for index, seed in enumerate(seeds):
        assert np.array_equal(together_KB[index], offsets(np.array([seed]), step, 6, 1000)[0, :4])


def test_uniform_over_cells_and_uncorrelated_over_neighbouring_seeds_steps_and_rows() -> None:
    draws = np.stack([offsets(np.arange(8), step, 64, 1000) for step in range(200)])  # [steps, K, B]
    counts = np.bincount(draws.ravel() // 10, minlength=100)
    chi_square = float(((counts - counts.mean()) ** 2 / counts.mean()).sum())
    assert 53 < chi_square < 161  # 99 degrees of freedom, 1e-4 on either side; dropping one mix gives thousands
    centred = draws - draws.mean()
    for axis in range(3):
        neighbours = np.moveaxis(centred, axis, 0)
        correlation = float((neighbours[1:] * neighbours[:-1]).mean() / centred.var())
        assert abs(correlation) < 0.014  # 4 standard errors of 1 / sqrt(9e4)


def test_every_sample_can_come_up() -> None:
    assert set(offsets(np.array([0]), 0, 2000, 100).ravel().tolist()) == set(range(100))


@given(st.integers(0, 2**63 - 1), st.integers(0, 300))
def test_contract_shuffle_is_a_permutation(seed: int, num_items: int) -> None:
    assert sorted(shuffle(seed, num_items).tolist()) == list(range(num_items))


def test_shuffle_depends_on_the_seed_and_never_changes() -> None:
    assert shuffle(0, 50).tolist() != shuffle(1, 50).tolist()
    slow = sorted(range(8), key=lambda row: slow_mix((slow_mix((slow_mix(3) + MASK) & MASK) + row) & MASK))
    assert shuffle(3, 8).tolist() == slow


@pytest.mark.parametrize(
    ("seed_K", "step", "batch_size", "num_windows", "words"),
    [
        (np.array([0]), -1, 1, 1, "step must be at least 0, got -1"),
        (np.array([0]), 0, 0, 1, "batch_size must be at least 1, got 0"),
        (np.array([0]), 0, 1, 0, "at least one sample"),
        (np.array([-3]), 0, 1, 1, "seeds must be at least 0, got -3"),
        (np.array([0.5]), 0, 1, 1, "vector of integers"),
        (np.array(0), 0, 1, 1, "vector of integers"),
        (np.array([2**64]), 0, 1, 1, "below 2\\^64"),
    ],
)
def test_planted_bad_input(seed_K: np.ndarray, step: int, batch_size: int, num_windows: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        offsets(seed_K, step, batch_size, num_windows)
