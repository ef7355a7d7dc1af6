"""Every number of the report as one plain dict, straight from the store: `report.json`, and all that the page reads.

Numbers that are not finite are null. Series are thinned (`signals`); losses and sensitivities are not rounded.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from aftershock.report.groups import FAILS, Judged, RunFacts, judge, ordered_sizes
from aftershock.report.headline import write_headline
from aftershock.report.settings import compare_settings
from aftershock.report.signals import EVAL_LOSS, LOGIT, LOSS, page_signals, read_key_series, read_series
from aftershock.report.words import arm_words
from aftershock.store.reader import StatSeries
from aftershock.store.study import Study, StudyRow

SCHEMA = 1

Series = Mapping[str, StatSeries]


def study_numbers(study_folder: str | Path, *, series: bool = True) -> dict[str, Any]:
    """All numbers of the study in `study_folder` (see the keys below). Raises ValueError where there is no study.

    Keys: `study`, `headline`, `definitions`, `counts`, `sizes`, `arms`, `rates`, `seeds`, `groups` (final loss per
    rate and LR sensitivity of each size and arm), `runs`, `settings`, `events`, `series` (per run, thinned; empty with
    `series=False`, which is several times quicker).
    """
    study = Study(study_folder)
    rows = study.rows()
    if not rows:
        raise ValueError(f"{study_folder}: the study lists no runs, so there is nothing to report")
    recorded: dict[str, Series] = {}
    configs: dict[str, dict[str, Any]] = {}
    events: list[dict[str, Any]] = []
    for row in rows:
        if row.status == "missing":
            continue
        reader = study.reader(row.ref.run_id)
        recorded[row.ref.run_id] = read_series(reader) if series else read_key_series(reader)
        configs[row.ref.run_id] = reader.config
        events += [
            {"run_id": row.ref.run_id, "step": event.step, "kind": event.kind, "data": _clean(event.data)}
            for event in reader.events()
        ]
    facts = [_facts(row, recorded.get(row.ref.run_id, {})) for row in rows]
    judged = judge(facts)
    settings = compare_settings(
        configs, {run.run_id: {"arm": run.arm, "size": run.size, "rate": run.lr, "seed": run.seed} for run in facts}
    )
    arms = list(dict.fromkeys(run.arm for run in facts))
    words = arm_words({arm: settings.by_arm.get(arm, {}) for arm in arms})
    main, details = write_headline(judged.groups, facts, judged.outcomes, words)
    signals = page_signals(recorded if series else {})
    return _clean({
        "schema": SCHEMA,
        "study": {"name": study.name, "title": study.title, "folder": study.place.name},
        "headline": {"main": main, "details": details},
        "definitions": _definitions(),
        "counts": _counts(facts, judged),
        "sizes": _sizes(facts),
        "arms": [{"arm": arm, "words": words[arm].full, "settings": settings.by_arm.get(arm, {})} for arm in arms],
        "rates": sorted({run.lr for run in facts}),
        "seeds": sorted({run.seed for run in facts}),
        "groups": [dataclasses.asdict(group) for group in judged.groups],
        "runs": [dataclasses.asdict(run) | {"outcome": judged.outcomes[run.run_id]} for run in facts],
        "settings": dataclasses.asdict(settings),
        "events": events,
        "series": {
            "names": signals.names,
            "left_out": signals.left_out,
            "loss": LOSS,
            "logit": LOGIT,
            "runs": signals.runs,
        },
    })  # fmt: skip


def _facts(row: StudyRow, series: Series) -> RunFacts:
    """One run as the report judges it; what `done.json` does not hold yet is taken from the series."""
    summary = row.summary or {}
    initial = summary.get("initial_loss")
    if initial is None and EVAL_LOSS in series:
        steps, values = series[EVAL_LOSS]
        initial = float(values[0]) if len(steps) and steps[0] == 0 else None
    last = max((int(steps[-1]) + 1 for steps, _ in series.values() if len(steps)), default=None)
    return RunFacts(
        run_id=row.ref.run_id,
        size=row.ref.size,
        arm=row.ref.arm,
        lr=row.ref.lr,
        seed=row.ref.seed,
        status=row.status,
        final_loss=summary.get("final_loss"),
        final_train_loss=summary.get("final_train_loss"),
        initial_loss=initial,
        diverged_step=summary.get("diverged_step"),
        steps=summary.get("steps", last),
        tokens=summary.get("tokens"),
        num_params=summary.get("num_params"),
        num_block_params=summary.get("num_block_params"),
        seconds=summary.get("seconds"),
        peak_logit=_peak(series.get(LOGIT)),
    )


def _peak(series: StatSeries | None) -> float | None:
    """Largest finite value over training; None where it was never measured."""
    if series is None:
        return None
    finite = series.values[np.isfinite(series.values)]
    return float(finite.max()) if len(finite) else None


def _sizes(facts: list[RunFacts]) -> list[dict[str, Any]]:
    sizes: list[dict[str, Any]] = []
    for size in ordered_sizes(facts):
        own = [run for run in facts if run.size == size]
        params = next((run.num_params for run in own if run.num_params is not None), None)
        blocks = next((run.num_block_params for run in own if run.num_block_params is not None), None)
        sizes.append({"size": size, "num_params": params, "num_block_params": blocks})
    return sizes


def _counts(facts: list[RunFacts], judged: Judged) -> dict[str, Any]:
    statuses = [run.status for run in facts]
    ends = list(judged.outcomes.values())
    return {
        "runs": len(facts),
        "status": {status: statuses.count(status) for status in dict.fromkeys(statuses)},
        "outcome": {end: ends.count(end) for end in dict.fromkeys(ends)},
        "tokens": sum(run.tokens or 0 for run in facts),
        "seconds": sum(run.seconds or 0.0 for run in facts),
    }


def _definitions() -> dict[str, str]:
    return {
        "fails": FAILS,
        "loss": "Final loss: mean cross-entropy on the held-out split at the end of training, in nats. A point is the "
        "mean over seeds, each capped at the initial loss l0; a diverged seed counts as l0. The band spans the seeds.",
        "sensitivity": "LR sensitivity: mean over the learning rates of min(loss, l0), minus the lowest loss, in nats "
        "(Wortsman et al. 2023, section 2.2). 0 means that the rate does not matter. It is blind to the level of the "
        "loss, so read it beside the curves. Interval: 95 %, bootstrap over seeds.",
        "logit": "Largest attention logit of block 0, over batch, heads, queries and keys, anywhere in training; the "
        "largest over seeds. In the paper's large runs every point above 1e4 diverged.",
        "size": "Parameters without embedding and head, 12 L d^2.",
    }


def _clean(value: Any) -> Any:
    """Plain JSON: no NaN, no infinity, no numpy scalars, no tuples."""
    if isinstance(value, Mapping):
        return {str(key): _clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
