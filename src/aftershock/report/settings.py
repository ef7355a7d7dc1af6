"""The settings of a study's runs: what all share, what differs and with what, and what sets the arms apart. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aftershock.config import leaves

LABELS = ("arm", "size", "rate", "seed")
"""What a study names its runs by; the first that explains a setting is the one given."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Dotted settings. `common` is equal in every run; `by_run` holds each run's other settings; `by_arm` those that
    set arms apart. `differing`: key -> {"varies_with": one of `LABELS` or "", "values": [{"value", "runs", "labels"}]},
    with in `labels` the arms, sizes, .. that have the value (empty where no label explains the setting)."""

    common: dict[str, Any]
    differing: dict[str, dict[str, Any]]
    by_run: dict[str, dict[str, Any]]
    by_arm: dict[str, dict[str, Any]]


def compare_settings(configs: Mapping[str, Mapping[str, Any]], labels: Mapping[str, Mapping[str, Any]]) -> Settings:
    """`configs`: run_id -> nested config; `labels`: run_id -> {label: value} for each of `LABELS`.

    A setting missing from some runs counts as a value of its own, written "(not set)".
    """
    flat = {run: leaves(config) for run, config in configs.items()}
    keys = list(dict.fromkeys(key for settings in flat.values() for key in settings))
    values = {key: {run: flat[run].get(key, "(not set)") for run in flat} for key in keys}
    differs = [key for key in keys if len(_distinct(list(values[key].values()))) > 1]
    arms = list(dict.fromkeys(labels[run]["arm"] for run in flat))
    by_arm: dict[str, dict[str, Any]] = {arm: {} for arm in arms}
    for key in differs:
        if _explains("arm", values[key], labels):
            for run, value in values[key].items():
                by_arm[labels[run]["arm"]][key] = value
    return Settings(
        common={key: next(iter(values[key].values())) for key in keys if key not in differs},
        differing={key: _spread(values[key], labels) for key in differs},
        by_run={run: {key: settings[key] for key in settings if key in differs} for run, settings in flat.items()},
        by_arm=by_arm,
    )


def _explains(label: str, values: Mapping[str, Any], labels: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether runs with the same label always have the same value."""
    seen: dict[str, set[str]] = {}
    for run, value in values.items():
        seen.setdefault(repr(labels[run][label]), set()).add(repr(value))
    return all(len(found) == 1 for found in seen.values())


def _spread(values: Mapping[str, Any], labels: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Each distinct value with the number of runs and the labels that have it."""
    label = next((label for label in LABELS if _explains(label, values, labels)), "")
    rows: list[dict[str, Any]] = []
    for value in _sorted(_distinct(list(values.values()))):
        runs = [run for run, own in values.items() if repr(own) == repr(value)]
        owners = _distinct([labels[run][label] for run in runs]) if label else []
        rows.append({"value": value, "runs": len(runs), "labels": owners})
    return {"varies_with": label, "values": rows}


def _distinct(values: Sequence[Any]) -> list[Any]:
    """Distinct values by their text: lists have no hash, and True is not 1 here."""
    return list({repr(value): value for value in values}.values())


def _sorted(values: list[Any]) -> list[Any]:
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
    return sorted(values) if numbers else sorted(values, key=repr)
