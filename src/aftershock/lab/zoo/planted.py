"""Specimens with a fault planted at a known step: in the data, in the schedule, or in the process.

Faulty data and rates are part of the workload, so a replay meets them again; what struck the process is a disturbance,
which no replay meets. The twin, `build(seed, faulty=False)`, is the same run without the fault.
Legend: B sequences, T positions, V vocabulary, N examples. Imports workloads, nets, disturbances and the specimen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aftershock.lab.zoo import disturbances
from aftershock.lab.zoo.nets import Curve, Tokens
from aftershock.lab.zoo.specimen import Specimen, Trial
from aftershock.lab.zoo.workloads import CURVE_STEPS, Batches, language, parts, random_numbers, regression

ONSET, STEPS = 500, 800
"""Of the language runs."""
CURVE_ONSET = 1000
"""Of the regression runs (`CURVE_STEPS`), which learn more slowly and cost a tenth a step."""
NGRAM = 4
RANKS = 4
GROWTH = 8
IGNORED = -100
"""torch's `ignore_index`: a target that the mean leaves out."""
LOSS_SCALE, SCALE_GROWTH, GROWTH_STEPS, OVERFLOWS = 2.0**16, 4.0, 100, 20
"""The first is where torch.amp.GradScaler starts; 2^16 4^5 = 2^26 is the first at which 1/512 overflows float16."""

FOR_GOOD = 10**9


def span(onset: int, count: int, faulty: bool) -> range:
    """The faulty steps; none in the twin."""
    return range(onset, onset + count) if faulty else range(0)


def spoiled(spoil: Callable[[Any, torch.Generator], Any], steps: range, seed: int) -> Callable[[Batches], Batches]:
    """Batches of `steps` as `spoil` makes them, with random numbers of their own; the others as they were."""

    def change(batch: Batches) -> Batches:
        return lambda index: spoil(batch(index), random_numbers(seed, index)) if index in steps else batch(index)

    return change


# ------------------------------------------------------------------------------------------------------------ data


