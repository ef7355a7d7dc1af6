"""The registry, and what its specimens promise: planted ones spike where they say, twins and healthy runs do not."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from aftershock.causes import CAUSES
from aftershock.lab.zoo.labels import Spike, label
from aftershock.lab.zoo.registry import UNSEEN, ZOO, specimen
from aftershock.lab.zoo.specimen import Specimen, Trial

ALL = {**ZOO, **UNSEEN}
PLANTED = [name for name, each in ALL.items() if each.kind == "planted"]
HEALTHY = [name for name, each in ALL.items() if each.kind == "healthy"]
SEEDS = range(10)
NEAR = 5
"""Steps from the fault to the onset of its spike, at most: a rate acts on the next loss, an update's momentum later."""


def _losses(trial: Trial, steps: int) -> list[float]:
    work, disturbance = trial
    losses = []
    for index in range(steps):
        if disturbance is not None:
            disturbance.before_forward(index)
        losses.append(work.backward(index))
        if disturbance is not None:
            disturbance.after_backward(index)
        if work.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(work.model.parameters(), work.clip_norm)
        work.optimizer.step()
        if work.scheduler is not None:
            work.scheduler.step()
        work.optimizer.zero_grad()
    return [float(loss) for loss in losses]


def _run(name: str, *, seed: int, faulty: bool, steps: int | None = None) -> list[float]:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)  # dropout's
        return _losses(ALL[name].build(seed, faulty=faulty), steps or ALL[name].steps)


def _of_the_fault(losses: list[float], each: Specimen) -> list[Spike]:
    assert each.onset is not None
    return [spike for spike in label(losses) if 0 <= spike.onset - each.onset <= NEAR]


def test_the_zoo_is_large_enough_and_its_names_agree() -> None:
    """contract."""
    kinds = [each.kind for each in ZOO.values()]
    assert len(kinds) - kinds.count("healthy") >= 12
    assert kinds.count("healthy") >= 6
    assert len(UNSEEN) >= 2
    assert not ZOO.keys() & UNSEEN.keys()
    for name, each in ALL.items():
        assert each.name == name
        assert each.cause in {*CAUSES, "none"}
        assert each.onset is None or 400 <= each.onset <= each.steps - 50
        assert specimen(name) is each


def test_a_name_that_is_not_there_gives_the_nearest() -> None:
    """planted."""
    with pytest.raises(ValueError, match="no specimen 'fliped_bit'; did you mean 'flipped_bit'?"):
        specimen("fliped_bit")


@pytest.mark.parametrize("name", ["garbage_labels", "nan_input", "scaled_rate", "flipped_bit"])
def test_a_regression_spikes_at_its_fault_and_its_twin_does_not(name: str) -> None:
    """planted: one seed of the specimens that cost half a second; all the others are a study, below."""
    each = ALL[name]
    assert each.onset is not None
    faulty, twin = (_run(name, seed=0, faulty=fault, steps=each.onset + 60) for fault in (True, False))
    assert len(_of_the_fault(faulty, each)) == 1
    assert label(twin) == []
    assert faulty[: each.onset] == twin[: each.onset]


@pytest.mark.parametrize("name", PLANTED)
def test_every_batch_and_loss_can_be_made(name: str) -> None:
    """contract: the first steps of a run are finite, and the held-out loss is read without touching the model."""
    work = ALL[name].build(0).workload
    before = {key: value.clone() for key, value in work.model.state_dict().items()}
    assert work.held_out is not None
    assert work.held_out(work.model) == work.held_out(work.model)
    assert work.model.training
    assert all(torch.equal(before[key], value) for key, value in work.model.state_dict().items())
    assert all(map(math.isfinite, _losses(Trial(work, None), 2)))


@pytest.mark.study
@pytest.mark.parametrize("name", PLANTED)
def test_planted_specimens_spike_in_eight_of_ten_seeds_and_twins_in_none(name: str) -> None:
    """planted: by the labels, within five steps of the fault."""
    hits = [len(_of_the_fault(_run(name, seed=seed, faulty=True), ALL[name])) for seed in SEEDS]
    assert sum(map(bool, hits)) >= 8
    assert [label(_run(name, seed=seed, faulty=False)) for seed in SEEDS] == [[]] * len(SEEDS)


@pytest.mark.study
@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_specimens_do_not_spike(name: str) -> None:
    """planted: by the labels, none of ten seeds."""
    found = [label(_run(name, seed=seed, faulty=True)) for seed in SEEDS]
    assert list(itertools.chain(*found)) == []
