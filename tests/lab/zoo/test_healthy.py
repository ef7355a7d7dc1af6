"""Healthy specimens: each changes what it says it changes, and has no fault. (That none spikes: test_registry.py.)"""

from __future__ import annotations

import pytest
import torch

from aftershock.lab.zoo import healthy
from aftershock.lab.zoo.nets import Tokens
from aftershock.lab.zoo.specimen import Specimen, Trial
from aftershock.lab.zoo.workloads import language

SPECIMENS = {each.name: each for each in vars(healthy).values() if isinstance(each, Specimen)}
QUICK = {name: each for name, each in SPECIMENS.items() if name != "fine_tuning"}  # which trains for a second first


def _rates(trial: Trial, steps: list[int]) -> list[float]:
    scheduler = trial.workload.scheduler
    assert scheduler is not None
    seen = []
    for step in range(max(steps) + 1):
        if step in steps:
            seen.append(scheduler.get_last_lr()[0])
        trial.workload.optimizer.step()  # without gradients: nothing moves, and the scheduler sees its order kept
        scheduler.step()
    return seen


@pytest.mark.parametrize("each", QUICK.values(), ids=QUICK)
def test_faulty_means_nothing_and_a_seed_says_all(each: Specimen) -> None:
    """contract: no disturbance, and two builds agree, whatever `faulty` says."""
    one, other = each.build(5, faulty=True), each.build(5, faulty=False)
    assert one.disturbance is None
    assert other.disturbance is None
    for a, b in zip(one.workload.model.parameters(), other.workload.model.parameters(), strict=True):
        assert torch.equal(a, b)
    for index in (0, each.steps // 2):
        first, again = one.workload.micro_batches(index), other.workload.micro_batches(index)
        for part, same in zip(first, again, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(part, same, strict=True))
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        assert one.workload.backward(0).isfinite()


def test_the_schedules_are_as_named() -> None:
    """oracle: rates by hand."""
    rates = _rates(healthy.RATE_DROPS.build(0), [0, 49, 499, 500, 749, 750])
    assert rates == pytest.approx([6e-5, 3e-3, 3e-3, 3e-4, 3e-4, 3e-5])
    rates = _rates(healthy.COSINE.build(0), [0, 500, 999])
    assert rates == pytest.approx([6e-5, 0.55 * 3e-3, 3e-4], rel=1e-4)  # step 999 is one short of the end


def test_the_batch_grows_at_half() -> None:
    """planted."""
    work = healthy.BATCH_GROWTH.build(0).workload
    assert [len(work.batch(index).inputs_BT) for index in (0, 499, 500, 999)] == [8, 8, 32, 32]


def test_a_sixteenth_of_the_data_is_new_from_half_on() -> None:
    """planted: 15 of 16 rows are those of the plain run, and the other is no row of it."""
    mixed, plain = healthy.DATA_MIX.build(0).workload, language(0)
    assert torch.equal(mixed.batch(499).inputs_BT, plain.batch(499).inputs_BT)
    after: Tokens = mixed.batch(500)
    assert after.inputs_BT.shape == plain.batch(500).inputs_BT.shape
    assert torch.equal(after.inputs_BT[:15], plain.batch(500).inputs_BT[1:])
    assert torch.equal(after.targets_BT[15:, :-1], after.inputs_BT[15:, 1:])
    assert not torch.equal(after.inputs_BT[15:], plain.batch(500).inputs_BT[:1])


def test_few_of_the_uneven_batches_are_very_noisy() -> None:
    """planted: the share of bytes that no word has, over 300 batches: nearly none in half of them, much in a few."""
    work = healthy.UNEVEN_BATCHES.build(0).workload
    letters = torch.tensor([32, *range(97, 123)])
    shares = torch.stack([(~torch.isin(work.batch(i).inputs_BT, letters)).float().mean() for i in range(300)])
    assert shares.median() < 0.07
    assert 0.15 < shares.max() < 0.6


def test_accumulated_steps_are_the_steps_of_the_whole_batch() -> None:
    """equivalence: mean gradient of the parts = gradient of all."""
    parts, whole = healthy.ACCUMULATION.build(0).workload, language(0)
    torch.testing.assert_close(parts.backward(3), whole.backward(3))
    for a, b in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)  # float32 sums in another order


def test_fine_tuning_starts_from_trained_weights_on_a_new_task() -> None:
    """planted: better on its old language than fresh weights, at a lower rate, with no moments yet."""
    tuned, fresh = healthy.FINE_TUNING.build(0).workload, language(0)
    assert fresh.held_out is not None
    assert fresh.held_out(tuned.model) < 0.5 * fresh.held_out(fresh.model)
    assert not tuned.optimizer.state
    assert tuned.scheduler is not None
    assert _rates(Trial(tuned, None), [60]) == pytest.approx([0.3 * 3e-3])


@pytest.mark.study
def test_grokking_is_late() -> None:
    """planted: while training falls, held-out goes far above chance (ln 59 = 4.08), then nearly to nothing."""
    work = healthy.GROKKING.build(0).workload
    assert work.held_out is not None
    seen = []
    for index in range(healthy.GROKKING.steps):
        work.backward(index)
        work.optimizer.step()
        work.optimizer.zero_grad()
        if index % 100 == 99:
            seen.append(work.held_out(work.model))
    assert max(seen) > 6.0
    assert seen[-1] < 0.1
