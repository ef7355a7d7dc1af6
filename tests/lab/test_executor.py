"""The executor: what it times and how it deals the work."""

from __future__ import annotations

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from aftershock.lab.data import build_batches
from aftershock.lab.executor import START_S, FleetTiming, plan, time_fleet
from aftershock.lab.recipe import DecoderConfig, LanguageData, OptimConfig, RunConfig, fleet_key

TINY = RunConfig(
    data=LanguageData(context=16),
    model=DecoderConfig(width=8, depth=1, heads=1),
    optim=OptimConfig(warmup_steps=0),
    batch_size=1,
)


def test_contract_every_run_is_in_one_job_and_no_fleet_is_larger_than_the_best() -> None:
    @given(
        num_runs=st.integers(1, 60),
        best=st.sampled_from([1, 2, 4, 8, 16]),
        num_processes=st.integers(1, 8),
        seconds=st.floats(1e-4, 1.0),
    )
    def check(num_runs: int, best: int, num_processes: int, seconds: float) -> None:
        configs = [dataclasses.replace(TINY, seed=i) for i in range(num_runs)]
        timings = {fleet_key(TINY): FleetTiming({1: seconds * 2, best: seconds}, best)}
        chunks = plan(configs, num_processes=num_processes, timings=timings)
        assert sorted(i for chunk in chunks for i in chunk.indices) == list(range(num_runs))
        assert all(1 <= chunk.fleet_size <= best for chunk in chunks)
        assert [c.seconds for c in chunks] == sorted((c.seconds for c in chunks), reverse=True)

    check()


def test_a_small_group_is_one_job_and_a_long_one_is_shared_out() -> None:
    configs = [dataclasses.replace(TINY, seed=i) for i in range(8)]
    quick = {fleet_key(TINY): FleetTiming({1: START_S / TINY.steps / 100}, 1)}
    assert len(plan(configs, num_processes=2, timings=quick)) == 1
    slow = {fleet_key(TINY): FleetTiming({1: START_S / TINY.steps * 10}, 1)}
    assert len(plan(configs, num_processes=2, timings=slow)) >= 4


def test_timing_tries_one_alone_and_finds_that_tiny_fleets_pay() -> None:
    configs = [dataclasses.replace(TINY, seed=i) for i in range(8)]
    timing = time_fleet(configs, batches=build_batches(TINY.data))
    assert 1 in timing.seconds
    assert timing.seconds[timing.best] == min(timing.seconds.values())
    assert timing.best > 1, f"at width 8 and 16 tokens a step a fleet is several times faster: {timing.seconds}"
