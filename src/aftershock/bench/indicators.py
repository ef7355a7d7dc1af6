"""The leading indicators that are judged, one literal table, and their scores: how alarming a signal is at each step.

A score uses what was known at its step and no more. The table follows the survey of causes (its section on leading
indicators, whose numbers are kept); what it lists and cannot be had in runs of one process on one CPU is `MISSING`.
Legend: N values of one signal, W values of a window. Must not import torch.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from aftershock.numerics import MAD_TO_SIGMA

Way = Literal["level", "surprise", "trend"]
"""level: the value itself; surprise: its robust z against the steps before; trend: that of the last steps' median."""
Scale = Literal["log", "linear"]

WINDOW, LEAST = 128, 20
"""Steps before, of which median and MAD are taken for a surprise, and how few still do: those of the labels."""
RECENT, BEFORE = 16, 256
"""Steps whose median is the trend, and the steps before these that it is set against."""
FLOOR: dict[Scale, float] = {"log": 0.02, "linear": 0.01}
"""Least spread: 2 % of a positive signal, and 0.01 of a share or a cosine: a constant signal has no surprises."""
TINY = 1e-30
"""What counts for a value of 0 where logarithms are taken."""


class Indicator(NamedTuple):
    """`number` in the survey's table, `sign` +1 where large is bad, `ways` of making a score of it."""

    name: str
    number: int
    signal: str
    sign: int
    scale: Scale
    ways: tuple[Way, ...]

    @property
    def ahead(self) -> int:
        """1 where it is known before its step is taken, from the tokens alone: it then leads by one step more."""
        return int(self.signal.startswith("batch/tokens/"))


ALL_WAYS: tuple[Way, ...] = ("level", "surprise", "trend")
RELATIVE: tuple[Way, ...] = ("surprise", "trend")
"""Of signals whose level means nothing by itself: it depends on the model and the data."""

INDICATORS: tuple[Indicator, ...] = (
    Indicator("loss", 1, "loss/train/mean", 1, "log", RELATIVE),
    Indicator("gradient norm", 2, "grad/all/norm", 1, "log", RELATIVE),
    Indicator("gradient norm, largest tensor over its usual", 2, "grad/max/over_usual", 1, "log", ALL_WAYS),
    Indicator("embedding gradient over median tensor", 3, "grad/embed/over_median", 1, "log", ALL_WAYS),
    Indicator("update norm", 4, "update/all/norm", 1, "log", RELATIVE),
    Indicator("update over weight, largest tensor", 4, "update/max/ratio", 1, "log", ALL_WAYS),
    Indicator("RMS_t, largest tensor", 5, "optim/max/rms_t", 1, "log", ALL_WAYS),
    Indicator("RMS_t as share of its ceiling", 5, "optim/max/rms_t_share", 1, "log", ALL_WAYS),
    Indicator("share of |m/sqrt v| > 0.9", 6, "optim/all/saturated_frac", 1, "linear", ALL_WAYS),
    Indicator("share of |m/sqrt v| > 0.9, largest tensor", 6, "optim/max/saturated_frac", 1, "linear", ALL_WAYS),
    Indicator("cos(g_t, g_t-1), rising", 6, "grad/all/cosine_previous", 1, "linear", ALL_WAYS),
    Indicator("cos(g_t, g_t-1), falling", 6, "grad/all/cosine_previous", -1, "linear", ALL_WAYS),
    Indicator("cos(u, -g), falling", 6, "update/all/cosine_descent", -1, "linear", ALL_WAYS),
    Indicator("|m|", 7, "optim/all/first_norm", 1, "log", RELATIVE),
    Indicator("sum sqrt v, falling", 7, "optim/all/second_root_sum", -1, "log", RELATIVE),
    Indicator("rms m over mean sqrt v", 7, "optim/all/first_over_root", 1, "log", ALL_WAYS),
    Indicator("share of v at the eps floor", 8, "optim/all/eps_floor_frac", 1, "linear", ALL_WAYS),
    Indicator("share of v at the eps floor, largest tensor", 8, "optim/max/eps_floor_frac", 1, "linear", ALL_WAYS),
    Indicator("largest attention logit", 9, "attention/max/logit", 1, "log", ALL_WAYS),
    Indicator("smallest attention entropy, falling", 9, "attention/min/entropy", -1, "log", ALL_WAYS),
    Indicator("spectral norm of W_q and W_k", 10, "param/qk/spectral_norm", 1, "log", ALL_WAYS),
    Indicator("stable rank of the query-key change, falling", 11, "update/qk/stable_rank", -1, "log", ALL_WAYS),
    Indicator("spectral entropy of that change, falling", 11, "update/qk/spectral_entropy", -1, "log", ALL_WAYS),
    Indicator("mean log Z", 12, "output/log_z", 1, "linear", ALL_WAYS),
    Indicator("largest log Z", 12, "output/log_z_max", 1, "linear", ALL_WAYS),
    Indicator("RMS of the output", 12, "output/rms", 1, "log", RELATIVE),
    Indicator("RMS of the last block", 12, "activation/last/rms", 1, "log", RELATIVE),
    Indicator("length of the mean output embedding", 12, "param/head/mean_norm", 1, "log", RELATIVE),
    Indicator("largest output", 13, "output/abs_max", 1, "log", RELATIVE),
    Indicator("largest activation", 13, "activation/max/abs_max", 1, "log", ALL_WAYS),
    Indicator("largest kurtosis of a block", 13, "activation/max/kurtosis", 1, "log", ALL_WAYS),
    Indicator("curvature along the step over 2/eta", 14, "curvature/all/directional", 1, "linear", ALL_WAYS),
    Indicator("sharpest curvature over 2/eta", 15, "curvature/all/sharpest", 1, "linear", ALL_WAYS),
    Indicator("batch: longest repetition", 16, "batch/tokens/repeat_count", 1, "log", ALL_WAYS),
    Indicator("batch: compression ratio", 16, "batch/tokens/compression_ratio", 1, "log", ALL_WAYS),
    Indicator("batch: share of distinct tokens, falling", 16, "batch/tokens/unique_frac", -1, "log", ALL_WAYS),
    Indicator("batch: share of distinct tokens, rising", 16, "batch/tokens/unique_frac", 1, "log", ALL_WAYS),
    Indicator("batch: largest loss of a sequence", 16, "batch/max/loss", 1, "log", RELATIVE),
    Indicator("batch: largest loss over the mean one", 16, "batch/max/loss_over_mean", 1, "log", ALL_WAYS),
    Indicator("weight norm, falling", 20, "param/all/norm", -1, "log", RELATIVE),
    Indicator("weight norm, smallest tensor over its first", 20, "param/min/of_first", -1, "log", ALL_WAYS),
)
BASELINE = "gradient norm"
"""What every other indicator is set against: it is in every log."""
MISSING: dict[str, str] = {
    "17, data cursor, hashes, random numbers": "no number: what a replay needs, not what a spike shows",
    "18, router entropy and load": "no specimen has a router",
    "19, spread over ranks": "one process trains; the planted sick rank is in its own micro-batch's gradient only",
}
"""Of the survey's table, what is not judged, and why."""


