"""What may be tuned of each detector: its main threshold with a grid, and where its window is long, a shorter one too.

One literal table. A grid goes from loose to strict and holds the published default. Windows and patience that were made
for runs of 10^5 steps get a second value, so that no rule loses for being blind on the short runs of the zoo. Ours is
also tried without its slow drift, an alarm but no warning of a spike within the horizon. Must not import torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from aftershock.signals.detect.registry import DETECTORS, OURS
from aftershock.signals.detect.robust import robust_for
from aftershock.signals.detect.roles import Role
from aftershock.signals.detect.rule import Rule

NO_DRIFT = 1e9
"""A limit that the drift's sum reaches in no run."""
SIGMAS = (2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 13.0, 17.0, 24.0)
RATIOS = (1.05, 1.1, 1.2, 1.3, 1.5, 1.75, 2.0, 3.0, 5.0, 10.0)


class Sweep(NamedTuple):
    """`field`: the main threshold; `grid`: its values, loose to strict; `variants`: other settings tried with each.

    `steady`: the threshold does not steer the state, and a stricter one alarms on a part of the same steps; then one
    pass over a signal serves the whole grid.
    """

    field: str
    grid: tuple[float, ...]
    variants: tuple[Mapping[str, Any], ...] = ({},)
    steady: bool = False


SWEEPS: dict[str, Sweep] = {
    OURS: Sweep("threshold", (3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 10.0, 13.0, 17.0, 24.0), ({}, {"drift_limit": NO_DRIFT})),
    "lightning": Sweep("rtol", (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)),
    "kill-loss-spike": Sweep("multiplier", RATIOS, ({}, {"patience": 0})),
    "delayed-mean": Sweep(
        "threshold", (1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.5, 10.0, 15.0, 25.0), ({}, {"delay": 100}), steady=True
    ),
    "megatron": Sweep("factor", (0.5, 0.75, 1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0), steady=True),
    "olmo-skip": Sweep("sigmas", SIGMAS, steady=True),
    "levanter-skip": Sweep("sigmas", SIGMAS, steady=True),
    "stability-monitor": Sweep("sigmas", SIGMAS, steady=True),
    "spike-score": Sweep(
        "sigmas", (2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 9.0, 12.0, 16.0, 24.0), ({}, {"window": 128}), steady=True
    ),
    "metaseq": Sweep("threshold", (-1.0, 1.05, 1.1, 1.2, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)),
    "zclip": Sweep("threshold", (1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0, 20.0)),
    "levanter-update": Sweep("sigmas", SIGMAS, steady=True),
    "axolotl": Sweep("limit", (0.05, 0.2, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 7.0, 12.0), ({}, {"patience": 1})),
    "trainscope": Sweep("limit", (3.0, 6.0, 9.0, 12.0, 18.0, 25.0, 35.0, 50.0, 75.0, 120.0)),
    "trainscope-z": Sweep("sigmas", (2.0, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0, 10.0, 13.0, 14.0), steady=True),
    "trainscope-percentile": Sweep("share", (0.05, 0.02, 0.01, 0.005, 0.002, 0.0)),
    "flagscale": Sweep("threshold", (0.05, 0.1, 0.15, 0.2, 0.25, 0.35, 0.5, 1.0, 2.0, 4.0)),
    "internevo": Sweep("threshold", RATIOS, steady=True),
    "mindformers": Sweep("limit", (0.3, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0, 100.0), steady=True),
    "dlib": Sweep("threshold", (0.8, 0.9, 0.95, 0.99, 0.999, 0.9999, 0.99999), ({}, {"every": 8})),
    "gradient-spike-score": Sweep("threshold", (2.0, 3.0, 5.0, 8.0, 12.0, 20.0, 30.0, 50.0, 80.0, 150.0), steady=True),
    "spam": Sweep("threshold", (5.0, 10.0, 25.0, 50.0, 100.0, 300.0, 1000.0, 5000.0, 2e4, 1e5)),
    "rms-ratio": Sweep("limit", (0.2, 0.35, 0.5, 0.7, 1.1, 1.5, 2.3, 3.0, 5.0, 8.0), steady=True),
    "curvature": Sweep("limit", (0.3, 0.5, 0.7, 0.85, 1.0, 1.3, 1.7, 2.5, 4.0, 8.0), ({}, {"sustained": 5})),
    "logit-cap": Sweep("limit", (3.0, 6.0, 10.0, 15.0, 20.0, 30.0, 50.0, 75.0, 100.0, 200.0), steady=True),
    "marin-update": Sweep("factor", (1.2, 1.4, 1.6, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0, 12.0), steady=True),
    "median-mad": Sweep("threshold", (3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 10.0, 13.0, 17.0, 24.0)),
}


def make_rule(name: str, role: Role, settings: Mapping[str, Any]) -> Rule[Any]:
    """The detector `name` for a signal of this role, with `settings` in place of the published ones."""
    base: Any = robust_for(role) if name == OURS else DETECTORS[name]()
    return dataclasses.replace(base, **settings)


def default_of(name: str) -> float:
    """The published value of the main threshold."""
    return getattr(DETECTORS[name](), SWEEPS[name].field)
