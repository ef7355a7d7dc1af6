"""The chance that a run spikes or diverges within its next steps, from its loss and norms so far: features and model.

A `Track` follows one signal in memory that does not grow and a few microseconds a step; a `Hazard` turns the features
of several into log-odds. Which signals a run has decides which of the fitted models speaks (`SHIPPED`).
Legend: N steps (rows), C features. Must not import torch; numpy only where a model is fitted.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Mapping, Sequence
from operator import mul
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from aftershock.store.environment import in_checkout
from aftershock.store.folder import atomic_write

if TYPE_CHECKING:
    import numpy as np

Slot = Literal["loss", "gradient", "update", "rms_t_share", "log_z", "logit"]
"""What a signal is to the model: training loss, norm of all gradients before clipping, norm of the weights' change, the
largest over tensors of RMS_t sqrt(1 - beta2), mean log Z, largest attention logit."""
SLOTS: tuple[Slot, ...] = ("loss", "gradient", "update", "rms_t_share", "log_z", "logit")
SETS: tuple[tuple[Slot, ...], ...] = tuple(SLOTS[:n] for n in range(1, len(SLOTS) + 1))
"""Signals of each model that is judged, from the loss alone to all."""
SHIPPED = SETS[:3]
"""Those that are used. On the tuning seeds RMS_t, log Z and logits did not help the forecast of specimens that a model
had not seen, beside loss, gradient and update."""
WITHIN = (1, 8, 32)
"""The k of "within the next k steps"."""

WINDOW, ARMED = 128, 20
"""Values before, of which median and spread are taken, and how few still do: those of the zoo's labels."""
FADE = 0.87
"""What is left after a step of the largest surprise so far: half after five steps."""
MOST = 50.0
"""Surprises are cut here, and a value that is not finite counts as so many."""
IQR_TO_SIGMA = 0.7413011092528010
"""1 / (2 Phi^-1(3/4)): a normal's standard deviation is this times its interquartile range."""
FLOOR = {"log": 0.02, "linear": 0.01}
"""Least spread, of a logarithm and of a plain value."""
LINEAR: frozenset[Slot] = frozenset({"log_z"})
"""Signals that may be negative; logarithms are taken of the others."""
TINY = 1e-30

SHAPES = ("now", "fast")
"""Features of one signal, each log(1 + sigmas): this value above the median, and the largest of the last few. Moving
averages, trends over hundreds of steps and absolute levels were tried and left out: specimens that a model had not seen
were forecast worse with them."""

NAME = "hazard.json"
SCHEMA = 1


class Track:
    """One signal so far. `add` a value; `features` are those after it. O(log WINDOW) a value."""

    __slots__ = ("_floor", "_linear", "_ordered", "_window", "fast", "z")

    def __init__(self, slot: Slot) -> None:
        self._linear = slot in LINEAR
        self._floor = FLOOR["linear" if self._linear else "log"]
        self._window: deque[float] = deque()
        self._ordered: list[float] = []
        self.z = self.fast = 0.0

    @property
    def armed(self) -> bool:
        """Whether there is a baseline to compare with."""
        return len(self._ordered) >= ARMED

    def add(self, value: float) -> None:
        """The value of the next step that has one."""
        if value - value != 0:  # not finite: in no window
            self.z = MOST
        else:
            x = value if self._linear else math.log(value) if value > TINY else math.log(TINY)
            ordered, window = self._ordered, self._window
            n = len(ordered)
            self.z = 0.0
            if n >= ARMED:
                spread = IQR_TO_SIGMA * (ordered[3 * n >> 2] - ordered[n >> 2])
                z = (x - ordered[n >> 1]) / (spread if spread > self._floor else self._floor)
                self.z = z if -MOST < z < MOST else math.copysign(MOST, z)
            if n == WINDOW:
                del ordered[bisect_left(ordered, window.popleft())]
            window.append(x)
            insort(ordered, x)
        faded = FADE * self.fast
        self.fast = self.z if self.z > faded else faded

    def features(self) -> list[float]:
        """By `SHAPES`."""
        return [math.log1p(self.z) if self.z > 0 else 0.0, math.log1p(self.fast) if self.fast > 0 else 0.0]

    def to_dict(self) -> dict[str, Any]:
        """The state as JSON types."""
        return {"window": list(self._window), "z": self.z, "fast": self.fast}

    @classmethod
    def from_dict(cls, slot: Slot, data: Mapping[str, Any]) -> Track:
        """The track that `to_dict` wrote."""
        track = cls(slot)
        track._window.extend(data["window"])
        track._ordered = sorted(data["window"])
        track.z, track.fast = data["z"], data["fast"]
        return track


def feature_names(signals: Sequence[Slot]) -> tuple[str, ...]:
    """`<slot>/<shape>` of each feature of a model, in its order."""
    return tuple(f"{slot}/{shape}" for slot in signals for shape in SHAPES)


def features_of(tracks: Mapping[Slot, Track], signals: Sequence[Slot]) -> list[float]:
    """In the order of `feature_names`."""
    found: list[float] = []
    for slot in signals:
        found += tracks[slot].features()
    return found


