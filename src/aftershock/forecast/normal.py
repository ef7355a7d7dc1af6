"""The standard normal law over arrays: probabilities of intervals, moments and draws inside them, also in the tails.

An interval [a, b] may be open to either side (infinite ends). Where both ends are positive the mirror image is taken,
so that nothing is ever computed as a difference of two numbers near 1. torch, for its special functions, is imported
inside; must not import the lab.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)
TINY = np.finfo(np.float64).tiny


class Truncated(NamedTuple):
    """Mean and variance of a standard normal inside an interval, in the shape of its ends."""

    mean: np.ndarray
    var: np.ndarray


def log_cdf(z: np.ndarray) -> np.ndarray:
    """log Phi(z), finite down to z = -1e150."""
    return _special("log_ndtr", z)


def log_mass(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """log(Phi(b) - Phi(a)) for a < b.

    >>> round(float(np.exp(log_mass(np.array(-1.0), np.array(1.0)))), 4)
    0.6827
    """
    a, b = _mirrored(a, b)[:2]
    upper = log_cdf(b)
    return upper + np.log1p(-np.exp(np.minimum(log_cdf(a) - upper, -1e-15)))


def truncated_moments(a: np.ndarray, b: np.ndarray) -> Truncated:
    """Mean and variance of z ~ N(0, 1) given a < z < b (Johnson, Kotz and Balakrishnan 1994, section 13.10.1)."""
    left, right, flipped = _mirrored(a, b)
    log_m = log_mass(left, right)
    density_a, density_b = (np.exp(-0.5 * _square(x) - LOG_SQRT_2PI - log_m) for x in (left, right))
    mean = density_a - density_b
    var = 1 + _times(left, density_a) - _times(right, density_b) - mean**2
    mean = np.clip(mean, left, right)  # cancellation in a narrow interval far out must not leave it
    return Truncated(np.where(flipped, -mean, mean), np.clip(var, 0.0, 1.0))


def truncated_draws(generator: np.random.Generator, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """One draw of z ~ N(0, 1) given a < z < b for each element, by inversion."""
    left, right, flipped = _mirrored(a, b)
    low, high = _special("ndtr", left), _special("ndtr", right)
    share = np.maximum(low + (high - low) * generator.random(left.shape), TINY)
    draw = np.clip(_special("ndtri", share), left, right)
    return np.where(flipped, -draw, draw)


def _special(name: str, z: np.ndarray) -> np.ndarray:
    import torch

    return getattr(torch.special, name)(torch.from_numpy(np.array(z, dtype=np.float64))).numpy()


def _mirrored(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The interval, or its mirror image where it lies above 0, and which are mirrored."""
    a, b = np.broadcast_arrays(np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64))
    flipped = a > 0
    return np.where(flipped, -b, a), np.where(flipped, -a, b), flipped


def _square(x: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(x), np.where(np.isfinite(x), x, 0.0) ** 2, np.inf)


def _times(x: np.ndarray, density: np.ndarray) -> np.ndarray:
    """x * density, which is 0 at an infinite end."""
    return np.where(np.isfinite(x), x, 0.0) * density
