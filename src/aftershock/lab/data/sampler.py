"""Which samples step i of seed s sees: a hash of (seed, step, row), so there is no state to save or rewind.

Shapes: K replicas, B rows of a batch. Imports numpy only.
"""

from __future__ import annotations

import numpy as np

_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # this and the constants of _mix: splitmix64.c (Vigna 2015)
_MASK = 2**64 - 1
_SHUFFLE_STEP = _MASK  # a step that no training run reaches, so that a split never mirrors a batch


def offsets(seed_K: np.ndarray, step: int, batch_size: int, num_windows: int) -> np.ndarray:
    """Sample indices [K, B] (int64), uniform over [0, num_windows) with replacement.

    offsets[k, b] = mix(mix(mix(seed_k) + step) + b) mod num_windows, with `mix` the splitmix64 output function of
    its argument plus the golden gamma. Pure: column k depends on seed_k and step alone, row b not on `batch_size`.
    The modulo favours low indices by less than num_windows / 2^64.

    >>> offsets(np.array([0, 1]), step=3, batch_size=2, num_windows=1000).shape
    (2, 2)

    Raises ValueError when a seed or the step is negative, or when there is nothing to draw from.
    """
    if step < 0:
        raise ValueError(f"step must be at least 0, got {step}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if num_windows < 1:
        raise ValueError(f"there must be at least one sample to draw from, got {num_windows}")
    return (_hash(seed_K, step, batch_size) % np.uint64(num_windows)).astype(np.int64)


def shuffle(seed: int, num_items: int) -> np.ndarray:
    """A permutation of range(num_items), int64: the same for a seed on every machine and under every numpy version."""
    return np.argsort(_hash(np.array([seed]), _SHUFFLE_STEP, num_items)[0], kind="stable")


def _hash(seed_K: np.ndarray, step: int, num_rows: int) -> np.ndarray:
    """uint64 [K, num_rows]."""
    seed_K = np.asarray(seed_K)
    if seed_K.ndim != 1 or seed_K.dtype.kind not in "iu":
        raise ValueError(f"seeds must be a vector of integers below 2^64, got {seed_K.dtype} of shape {seed_K.shape}")
    if seed_K.size and seed_K.min() < 0:
        raise ValueError(f"seeds must be at least 0, got {seed_K.min()}")
    row_B = np.arange(num_rows, dtype=np.uint64)
    step_K = _mix(seed_K.astype(np.uint64)) + np.uint64(step & _MASK)
    return _mix(_mix(step_K)[:, None] + row_B)


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + _GAMMA
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
