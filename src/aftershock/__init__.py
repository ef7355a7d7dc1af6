"""Aftershock: a laboratory and a safety net for training instability.

The public names, loaded when first used, so that `import aftershock` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from aftershock._version import __version__

if TYPE_CHECKING:
    from aftershock.forecast.sensitivity import lr_sensitivity
    from aftershock.guard.guard import Guard
    from aftershock.lab.fleet import Fleet
    from aftershock.lab.interventions import apply
    from aftershock.lab.launch import LocalLauncher
    from aftershock.lab.recipe import (
        DecoderConfig,
        LanguageData,
        MlpConfig,
        ModularData,
        OptimConfig,
        PrecisionConfig,
        RunConfig,
    )
    from aftershock.lab.sweep import SweepSpec, run_sweep
    from aftershock.report.page import write_report
    from aftershock.store.reader import RunReader
    from aftershock.store.study import Study
    from aftershock.store.writer import RunWriter

_HOMES = {
    "DecoderConfig": "lab.recipe",
    "Fleet": "lab.fleet",
    "Guard": "guard.guard",
    "LanguageData": "lab.recipe",
    "LocalLauncher": "lab.launch",
    "MlpConfig": "lab.recipe",
    "ModularData": "lab.recipe",
    "OptimConfig": "lab.recipe",
    "PrecisionConfig": "lab.recipe",
    "RunConfig": "lab.recipe",
    "RunReader": "store.reader",
    "RunWriter": "store.writer",
    "Study": "store.study",
    "SweepSpec": "lab.sweep",
    "apply": "lab.interventions",
    "lr_sensitivity": "forecast.sensitivity",
    "run_sweep": "lab.sweep",
    "write_report": "report.page",
}

__all__ = [
    "DecoderConfig",
    "Fleet",
    "Guard",
    "LanguageData",
    "LocalLauncher",
    "MlpConfig",
    "ModularData",
    "OptimConfig",
    "PrecisionConfig",
    "RunConfig",
    "RunReader",
    "RunWriter",
    "Study",
    "SweepSpec",
    "__version__",
    "apply",
    "lr_sensitivity",
    "run_sweep",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'aftershock' has no attribute {name!r}")
    return getattr(importlib.import_module(f"aftershock.{_HOMES[name]}"), name)