class Line(NamedTuple):
    """log-odds = intercept + sum coef x, of features as they are."""

    intercept: float
    coef: tuple[float, ...]

    def log_odds(self, x: Sequence[float]) -> float:
        """Of one row."""
        return sum(map(mul, self.coef, x), self.intercept)


class Hazard(NamedTuple):
    """The model for one set of signals: a line for each k of `WITHIN`; `usual`: the features' means over the corpus;
    `base`: the share of the corpus's steps that were followed by an onset within k."""

    signals: tuple[Slot, ...]
    usual: tuple[float, ...]
    base: tuple[float, ...]
    lines: tuple[Line, ...]


def probability(log_odds: float) -> float:
    """1 / (1 + exp(-log_odds)), without overflow."""
    return 0.5 * (1 + math.tanh(0.5 * log_odds))


def model_for(hazards: Sequence[Hazard], there: frozenset[Slot]) -> Hazard | None:
    """The model with the most signals of which all are there; None without a loss."""
    fitting = [hazard for hazard in hazards if there.issuperset(hazard.signals)]
    return max(fitting, key=lambda hazard: len(hazard.signals), default=None)


# ------------------------------------------------------------------------------------------------------- the fit


class Fitted(NamedTuple):
    """A calibrated line over features, as arrays: `log_odds` of rows [N, C]."""

    intercept: float
    coef_C: np.ndarray

    def log_odds(self, x_NC: np.ndarray) -> np.ndarray:
        return self.intercept + x_NC @ self.coef_C


def fit_line(x_NC: np.ndarray, y_N: np.ndarray, *, penalty: float) -> Fitted:
    """Ridge logistic regression (`logistic.fit_logistic`) as a line over features as they are."""
    from aftershock.forecast.logistic import fit_logistic

    fit = fit_logistic(x_NC, y_N, penalty=penalty)
    coef_C = fit.coef_C / fit.scale_C
    return Fitted(fit.intercept - float(coef_C @ fit.center_C), coef_C)


def calibrated(line: Fitted, log_odds_N: np.ndarray, y_N: np.ndarray) -> Fitted:
    """The line with its log-odds stretched and moved so that they fit `y_N` where `log_odds_N` were given for rows
    that their model had not seen (Platt 1999). A slope below 0 would turn it over: then only the intercept moves."""
    stretch = fit_line(log_odds_N[:, None], y_N, penalty=1e-6)
    slope = float(stretch.coef_C[0])
    if slope <= 0:
        import numpy as np

        share = float(y_N.mean())
        return Fitted(math.log(share / (1 - share)), np.zeros_like(line.coef_C))
    return Fitted(stretch.intercept + slope * line.intercept, slope * line.coef_C)


# ------------------------------------------------------------------------------------------------------ on disk


def write_hazards(folder: Path, hazards: Sequence[Hazard], *, made: Mapping[str, Any]) -> Path:
    """Write the models into `folder`, in place of older ones; `made` says by what."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    models = [
        {
            "signals": list(one.signals),
            "usual": [_digits(value) for value in one.usual],
            "base": [_digits(value) for value in one.base],
            "lines": [
                {"intercept": _digits(line.intercept), "coef": [_digits(value) for value in line.coef]}
                for line in one.lines
            ],
        }
        for one in hazards
    ]
    data = {"schema": SCHEMA, "within": list(WITHIN), "shapes": list(SHAPES), "made": dict(made), "models": models}
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace('{"signals"', '\n{"signals"')
    atomic_write(path, (text + "\n").encode("ascii"))
    return path


@functools.cache
def read_hazards(folder: Path | None = None) -> tuple[Hazard, ...]:
    """The models of `folder`, or the package's own. Raises ValueError when they are missing or damaged."""
    own = importlib.resources.files("aftershock.forecast") / "records" / NAME
    path = own if folder is None else folder / NAME
    if not path.is_file():
        raise ValueError(f"{path}: no live forecast is on record; make one with: aftershock bench precursors --rerun")
    try:
        return _parsed(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not the models of the live forecast ({error}); restore the file") from None


def checkout_folder() -> Path | None:
    """Where the package's models lie when it runs from a source checkout; None when it is installed elsewhere."""
    return in_checkout("forecast/records")


def _parsed(data: Mapping[str, Any]) -> tuple[Hazard, ...]:
    if data["schema"] != SCHEMA or tuple(data["within"]) != WITHIN or tuple(data["shapes"]) != SHAPES:
        raise ValueError(f"schema {data['schema']!r} with other features; this version reads {SCHEMA}")
    hazards = []
    for one in data["models"]:
        lines = tuple(Line(line["intercept"], tuple(line["coef"])) for line in one["lines"])
        hazard = Hazard(tuple(one["signals"]), tuple(one["usual"]), tuple(one["base"]), lines)
        if any(len(line.coef) != len(feature_names(hazard.signals)) for line in lines) or len(lines) != len(WITHIN):
            raise ValueError(f"the model of {', '.join(hazard.signals)} has another number of coefficients")
        hazards.append(hazard)
    return tuple(hazards)


def _digits(value: float) -> float:
    """Six digits: far more than the fit knows."""
    return float(f"{value:.6g}")
