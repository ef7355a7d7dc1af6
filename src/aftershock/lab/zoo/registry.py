"""Every specimen by its name. A new one is a constant in its file and a line here.

Holds no recipe. Imports the files of specimens.
"""

from __future__ import annotations

from aftershock.config import nearest
from aftershock.lab.zoo import healthy, planted, spontaneous, unseen
from aftershock.lab.zoo.specimen import Specimen

ZOO: dict[str, Specimen] = {
    "slingshot": spontaneous.SLINGSHOT,
    "bf16_loss": spontaneous.BF16_LOSS,
    "memorising": spontaneous.MEMORISING,
    "lag_99": spontaneous.LAG_99,
    "lag_999": spontaneous.LAG_999,
    "edge_of_stability": spontaneous.EDGE_OF_STABILITY,
    "norm_against_decay": spontaneous.NORM_AGAINST_DECAY,
    "logit_growth": spontaneous.LOGIT_GROWTH,
    "embedding_decay": spontaneous.EMBEDDING_DECAY,
    "repeated_ngrams": planted.REPEATED_NGRAMS,
    "shuffled_targets": planted.SHUFFLED_TARGETS,
    "poisoned_shard": planted.POISONED_SHARD,
    "masked_batch": planted.MASKED_BATCH,
    "garbage_labels": planted.GARBAGE_LABELS,
    "nan_input": planted.NAN_INPUT,
    "rate_jump": planted.RATE_JUMP,
    "scaled_rate": planted.SCALED_RATE,
    "overflowing_loss_scale": planted.OVERFLOWING_LOSS_SCALE,
    "flipped_bit": planted.FLIPPED_BIT,
    "flipped_top_bit": planted.FLIPPED_TOP_BIT,
    "sick_rank": planted.SICK_RANK,
    "wrong_rate_resume": planted.WRONG_RATE_RESUME,
    "lost_second_moment": planted.LOST_SECOND_MOMENT,
    "cosine": healthy.COSINE,
    "rate_drops": healthy.RATE_DROPS,
    "data_mix": healthy.DATA_MIX,
    "batch_growth": healthy.BATCH_GROWTH,
    "accumulation": healthy.ACCUMULATION,
    "dropout": healthy.DROPOUT,
    "uneven_batches": healthy.UNEVEN_BATCHES,
    "grokking": healthy.GROKKING,
    "fine_tuning": healthy.FINE_TUNING,
}
"""What detectors, policies and diagnoses are tuned and measured on."""

UNSEEN: dict[str, Specimen] = {
    "dropout_jump": unseen.DROPOUT_JUMP,
    "targets_off_by_one": unseen.TARGETS_OFF_BY_ONE,
    "zeroed_gain": unseen.ZEROED_GAIN,
    "decay_surge": unseen.DECAY_SURGE,
    "memory_loss": unseen.MEMORY_LOSS,
}
"""Faults that nothing may be tuned on: for the question what happens with a cause that is not in the zoo."""


def specimen(name: str) -> Specimen:
    """The specimen of that name, of the zoo or unseen.

    >>> specimen("flipped_bit").cause
    'C10'

    Raises ValueError, with the nearest name, when there is none.
    """
    known = ZOO | UNSEEN
    if name not in known:
        raise ValueError(f"no specimen {name!r}{nearest(name, known)}")
    return known[name]