def scores(indicator: Indicator, way: Way, values: np.ndarray) -> np.ndarray:
    """How alarming each of `values` is, float32 [N]: the larger, the more; -inf where nothing can be said yet.

    surprise: sign (x - median) / sigma over the last 128 finite values before; trend: the same of the median of the
    last 16, this one included, against the 256 before those; sigma = max(1.4826 MAD, floor), x = log(value) on the log
    scale. level: sign value. A value that is not finite scores inf, and is in no window.
    """
    value_N = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(value_N)
    out = np.where(finite, -np.inf, np.inf)
    x = value_N[finite]
    if way == "level":
        out[finite] = indicator.sign * x
        return out.astype(np.float32)
    if indicator.scale == "log":
        x = np.log(np.maximum(x, TINY))
    floor = FLOOR[indicator.scale]
    if way == "surprise":
        found = _against(x, x, WINDOW, delay=0, floor=floor)
    else:
        recent = _trailing_median(x, RECENT)
        found = _against(recent, x, BEFORE, delay=RECENT - 1, floor=floor)
    out[finite] = np.where(np.isnan(found), -np.inf, indicator.sign * found)
    return out.astype(np.float32)


def _against(x: np.ndarray, past: np.ndarray, size: int, *, delay: int, floor: float) -> np.ndarray:
    """z [N] of x[t] against the at most `size` values of `past` that end before t - delay; nan with fewer than 20."""
    out = np.full(len(x), np.nan)
    first = LEAST + delay
    for t in range(first, min(len(x), size + delay)):
        out[t] = _z(x[t : t + 1], past[None, : t - delay], floor)[0]
    if len(x) > size + delay:
        windows = sliding_window_view(past, size)[: len(x) - size - delay]
        out[size + delay :] = _z(x[size + delay :], windows, floor)
    return out


def _z(x: np.ndarray, window_NW: np.ndarray, floor: float) -> np.ndarray:
    middle = np.median(window_NW, axis=1)
    mad = MAD_TO_SIGMA * np.median(np.abs(window_NW - middle[:, None]), axis=1)
    return (x - middle) / np.maximum(mad, floor)


def _trailing_median(x: np.ndarray, size: int) -> np.ndarray:
    """Median of the last `size` values, this one included; nan before there are so many."""
    out = np.full(len(x), np.nan)
    if len(x) >= size:
        out[size - 1 :] = np.median(sliding_window_view(x, size), axis=1)
    return out
