"""Spontaneous specimens: they spike by themselves, and their twins, without the cause, do not."""

from __future__ import annotations

import math

import pytest
import torch

from aftershock.lab.zoo.labels import Spike, label
from aftershock.lab.zoo.nets import ByteLM
from aftershock.lab.zoo.specimen import Specimen
from aftershock.lab.zoo.spontaneous import EDGE_OF_STABILITY, SPONTANEOUS

SEEDS = range(10)

by_name = pytest.mark.parametrize("specimen", SPONTANEOUS, ids=lambda specimen: specimen.name)


def _losses(specimen: Specimen, *, seed: int, faulty: bool = True, steps: int | None = None) -> list[float]:
    """Trained by a bare loop."""
    work = specimen.build(seed, faulty=faulty).workload
    losses: list[float] = []
    for index in range(steps or specimen.steps):
        losses.append(work.backward(index).item())
        if not math.isfinite(losses[-1]):
            break
        if work.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(work.model.parameters(), work.clip_norm)
        work.optimizer.step()
        if work.scheduler is not None:
            work.scheduler.step()
        work.optimizer.zero_grad()
    return losses


def _spikes(specimen: Specimen, *, seed: int, faulty: bool = True) -> list[Spike]:
    return label(_losses(specimen, seed=seed, faulty=faulty))


def test_names_differ() -> None:
    """contract."""
    assert len({specimen.name for specimen in SPONTANEOUS}) == len(SPONTANEOUS)
    assert {specimen.kind for specimen in SPONTANEOUS} == {"spontaneous"}


@by_name
def test_a_build_depends_on_its_seed_alone(specimen: Specimen) -> None:
    """contract: the same three losses twice, others for another seed; nothing strikes from outside."""
    first = _losses(specimen, seed=0, steps=3)
    assert first == _losses(specimen, seed=0, steps=3)
    assert first != _losses(specimen, seed=1, steps=3)
    assert specimen.build(0).disturbance is None


@by_name
def test_the_twin_starts_with_the_same_net_and_batch(specimen: Specimen) -> None:
    """equivalence: but for the precision or the norm that is the difference, step 0 has the same loss."""
    cause, twin = (specimen.build(0, faulty=faulty).workload for faulty in (True, False))
    shapes = {
        name: p.shape for name, p in twin.model.named_parameters() if "norm_q" not in name and "norm_k" not in name
    }
    assert shapes == {name: p.shape for name, p in cause.model.named_parameters()}
    for name, p in cause.model.named_parameters():
        assert torch.equal(p.double(), twin.model.get_parameter(name).double())
    # bf16 keeps 8 bits; a norm over q and k moves a fresh model's attention a little
    assert twin.backward(0).item() == pytest.approx(cause.backward(0).item(), rel=0.01)


@by_name
def test_held_out_loss_is_of_other_data(specimen: Specimen) -> None:
    """contract: a finite number, not the training loss, and reading it changes no mode."""
    work = specimen.build(0).workload
    assert work.held_out is not None
    held_out = work.held_out(work.model)
    assert math.isfinite(held_out)
    assert held_out != work.backward(0).item()
    assert work.model.training


def test_the_edge_of_stability_is_crossed() -> None:
    """planted: the cheapest specimen in full: calm for 300 steps, then a spike; at half the rate none."""
    spikes = _spikes(EDGE_OF_STABILITY, seed=0)
    assert spikes
    assert spikes[0].onset >= 300
    assert _spikes(EDGE_OF_STABILITY, seed=0, faulty=False) == []


def test_the_logit_growth_twin_differs_by_qk_norm_alone() -> None:
    """contract: bounded logits are the one thing that its twin has more."""
    (specimen,) = (one for one in SPONTANEOUS if one.name == "logit_growth")
    found = []
    for faulty in (True, False):
        model = specimen.build(0, faulty=faulty).workload.model
        assert isinstance(model, ByteLM)
        found.append({name for name, _ in model.named_parameters()})
    assert {name.split(".")[-2] for name in found[1] - found[0]} == {"norm_q", "norm_k"}


@pytest.mark.study
@by_name
def test_eight_of_ten_seeds_spike_and_the_twins_do_not(specimen: Specimen) -> None:
    """planted: the specimen's claim, over seeds 0 to 9; at most two of ten twins may."""
    with_cause = [_spikes(specimen, seed=seed) for seed in SEEDS]
    assert sum(map(bool, with_cause)) >= 8
    without = [_spikes(specimen, seed=seed, faulty=False) for seed in SEEDS]
    assert sum(map(bool, without)) <= 2
