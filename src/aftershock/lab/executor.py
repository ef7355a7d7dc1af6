"""How many runs train together: K from a short timing, so that a fleet is used only where it is faster.

Measured on one CPU thread, K replicas in lockstep beat K separate runs at width 16 and lose nothing at width 128: the
crossing depends on the machine, so it is timed. K = 1 is always among the candidates.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from aftershock.lab.data import Batches
from aftershock.lab.fleet import Fleet
from aftershock.lab.recipe import RunConfig, fleet_key

CANDIDATES = (1, 2, 4, 8, 16, 32)
MIN_GAIN = 0.03
"""A larger fleet must be this much faster a replica: below, it only costs memory and splits worse over processes."""
TIMING_S = 0.25


class Chunk(NamedTuple):
    """Indices of the runs that train as one fleet, and the seconds it should take."""

    indices: tuple[int, ...]
    seconds: float


class FleetTiming(NamedTuple):
    """Seconds a step and replica at each fleet size tried, and the size to use."""

    seconds: dict[int, float]
    best: int


def time_fleet(configs: Sequence[RunConfig], *, batches: Batches) -> FleetTiming:
    """Time a few steps at growing K until it stops paying. Trains throw-away weights; writes nothing."""
    seconds: dict[int, float] = {}
    best = 1
    for size in CANDIDATES:
        if size > len(configs):
            break
        seconds[size] = _seconds_a_replica_step(configs[:size], batches)
        if seconds[size] < seconds[best] * (1 - MIN_GAIN):
            best = size
        elif seconds[size] > seconds[best] * (1 + 2 * MIN_GAIN):
            break
    return FleetTiming(seconds, best)


def plan(configs: Sequence[RunConfig], *, num_processes: int, timings: dict[RunConfig, FleetTiming]) -> list[Chunk]:
    """Chunks of all configs, longest first. `timings` maps each fleet key to its timing.

    A group is cut into equal chunks of at most the best K, and into at least as many as there are processes when it is
    alone: a core that idles costs more than a smaller fleet.
    """
    groups: dict[RunConfig, list[int]] = {}
    for index, config in enumerate(configs):
        groups.setdefault(fleet_key(config), []).append(index)
    chunks: list[Chunk] = []
    for key, indices in groups.items():
        timing = timings[key]
        share = -(-num_processes // len(groups))
        num_chunks = min(len(indices), max(share, -(-len(indices) // timing.best)))
        for i in range(num_chunks):
            part = tuple(indices[i::num_chunks])
            nearest = max((k for k in timing.seconds if k <= len(part)), default=1)
            chunks.append(Chunk(part, timing.seconds[nearest] * len(part) * configs[indices[0]].steps))
    return sorted(chunks, key=lambda chunk: -chunk.seconds)


def _seconds_a_replica_step(configs: Sequence[RunConfig], batches: Batches) -> float:
    fleet = Fleet(configs, batches=batches)
    state, _ = fleet.step(fleet.init())
    best, spent = float("inf"), 0.0
    # The fastest of a few: whatever else the machine does only ever adds.
    while spent < TIMING_S:
        started = time.perf_counter()
        state, _ = fleet.step(state)
        took = time.perf_counter() - started
        best, spent = min(best, took), spent + took
    return best / fleet.size
