"""Specimens that nothing is wrong with, though their curves move: what no detector may take for an instability.

Each is a change that people make on purpose, or the noise of an ordinary run. `faulty` changes nothing here.
Imports workloads, nets and the specimen.
"""

from __future__ import annotations

import math

import torch
from torch.optim import AdamW

from aftershock.lab.zoo.nets import ModularMlp, Tokens, seeded, sum_loss, sums
from aftershock.lab.zoo.specimen import Specimen, Trial
from aftershock.lab.zoo.workloads import Batches, Words, held_out, language, parts, random_numbers
from aftershock.workload import Workload

STEPS, HALF, THREE_QUARTERS = 1000, 500, 750
UNEVEN_STEPS = 2000
"""Of the run with batches of one window, which cost half as much."""
WORST_SHARE = 0.3
MICRO_BATCHES = 2
OTHER_LANGUAGE = 1
MODULUS = 59
PRETRAINING_STEPS = 300


def _cosine(seed: int, *, faulty: bool = True) -> Trial:
    return Trial(language(seed, rate=lambda step: 0.1 + 0.45 * (1 + math.cos(math.pi * min(step / STEPS, 1.0)))), None)


def _rate_drops(seed: int, *, faulty: bool = True) -> Trial:
    return Trial(language(seed, rate=lambda step: 0.1 ** ((step >= HALF) + (step >= THREE_QUARTERS))), None)


def _data_mix(seed: int, *, faulty: bool = True) -> Trial:
    other = Words(seed=seed, batch_size=1, language=OTHER_LANGUAGE, num_words=400)

    def mix(batch: Batches) -> Batches:
        def mixed(index: int) -> Tokens:
            if index < HALF:
                return batch(index)
            pairs = zip(batch(index), other.batch(index), strict=True)
            return Tokens(*(torch.cat([known_BT[1:], new_BT]) for known_BT, new_BT in pairs))

        return mixed

    return Trial(language(seed, change=mix), None)


def _batch_growth(seed: int, *, faulty: bool = True) -> Trial:
    small, large = Words(seed=seed, batch_size=8), Words(seed=seed, batch_size=32)

    def grow(batch: Batches) -> Batches:
        return lambda index: batch(index) if index < HALF else large.batch(index)

    return Trial(language(seed, words=small, change=grow), None)


def _accumulation(seed: int, *, faulty: bool = True) -> Trial:
    return Trial(language(seed, change=parts(MICRO_BATCHES), accumulate=MICRO_BATCHES), None)


def _dropout(seed: int, *, faulty: bool = True) -> Trial:
    return Trial(language(seed, dropout=0.1), None)


def _uneven_batches(seed: int, *, faulty: bool = True) -> Trial:
    def smudge(batch: Batches) -> Batches:
        def smudged(index: int) -> Tokens:
            inputs_BT, targets_BT = batch(index)
            random = random_numbers(seed, index)
            text_BS = torch.cat([inputs_BT[:, :1], targets_BT], dim=1)
            share = WORST_SHARE * torch.rand((), generator=random) ** 3
            hit_BS = torch.rand(text_BS.shape, generator=random) < share
            text_BS = torch.where(hit_BS, torch.randint(256, text_BS.shape, generator=random), text_BS)
            return Tokens(text_BS[:, :-1], text_BS[:, 1:])

        return smudged

    return Trial(language(seed, words=Words(seed=seed, batch_size=1), change=smudge, rate=lambda step: 0.3), None)


def _grokking(seed: int, *, faulty: bool = True) -> Trial:
    train, test = sums(MODULUS, seed=seed, train_frac=0.5)
    model = seeded(seed, lambda: ModularMlp(MODULUS))
    work = Workload(
        model=model,
        optimizer=AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.98), weight_decay=1.0, fused=True),
        batch=lambda index: train,
        loss=sum_loss,
        held_out=held_out(sum_loss, test),
    )
    return Trial(work, None)


def _fine_tuning(seed: int, *, faulty: bool = True) -> Trial:
    before = language(seed)
    assert before.scheduler is not None
    for index in range(PRETRAINING_STEPS):
        before.backward(index)
        torch.nn.utils.clip_grad_norm_(before.model.parameters(), 1.0)
        before.optimizer.step()
        before.scheduler.step()
        before.optimizer.zero_grad()
    task = Words(seed=seed, batch_size=16, language=OTHER_LANGUAGE, num_words=100)
    work = language(seed, words=task, rate=lambda step: 0.3)
    work.model.load_state_dict(before.model.state_dict())
    return Trial(work, None)


# ------------------------------------------------------------------------------------------------------ specimens

COSINE = Specimen(
    name="cosine",
    kind="healthy",
    cause="none",
    about="A byte LM with warm-up and a cosine to a tenth of the rate.",
    source="Hoffmann et al. 2022 (arXiv 2203.15556): the usual schedule",
    steps=STEPS,
    build=_cosine,
)
RATE_DROPS = Specimen(
    name="rate_drops",
    kind="healthy",
    cause="none",
    about="The rate falls to a tenth at half and again at three quarters, and the loss falls with it.",
    source="He et al. 2015 (arXiv 1512.03385), section 3.4: the step schedule",
    steps=STEPS,
    build=_rate_drops,
)
DATA_MIX = Specimen(
    name="data_mix",
    kind="healthy",
    cause="none",
    about="From half on a sixteenth of the data is a new, harder language: the loss steps up and is learnt down.",
    source="OLMo 2 (arXiv 2501.00656): another data mix in mid-training",
    steps=STEPS,
    build=_data_mix,
)
BATCH_GROWTH = Specimen(
    name="batch_growth",
    kind="healthy",
    cause="none",
    about="The batch grows four times at half, at the same rate: loss and gradients become less noisy at once.",
    source="Smith et al. 2018 (arXiv 1711.00489): raising the batch size in place of decay",
    steps=STEPS,
    build=_batch_growth,
)
ACCUMULATION = Specimen(
    name="accumulation",
    kind="healthy",
    cause="none",
    about="A byte LM whose steps are the mean of two micro-batches.",
    source="the usual way to a large batch",
    steps=STEPS,
    build=_accumulation,
)
DROPOUT = Specimen(
    name="dropout",
    kind="healthy",
    cause="none",
    about="A byte LM with dropout of a tenth, so that each step's loss has noise of its own.",
    source="Srivastava et al. 2014 (JMLR 15)",
    steps=STEPS,
    build=_dropout,
)
UNEVEN_BATCHES = Specimen(
    name="uneven_batches",
    kind="healthy",
    cause="none",
    about="One window a step, a few of them full of random bytes: heavy-tailed noise, and no instability.",
    source="Marek et al. 2025 (arXiv 2507.07101): batches of one train stably",
    steps=UNEVEN_STEPS,
    build=_uneven_batches,
)
GROKKING = Specimen(
    name="grokking",
    kind="healthy",
    cause="none",
    about="Addition mod 59 with weight decay 1: the held-out loss rises to twice chance, then falls to nearly nothing.",
    source="Power et al. 2022 (arXiv 2201.02177)",
    steps=STEPS,
    build=_grokking,
)
FINE_TUNING = Specimen(
    name="fine_tuning",
    kind="healthy",
    cause="none",
    about="A trained byte LM goes on with a new language, a fresh optimizer and a lower rate.",
    source="the usual way to a new task",
    steps=STEPS,
    build=_fine_tuning,
)