def _repeated_ngrams(seed: int, *, faulty: bool = True) -> Trial:
    def repeat(batch: Tokens, random: torch.Generator) -> Tokens:
        B, T = batch.inputs_BT.shape
        row_S = torch.randint(256, (NGRAM,), generator=random).repeat(T // NGRAM + 1)[: T + 1]
        return Tokens(row_S[:-1].expand(B, T), row_S[1:].expand(B, T))

    return Trial(language(seed, change=spoiled(repeat, span(ONSET, 3, faulty), seed)), None)


def _shuffled_targets(seed: int, *, faulty: bool = True) -> Trial:
    def shuffle(batch: Tokens, random: torch.Generator) -> Tokens:
        order_N = torch.randperm(batch.targets_BT.numel(), generator=random)
        return batch._replace(targets_BT=batch.targets_BT.flatten()[order_N].view_as(batch.targets_BT))

    return Trial(language(seed, change=spoiled(shuffle, span(ONSET, 5, faulty), seed)), None)


def _poisoned_shard(seed: int, *, faulty: bool = True) -> Trial:
    def poison(batch: Tokens, random: torch.Generator) -> Tokens:
        B, T = batch.inputs_BT.shape
        noise_BS = torch.randint(256, (B // 2, T + 1), generator=random)
        inputs_BT, targets_BT = (
            torch.cat([clean_BT[B // 2 :], noise_BT])
            for clean_BT, noise_BT in zip(batch, (noise_BS[:, :-1], noise_BS[:, 1:]), strict=True)
        )
        return Tokens(inputs_BT, targets_BT)

    return Trial(language(seed, change=spoiled(poison, span(ONSET, 150, faulty), seed)), None)


def _masked_batch(seed: int, *, faulty: bool = True) -> Trial:
    def mask(batch: Tokens, random: torch.Generator) -> Tokens:
        return batch._replace(targets_BT=torch.full_like(batch.targets_BT, IGNORED))

    return Trial(language(seed, change=spoiled(mask, span(ONSET, 1, faulty), seed)), None)


def _garbage_labels(seed: int, *, faulty: bool = True) -> Trial:
    def spoil(batch: Curve, random: torch.Generator) -> Curve:
        return batch._replace(y_N1=torch.full_like(batch.y_N1, 6.0))

    return Trial(regression(seed, change=spoiled(spoil, span(CURVE_ONSET, 3, faulty), seed)), None)


def _nan_input(seed: int, *, faulty: bool = True) -> Trial:
    def spoil(batch: Curve, random: torch.Generator) -> Curve:
        x_N1 = batch.x_N1.clone()
        x_N1[0] = torch.nan
        return batch._replace(x_N1=x_N1)

    return Trial(regression(seed, change=spoiled(spoil, span(CURVE_ONSET, 1, faulty), seed)), None)


# ------------------------------------------------------------------------------------------------ rates, precision


def _rate_jump(seed: int, *, faulty: bool = True) -> Trial:
    high = span(ONSET, 40, faulty)
    return Trial(language(seed, rate=lambda step: 30.0 if step in high else 1.0), None)


def _scaled_rate(seed: int, *, faulty: bool = True) -> Trial:
    large = span(CURVE_ONSET, FOR_GOOD, faulty)
    work = regression(
        seed,
        batch_size=lambda index: 64 * GROWTH if index in large else 64,
        rate=lambda step: float(GROWTH) if step in large else 1.0,
    )
    return Trial(work, None)


class Scaled(NamedTuple):
    """A batch, and the loss scale of its step."""

    tokens: Tokens
    scale: float


def half_gradient_loss(model: nn.Module, batch: Scaled) -> Tensor:
    """Mean cross-entropy, nats; the gradient of the logits goes back in float16, times `scale` on its way."""
    logits_NV = model(batch.tokens.inputs_BT).flatten(0, 1)
    if logits_NV.requires_grad:
        logits_NV.register_hook(lambda gradient_NV: (gradient_NV * batch.scale).half().float() / batch.scale)
    return F.cross_entropy(logits_NV, batch.tokens.targets_BT.flatten())


def _overflowing_loss_scale(seed: int, *, faulty: bool = True) -> Trial:
    def scaled(batch: Batches) -> Batches:
        grows = range(ONSET + OVERFLOWS if faulty else 0)
        return lambda index: Scaled(
            batch(index), LOSS_SCALE * SCALE_GROWTH ** (index // GROWTH_STEPS if index in grows else 0)
        )

    return Trial(language(seed, change=scaled, loss=half_gradient_loss), None)


# --------------------------------------------------------------------------------------------------------- process


def _flipped_bit(seed: int, *, faulty: bool = True) -> Trial:
    work = regression(seed)
    weight = work.model.get_parameter("outer.weight")
    return Trial(work, disturbances.flipped_bit(weight, step=CURVE_ONSET, growth=4) if faulty else None)


def _flipped_top_bit(seed: int, *, faulty: bool = True) -> Trial:
    work = language(seed)
    weight = work.model.get_parameter("blocks.0.mlp.2.weight")
    return Trial(work, disturbances.flipped_bit(weight, step=ONSET, growth=128) if faulty else None)


def _sick_rank(seed: int, *, faulty: bool = True) -> Trial:
    work = language(seed, change=parts(RANKS), accumulate=RANKS, beta2=0.999, clip_norm=None)
    strike = disturbances.sick_rank(work, steps=[ONSET], rank=2, corrupt=lambda gradient: gradient * 2.0**16)
    return Trial(work, strike if faulty else None)


def _wrong_rate_resume(seed: int, *, faulty: bool = True) -> Trial:
    work = language(seed)
    strike = disturbances.wrong_rates(work.optimizer, work.scheduler, step=ONSET, factor=30.0)
    return Trial(work, strike if faulty else None)


def _lost_second_moment(seed: int, *, faulty: bool = True) -> Trial:
    work = language(seed, beta2=0.999)
    return Trial(work, disturbances.lost_moments(work.optimizer, step=ONSET) if faulty else None)


# ------------------------------------------------------------------------------------------------------ specimens

REPEATED_NGRAMS = Specimen(
    name="repeated_ngrams",
    kind="planted",
    cause="C7",
    about="Three batches each repeat one random 4-byte pattern, so that all their gradients agree.",
    source="OLMo 2 (arXiv 2501.00656), section 3",
    steps=STEPS,
    onset=ONSET,
    build=_repeated_ngrams,
)
SHUFFLED_TARGETS = Specimen(
    name="shuffled_targets",
    kind="planted",
    cause="C7",
    about="In five batches the targets are shuffled, so that they have nothing to do with their inputs.",
    source="BigScience tr8 chronicles: about a million samples of nothing but backslashes",
    steps=STEPS,
    onset=ONSET,
    build=_shuffled_targets,
)
POISONED_SHARD = Specimen(
    name="poisoned_shard",
    kind="planted",
    cause="C7",
    about="For 150 steps half of every batch is uniformly random bytes: a shard of binary files read as text.",
    source="BigScience tr8 chronicles: about a million samples of nothing but backslashes",
    steps=STEPS,
    onset=ONSET,
    build=_poisoned_shard,
)
MASKED_BATCH = Specimen(
    name="masked_batch",
    kind="planted",
    cause="C7",
    about="Every target of one batch is ignored: the mean over none is NaN, but its gradient is zero and harmless.",
    source="torch.nn.functional.cross_entropy with ignore_index, reduction='mean': 0 / 0",
    steps=STEPS,
    onset=ONSET,
    build=_masked_batch,
)
GARBAGE_LABELS = Specimen(
    name="garbage_labels",
    kind="planted",
    cause="C7",
    about="In three batches every target is 6, three times as far out as any true one; nothing clips the gradients.",
    source="replay of injected faults on a tanh net, after PaLM's skipped batches (arXiv 2204.02311, section 5.1)",
    steps=CURVE_STEPS,
    onset=CURVE_ONSET,
    build=_garbage_labels,
)
NAN_INPUT = Specimen(
    name="nan_input",
    kind="planted",
    cause="C7",
    about="One example of one batch has a NaN for its input; one step later every weight is NaN.",
    source="the commonest report of a NaN loss: bad values in the data",
    steps=CURVE_STEPS,
    onset=CURVE_ONSET,
    build=_nan_input,
)
RATE_JUMP = Specimen(
    name="rate_jump",
    kind="planted",
    cause="C3",
    about="The schedule raises the rate 30 times for 40 steps: a wrong milestone, or a unit mixed up.",
    source="OPT-175B chronicles: divergences cured by lower rates",
    steps=STEPS,
    onset=ONSET,
    build=_rate_jump,
)
SCALED_RATE = Specimen(
    name="scaled_rate",
    kind="planted",
    cause="C3",
    about="The batch grows 8 times and the rate with it: the linear rule, where curvature already limits the rate.",
    source="Goyal et al. 2017 (arXiv 1706.02677), section 2: the rule, and that it fails without a warm-up",
    steps=CURVE_STEPS,
    onset=CURVE_ONSET,
    build=_scaled_rate,
)
OVERFLOWING_LOSS_SCALE = Specimen(
    name="overflowing_loss_scale",
    kind="planted",
    cause="C9",
    about="The loss scale grows on schedule; for 20 batches the float16 gradient of the logits overflows, unchecked.",
    source="Micikevicius et al. 2018 (arXiv 1710.03740), section 3.2: loss scaling, and that overflow must be checked",
    steps=STEPS,
    onset=ONSET,
    build=_overflowing_loss_scale,
)
FLIPPED_BIT = Specimen(
    name="flipped_bit",
    kind="planted",
    cause="C10",
    about="An exponent bit of one output weight flips, and it is 16 times as large.",
    source="silent data corruption: arXiv 2604.00726",
    steps=CURVE_STEPS,
    onset=CURVE_ONSET,
    build=_flipped_bit,
)
FLIPPED_TOP_BIT = Specimen(
    name="flipped_top_bit",
    kind="planted",
    cause="C10",
    about="The top exponent bit of a weight of the first block flips, 2^128 times as large: the run does not recover.",
    source="silent data corruption: arXiv 2604.00726",
    steps=STEPS,
    onset=ONSET,
    build=_flipped_top_bit,
)
SICK_RANK = Specimen(
    name="sick_rank",
    kind="planted",
    cause="C10",
    about="One of four data-parallel ranks sends its gradient 2^16 times too large, once, with no clipping behind it.",
    source="silent data corruption: arXiv 2604.00726",
    steps=STEPS,
    onset=ONSET,
    build=_sick_rank,
)
WRONG_RATE_RESUME = Specimen(
    name="wrong_rate_resume",
    kind="planted",
    cause="C11",
    about="At a resume the rates, and those that the scheduler goes on from, come back 30 times too high.",
    source="OPT-175B chronicles and DeepSpeed issues: settings of an old checkpoint, or of none, after a load",
    steps=STEPS,
    onset=ONSET,
    build=_wrong_rate_resume,
)
LOST_SECOND_MOMENT = Specimen(
    name="lost_second_moment",
    kind="planted",
    cause="C11",
    about="At a resume Adam's v comes back as zeros while its step counter goes on: updates of up to 31.6 rates.",
    source="BigScience tr8 chronicles: optimizer resets made it worse",
    steps=STEPS,
    onset=ONSET,
    build=_lost_second_moment,
)
