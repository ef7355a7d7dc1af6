"""The detectors by name: ours first, then the rules of other tools, by their number in the survey."""

from __future__ import annotations

from typing import Any

from aftershock.config import nearest
from aftershock.signals.detect.peers import limits, ratios, sigmas
from aftershock.signals.detect.robust import Robust
from aftershock.signals.detect.rule import Rule

OURS = "robust"

DETECTORS: dict[str, type[Rule[Any]]] = {
    OURS: Robust,
    "lightning": ratios.Lightning,  # D1
    "kill-loss-spike": ratios.KillLossSpike,  # D2
    "delayed-mean": ratios.DelayedMean,  # D3
    "megatron": ratios.Megatron,  # D4
    "olmo-skip": sigmas.OlmoSkip,  # D5
    "levanter-skip": sigmas.LevanterSkip,  # D5
    "stability-monitor": sigmas.StabilityMonitor,  # D6
    "spike-score": sigmas.SpikeScore,  # D6b
    "metaseq": ratios.Metaseq,  # D7
    "zclip": sigmas.ZClip,  # D8
    "levanter-update": sigmas.LevanterUpdate,  # D9
    "axolotl": limits.Axolotl,  # D10
    "trainscope": sigmas.Trainscope,  # D11
    "trainscope-z": sigmas.TrainscopeZ,  # D11
    "trainscope-percentile": sigmas.TrainscopePercentile,  # D11
    "flagscale": ratios.FlagScale,  # D12
    "internevo": ratios.InternEvo,  # D12
    "mindformers": limits.MindFormers,  # D13
    "dlib": limits.Dlib,  # D14
    "gradient-spike-score": limits.GradientSpikeScore,  # D15
    "spam": limits.Spam,  # D15
    "rms-ratio": limits.RmsRatio,  # D16
    "curvature": limits.CurvatureEdge,  # D17
    "logit-cap": limits.LogitCap,  # D18
    "marin-update": limits.MarinUpdate,  # D19
    "median-mad": sigmas.MedianMad,  # D20
}
"""`DETECTORS[name](**settings)` makes one; every rule has a default for each setting."""


def detector(name: str, **settings: Any) -> Rule[Any]:
    """The detector `name`. Raises ValueError on an unknown name, with the nearest one."""
    if name not in DETECTORS:
        raise ValueError(f"no detector {name!r}{nearest(name, DETECTORS)}")
    return DETECTORS[name](**settings)
