"""Small pure statistics over numpy arrays: finite masks, RMS, median and MAD, debiased EMA.

Legend: N samples along the leading axis, S any trailing shape. All sums run in float64, whatever comes in.
Non-finite values are a case of their own: `rms` carries them on, `median_mad` refuses them, `ema` steps over them.
Must not import anything else of aftershock, nor torch.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

MAD_TO_SIGMA = 1.482602218505602
"""1 / Phi^-1(3/4): a normal's standard deviation is this times its MAD (Rousseeuw and Croux 1993, section 1)."""


class MedianMad(NamedTuple):
    """`median` and `mad` of a sample, both in the sample's own unit; `mad` is already scaled to a sigma."""

    median: float
    mad: float


class EmaState(NamedTuple):
    """A debiased moving average in the middle of its work: `moment` S and `weight` S, both 0 before the first value."""

    moment: np.ndarray
    weight: np.ndarray


def finite_mask(*arrays: npt.ArrayLike) -> np.ndarray:
    """Where every one of `arrays` is finite: bool, of their broadcast shape. Use it to select, never to multiply.

    Raises ValueError when no array is given or the shapes do not broadcast.

    >>> finite_mask([1.0, np.nan, 3.0], [1.0, 2.0, np.inf])
    array([ True, False, False])
    """
    if not arrays:
        raise ValueError("finite_mask needs at least one array, got none")
    try:
        broadcast = np.broadcast_arrays(*(np.isfinite(np.asarray(array, dtype=np.float64)) for array in arrays))
    except ValueError:
        shapes = ", ".join(str(np.shape(array)) for array in arrays)
        raise ValueError(f"finite_mask needs arrays of one shape, got {shapes}") from None
    return np.logical_and.reduce(broadcast)


def rms(x: npt.ArrayLike, *, axis: int | tuple[int, ...] | None = None) -> np.ndarray:
    """Root mean square, `sqrt(mean(x^2))` over `axis` (all axes by default), in the unit of x; float64.

    Scaled by max |x| inside, so neither 1e-200 nor 1e200 is lost to the square. A NaN gives nan; an infinity gives
    inf. Raises ValueError on an empty reduction: a mean of nothing has no value.

    >>> float(rms([3.0, 4.0, 0.0, 0.0]))
    2.5
    """
    values = np.abs(np.asarray(x, dtype=np.float64))
    reduced = values.shape if axis is None else [values.shape[a] for a in np.atleast_1d(axis)]
    if 0 in reduced:
        raise ValueError(f"rms of an empty array (shape {values.shape}, axis {axis}); give at least one value")
    peak = values.max(axis=axis, keepdims=True)
    scale = np.where((peak > 0) & np.isfinite(peak), peak, 1.0)
    return np.sqrt(np.mean((values / scale) ** 2, axis=axis)) * np.squeeze(scale, axis=axis)


def median_mad(x: npt.ArrayLike) -> MedianMad:
    """Median m and scaled median absolute deviation of all values of x.

    `mad = 1.4826 median(|x - m|)`: for a normal sample it estimates sigma, and up to half of the sample may be wild
    without moving either by much (Rousseeuw and Croux 1993). A constant sample has mad 0.
    Raises ValueError when x is empty or holds a non-finite value: decide those first, with `finite_mask`.

    >>> median_mad([1.0, 2.0, 3.0, 4.0, 1000.0]).median
    3.0
    """
    values = np.asarray(x, dtype=np.float64).ravel()
    if values.size == 0:
        raise ValueError("median_mad of an empty array; give at least one value")
    bad = int(values.size - np.isfinite(values).sum())
    if bad:
        raise ValueError(f"median_mad got {bad} non-finite of {values.size} values; select with finite_mask first")
    median = float(np.median(values))
    return MedianMad(median, MAD_TO_SIGMA * float(np.median(np.abs(values - median))))


def ema_start(shape: tuple[int, ...] = ()) -> EmaState:
    """The state before the first value, for values of `shape` S."""
    return EmaState(np.zeros(shape), np.zeros(shape))


def ema_update(state: EmaState, value: npt.ArrayLike, *, decay: float) -> EmaState:
    """One value S later: `m' = decay m + (1 - decay) value`, `w' = decay w + (1 - decay)`.

    The old state stays as it was. An element that is not finite leaves its own m and w unchanged.
    Raises ValueError when `decay` is outside [0, 1) or the shapes differ.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"ema decay must lie in [0, 1), got {decay}")
    new = np.asarray(value, dtype=np.float64)
    if new.shape != state.moment.shape:
        raise ValueError(f"ema got a value of shape {new.shape} for a state of shape {state.moment.shape}")
    keep = np.isfinite(new)
    moment = np.where(keep, decay * state.moment + (1 - decay) * np.where(keep, new, 0.0), state.moment)
    return EmaState(moment, np.where(keep, decay * state.weight + (1 - decay), state.weight))


def ema_value(state: EmaState) -> np.ndarray:
    """The debiased average `m / w` (Kingma and Ba 2015, section 3: w = 1 - decay^t); nan before any finite value."""
    started = state.weight > 0
    return np.where(started, state.moment / np.where(started, state.weight, 1.0), np.nan)


def ema(x_NS: npt.ArrayLike, *, decay: float) -> np.ndarray:
    """Debiased exponential moving average along the leading axis: out[t] uses x[0..t]; shape N,S; float64.

    `out[t] = sum_i decay^(t-i) x[i] / sum_i decay^(t-i)` over the finite x[i], i <= t. A constant series stays exactly
    that constant from the first value on; a non-finite value repeats the last average (nan while there is none).

    >>> ema([1.0, 3.0], decay=0.5).round(4)
    array([1.    , 2.3333])
    """
    values = np.asarray(x_NS, dtype=np.float64)
    if values.ndim == 0:
        raise ValueError("ema needs a series, got a single number")
    averages, state = np.empty_like(values), ema_start(values.shape[1:])
    for step, value in enumerate(values):
        state = ema_update(state, value, decay=decay)
        averages[step] = ema_value(state)
    return averages
