"""Two published spikes as recorded numbers: BLOOM-176B (nine iterations) and BigScience-104B (two).

What came before them is not on record, so quiet synthetic points stand in front: false alarms are those of this noise
only. Must not import torch or numpy.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from aftershock.bench.sweeps import make_rule
from aftershock.signals.detect.registry import DETECTORS
from aftershock.signals.detect.roles import Role
from aftershock.signals.detect.rule import ALARMS

SEEDS = range(200)
QUIET = 300
BLOOM_FIRST, BLOOM_PEAK = 31214, 31219
BLOOM: dict[Role, tuple[float, ...]] = {
    "loss": (2.199, 2.220, 2.595, 2.242, 2.345, 5.098, 3.492, 3.213, 2.805),
    "gradient": (0.242, 0.947, 2.39, 15.9, 145.0, 960.0, 353.0, 379.0, 650.0),
}
"""BLOOM-176B, iterations 31214 to 31222; the loss peaks at 31219 (BigScience chronicles)."""
BIGSCIENCE_PEAK = 11448
BIGSCIENCE: dict[Role, tuple[float, ...]] = {"loss": (3.11, 7.71), "gradient": (262_623.0,)}
"""BigScience 104B, iterations 11447 and 11448: the gradient norm jumps from 12,952, and the loss one step later."""

RecordName = Literal["bloom", "bigscience"]


class OnRecord(NamedTuple):
    """A detector on one signal of a recorded spike, over the seeds of the quiet part.

    `fired`: share of seeds with an alarm up to the peak; `lead`: steps from the first alarm to the loss peak, median
    where it fired in at least half of the seeds, else None; `false_per_1000` quiet steps, alarming steps counted.
    """

    signal: str
    fired: float
    lead: float | None
    false_per_1000: float


def on_record(record: RecordName, detector: str, settings: Mapping[str, Any] | None = None) -> list[OnRecord]:
    """`detector` on the loss and the gradient norm of a recorded spike, those that it reads."""
    return [
        _over_seeds(record, role, detector, settings or {})
        for role in ("loss", "gradient")
        if role in DETECTORS[detector].reads
    ]


def quiet_part(record: RecordName, role: Role, seed: int) -> list[float]:
    """Points to stand before the recorded ones.

    BLOOM: loss N(2.21, 0.02), gradient norm 0.235 + |N(0, 0.03)|, all losses drawn first. 104B: the last level on
    record, with a spread of 1 % and 10 %.
    """
    rng = random.Random(seed)
    if record == "bloom":
        loss = [rng.gauss(2.21, 0.02) for _ in range(QUIET)]
        return loss if role == "loss" else [0.235 + abs(rng.gauss(0, 0.03)) for _ in range(QUIET)]
    loss = [3.11 * (1 + 0.01 * rng.gauss(0, 1)) for _ in range(QUIET)]
    return loss if role == "loss" else [12_952 * (1 + 0.1 * rng.gauss(0, 1)) for _ in range(QUIET)]


def _over_seeds(record: RecordName, role: Role, detector: str, settings: Mapping[str, Any]) -> OnRecord:
    values, before_peak = _recorded(record, role)
    rule = make_rule(detector, role, settings)
    false, leads = 0, []
    for seed in SEEDS:
        state = rule.init()
        for value in quiet_part(record, role, seed):
            state, verdict = rule.update(state, value)
            false += verdict in ALARMS
        for index, value in enumerate(values[: before_peak + 1]):
            state, verdict = rule.update(state, value)
            if verdict in ALARMS:
                leads.append(before_peak - index)
                break
    often = 2 * len(leads) >= len(SEEDS)
    return OnRecord(
        role, len(leads) / len(SEEDS), statistics.median(leads) if often else None, 1000 * false / (QUIET * len(SEEDS))
    )


def _recorded(record: RecordName, role: Role) -> tuple[Sequence[float], int]:
    """The values on record, and how many steps after the first of them the loss peaks."""
    if record == "bloom":
        return BLOOM[role], BLOOM_PEAK - BLOOM_FIRST
    return BIGSCIENCE[role], 1
