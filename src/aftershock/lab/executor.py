"""How many runs train together, and how they are dealt to processes: K from a short timing, jobs of even length.

Measured on one CPU thread, K replicas in lockstep beat K separate runs at width 16 and lose nothing at width 128: the
crossing depends on the machine, so it is timed. K = 1 is always a candidate, so a fleet is never the slower way.
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
TIMING_S, MIN_ROUNDS = 0.3, 6
"""Each candidate is stepped for about this long, at least so often."""
JOBS_A_PROCESS = 3
"""More jobs even out the load; fewer start fewer processes, at START_S each."""
START_S = 4.0
"""Seconds a process needs before its first step: mostly loading torch."""


class Chunk(NamedTuple):
    """One job: its runs, the size of the fleets they train in one after another, and the seconds it should take."""

    indices: tuple[int, ...]
    fleet_size: int
    seconds: float


class FleetTiming(NamedTuple):
    """Seconds a step and replica at each fleet size tried, and the size to use."""

    seconds: dict[int, float]
    best: int


def time_fleet(configs: Sequence[RunConfig], *, batches: Batches) -> FleetTiming:
    """Time steps at growing K until it stops paying. Trains throw-away weights; writes nothing."""
    seconds: dict[int, float] = {}
    best = 1
    for size in [k for k in CANDIDATES if k <= len(configs)]:
        # Beside the best so far, in turns: the machine's mood then falls on both alike.
        rivals = [Fleet(configs[:k], batches=batches) for k in {best, size}]
        for fleet, took in zip(rivals, _seconds_in_turns(rivals), strict=True):
            seconds[fleet.size] = min(seconds.get(fleet.size, took), took)
        if seconds[size] < seconds[best] * (1 - MIN_GAIN):
            best = size
        elif seconds[size] > seconds[best] * (1 + 2 * MIN_GAIN):
            break
    return FleetTiming(seconds, best)


def plan(configs: Sequence[RunConfig], *, num_processes: int, timings: dict[RunConfig, FleetTiming]) -> list[Chunk]:
    """Jobs for all configs, longest first. `timings` maps each fleet key to its timing.

    A job holds runs of one key, in fleets of at most the best K. A group is cut into jobs of about one
    `num_processes * JOBS_A_PROCESS`-th of all the work, never shorter than a process takes to start.
    """
    groups: dict[RunConfig, list[int]] = {}
    for index, config in enumerate(configs):
        groups.setdefault(fleet_key(config), []).append(index)
    seconds_a_run = {key: timings[key].seconds[timings[key].best] * key.steps for key in groups}
    total_s = sum(seconds_a_run[key] * len(indices) for key, indices in groups.items())
    target_s = max(total_s / (num_processes * JOBS_A_PROCESS), START_S)
    chunks: list[Chunk] = []
    for key, indices in groups.items():
        wanted = round(seconds_a_run[key] * len(indices) / target_s)
        num_jobs = min(len(indices), max(1, wanted))
        for i in range(num_jobs):
            part = tuple(indices[i::num_jobs])
            num_fleets = -(-len(part) // timings[key].best)
            size = -(-len(part) // num_fleets)
            chunks.append(Chunk(part, size, seconds_a_run[key] * len(part)))
    return sorted(chunks, key=lambda chunk: -chunk.seconds)


def _seconds_in_turns(fleets: Sequence[Fleet]) -> list[float]:
    """Fastest seconds a replica-step of each fleet: whatever else the machine does only ever adds."""
    states = [fleet.step(fleet.init())[0] for fleet in fleets]
    best = [float("inf")] * len(fleets)
    spent, rounds = 0.0, 0
    while rounds < MIN_ROUNDS or spent < TIMING_S * len(fleets):
        for i, fleet in enumerate(fleets):
            started = time.perf_counter()
            states[i], _ = fleet.step(states[i])
            took = time.perf_counter() - started
            best[i], spent = min(best[i], took / fleet.size), spent + took
        rounds += 1
    return best
