"""Planted faults that nothing may be tuned on: what does a diagnosis make of a cause that is not in the zoo?

dropout_jump was looked at once, with one seed, while verdicts were built: it showed that not all that comes along with
a batch is data. decay_surge and memory_loss were planted after that, when the rules were frozen.
Imports workloads, disturbances and the planted faults' pieces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aftershock.lab.zoo import disturbances
from aftershock.lab.zoo.nets import ByteLM
from aftershock.lab.zoo.planted import FOR_GOOD, ONSET, STEPS, span, spoiled
from aftershock.lab.zoo.specimen import Specimen, Trial
from aftershock.lab.zoo.workloads import Batches, Tokens, language

SURGE, SURGE_STEPS = 100.0, 20
"""Decay per step is the rate times this: at 3e-3 each step takes 0.3 of every weight."""


class Wet(NamedTuple):
    """A batch, and the share of the embedded channels that its step drops."""

    tokens: Tokens
    dropped: float


def _dropout_jump(seed: int, *, faulty: bool = True) -> Trial:
    steps = span(ONSET, 100, faulty)

    def loss(model: nn.Module, batch: Wet) -> Tensor:
        assert isinstance(model, ByteLM)
        hook = model.blocks[0].register_forward_pre_hook(lambda _, x: F.dropout(x[0], batch.dropped))
        try:
            return F.cross_entropy(model(batch.tokens.inputs_BT).flatten(0, 1), batch.tokens.targets_BT.flatten())
        finally:
            hook.remove()

    def drop(batch: Batches) -> Batches:
        return lambda index: Wet(batch(index), 0.9 if index in steps else 0.0)

    return Trial(language(seed, change=drop, loss=loss), None)


def _targets_off_by_one(seed: int, *, faulty: bool = True) -> Trial:
    def shift(batch: Tokens, random: torch.Generator) -> Tokens:
        return Tokens(batch.inputs_BT[:, :-1], batch.targets_BT[:, 1:])

    return Trial(language(seed, change=spoiled(shift, span(ONSET, FOR_GOOD, faulty), seed)), None)


def _zeroed_gain(seed: int, *, faulty: bool = True) -> Trial:
    work = language(seed)
    gain = work.model.get_parameter("norm.weight")
    return Trial(work, disturbances.zeroed([gain], step=ONSET) if faulty else None)


def _decay_surge(seed: int, *, faulty: bool = True) -> Trial:
    steps = span(ONSET, SURGE_STEPS, faulty)
    return _with_setting(seed, lambda group, step: group.update(weight_decay=SURGE if step in steps else 0.1))


def _memory_loss(seed: int, *, faulty: bool = True) -> Trial:
    steps = span(ONSET, SURGE_STEPS, faulty)
    return _with_setting(seed, lambda group, step: group.update(betas=(0.9, 0.0) if step in steps else (0.9, 0.95)))


def _with_setting(seed: int, put: Callable[[dict[str, Any], int], None]) -> Trial:
    """The schedule puts another setting of the optimizer beside the rate, a pure function of the step."""
    groups: list[dict[str, Any]] = []

    def rate(step: int) -> float:
        for group in groups:
            put(group, step)
        return 1.0

    work = language(seed, rate=rate)
    groups += work.optimizer.param_groups
    return Trial(work, None)


# ------------------------------------------------------------------------------------------------------ specimens

DROPOUT_JUMP = Specimen(
    name="dropout_jump",
    kind="planted",
    cause="C11",
    about="For 100 steps nine tenths of the embedded channels are dropped: a switch set wrongly, then set back.",
    source="constructed",
    steps=STEPS,
    onset=ONSET,
    build=_dropout_jump,
)
TARGETS_OFF_BY_ONE = Specimen(
    name="targets_off_by_one",
    kind="planted",
    cause="C7",
    about="From a step on the targets are the bytes after next: a shift made twice, in the data and in the loss.",
    source="constructed",
    steps=STEPS,
    onset=ONSET,
    build=_targets_off_by_one,
)
ZEROED_GAIN = Specimen(
    name="zeroed_gain",
    kind="planted",
    cause="C11",
    about="The last norm's gain comes back from a checkpoint as zeros, so the logits say nothing until it is relearnt.",
    source="constructed",
    steps=STEPS,
    onset=ONSET,
    build=_zeroed_gain,
)
DECAY_SURGE = Specimen(
    name="decay_surge",
    kind="planted",
    cause="C11",
    about="For 20 steps the schedule sets the weight decay a thousand times too high, which takes 0.3 of every weight.",
    source="constructed",
    steps=STEPS,
    onset=ONSET,
    build=_decay_surge,
)
MEMORY_LOSS = Specimen(
    name="memory_loss",
    kind="planted",
    cause="C11",
    about="For 20 steps the schedule sets beta2 to 0, so that each step divides by its own gradient alone.",
    source="constructed",
    steps=STEPS,
    onset=ONSET,
    build=_memory_loss,
)
