"""Planted specimens: the fault is where it is said to be, and nowhere else. (That it spikes: test_registry.py.)"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from aftershock.lab.zoo import planted, unseen
from aftershock.lab.zoo.nets import Tokens, token_loss
from aftershock.lab.zoo.specimen import Specimen, Trial

SPECIMENS = {
    each.name: each for room in (planted, unseen) for each in vars(room).values() if isinstance(each, Specimen)
}

PLACES = {
    "repeated_ngrams": {"data"},
    "shuffled_targets": {"data"},
    "poisoned_shard": {"data"},
    "masked_batch": {"data"},
    "garbage_labels": {"data"},
    "nan_input": {"data"},
    "rate_jump": {"rate"},
    "scaled_rate": {"data", "rate"},
    "overflowing_loss_scale": {"data"},
    "flipped_bit": {"process"},
    "flipped_top_bit": {"process"},
    "sick_rank": {"process"},
    "wrong_rate_resume": {"process"},
    "lost_second_moment": {"process"},
    "dropout_jump": {"data"},
    "targets_off_by_one": {"data"},
    "zeroed_gain": {"process"},
    "decay_surge": {"setting"},
    "memory_loss": {"setting"},
}


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a == b


def _rate(trial: Trial, index: int) -> float:
    scheduler = trial.workload.scheduler
    assert isinstance(scheduler, LambdaLR)
    return float(scheduler.base_lrs[0]) * scheduler.lr_lambdas[0](index)


def _settings(a: Trial, b: Trial) -> set[str]:
    """Whether the schedule, just asked for a step, has put other settings beside the rate."""
    groups = [trial.workload.optimizer.param_groups[0] for trial in (a, b)]
    differ = any(groups[0].get(name) != groups[1].get(name) for name in ("betas", "weight_decay"))
    return {"setting"} if differ else set()


def _differences(a: Trial, b: Trial, index: int) -> set[str]:
    found = {"data"} if not _equal(a.workload.batch(index), b.workload.batch(index)) else set()
    return found | ({"rate"} if _rate(a, index) != _rate(b, index) else set()) | _settings(a, b)


@pytest.mark.parametrize("each", SPECIMENS.values(), ids=SPECIMENS)
def test_the_fault_is_in_its_place_from_its_onset_on(each: Specimen) -> None:
    """planted: against the twin, in data, rates and process; weights and everything before the onset are equal."""
    assert each.onset is not None
    faulty, twin = each.build(3), each.build(3, faulty=False)
    assert _equal(list(faulty.workload.model.parameters()), list(twin.workload.model.parameters()))
    assert twin.disturbance is None
    process = {"process"} if faulty.disturbance is not None else set()
    # A loss scale that grows is harmless before it overflows, but other than the twin's from step 100 on.
    calm = {0, 1} if each is planted.OVERFLOWING_LOSS_SCALE else {0, 1, each.onset - 2, each.onset - 1}
    for index in calm:
        assert _differences(faulty, twin, index) == set()
    assert _differences(faulty, twin, each.onset) | process == PLACES[each.name]


@pytest.mark.parametrize("each", SPECIMENS.values(), ids=SPECIMENS)
def test_a_run_is_a_function_of_its_seed(each: Specimen) -> None:
    """property: two builds agree on weights and on every batch; another seed has others."""
    assert each.onset is not None
    one, same, other = each.build(1).workload, each.build(1).workload, each.build(2).workload
    assert _equal(list(one.model.parameters()), list(same.model.parameters()))
    assert not _equal(list(one.model.parameters()), list(other.model.parameters()))
    for index in (each.onset + 1, 0, each.onset, 0):
        first, again = one.batch(index), same.batch(index)
        # NaN is not equal to itself, and one batch holds one on purpose.
        assert _equal(first, again) or (each is planted.NAN_INPUT and index == each.onset)
    assert not _equal(one.batch(0), other.batch(0))


def test_a_batch_without_targets_has_no_loss_and_no_gradient() -> None:
    """planted: NaN in the loss, zeros in `.grad`."""
    work = planted.MASKED_BATCH.build(0).workload
    assert torch.isnan(work.backward(planted.ONSET))
    for weight in work.model.parameters():
        assert weight.grad is not None
        assert not weight.grad.any()


def test_repeated_ngrams_repeat() -> None:
    """planted: period 4 in every row, the same in all; the next batch is text again."""
    work = planted.REPEATED_NGRAMS.build(0).workload
    inputs_BT, targets_BT = work.batch(planted.ONSET)
    assert torch.equal(inputs_BT[:, 4:], inputs_BT[:, :-4])
    assert torch.equal(inputs_BT, inputs_BT[:1].expand_as(inputs_BT))
    assert torch.equal(targets_BT[:, :-1], inputs_BT[:, 1:])
    later_BT = work.batch(planted.ONSET + 3).inputs_BT
    assert not torch.equal(later_BT[:, 4:], later_BT[:, :-4])


def test_half_of_a_poisoned_batch_is_clean() -> None:
    """planted."""
    faulty, twin = (planted.POISONED_SHARD.build(0, faulty=fault).workload for fault in (True, False))
    dirty, clean = faulty.batch(planted.ONSET), twin.batch(planted.ONSET)
    assert dirty.inputs_BT.shape == clean.inputs_BT.shape
    assert torch.equal(dirty.inputs_BT[:8], clean.inputs_BT[8:])
    assert torch.equal(dirty.targets_BT[:8], clean.targets_BT[8:])
    assert torch.equal(dirty.targets_BT[8:, :-1], dirty.inputs_BT[8:, 1:])


def _gradients(scale: float) -> tuple[list[Tensor], list[Tensor]]:
    """Of the loss with float16 in it, at this scale, and of the plain one."""
    work = planted.OVERFLOWING_LOSS_SCALE.build(0).workload
    tokens: Tokens = work.batch(0).tokens
    weights = list(work.model.parameters())
    half = planted.half_gradient_loss(work.model, planted.Scaled(tokens, scale))
    plain = token_loss(work.model, tokens)
    assert half.item() == plain.item()
    return list(torch.autograd.grad(half, weights)), list(torch.autograd.grad(plain, weights))


def test_a_loss_scale_that_fits_leaves_the_gradient_and_the_last_one_overflows() -> None:
    """equivalence: with the scale of the start; planted: with that of the onset."""
    work = planted.OVERFLOWING_LOSS_SCALE.build(0).workload
    half, plain = _gradients(work.batch(0).scale)
    for a, b in zip(half, plain, strict=True):
        # 11 bits of each logit's gradient survive; a sum over many is off by less than that share of its largest part.
        torch.testing.assert_close(a, b, rtol=0.0, atol=2**-10 * float(b.abs().max()) + 1e-9)
    before, _ = _gradients(work.batch(planted.ONSET - 1).scale)
    assert all(gradient.isfinite().all() for gradient in before)
    after, _ = _gradients(work.batch(planted.ONSET).scale)
    assert not all(gradient.isfinite().all() for gradient in after)


def test_the_dropped_share_is_of_the_step_alone() -> None:
    """planted: no hook stays behind, so the loss of a dry batch is the plain one."""
    work = unseen.DROPOUT_JUMP.build(0).workload
    dry, wet = work.batch(0), work.batch(planted.ONSET)
    assert (dry.dropped, wet.dropped) == (0.0, 0.9)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        assert work.loss(work.model, wet) != token_loss(work.model, wet.tokens)
    assert work.loss(work.model, dry) == token_loss(work.model, dry.tokens)
