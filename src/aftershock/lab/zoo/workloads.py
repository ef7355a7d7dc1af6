"""The two ordinary training runs that planted and healthy specimens are made from: a byte LM, and a curve.

Both are calm by themselves, so that what happens in a specimen is what its recipe adds.
Legend: B sequences, T positions, N examples. Imports nets; must not import specimens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW
from torch.optim.lr_scheduler import LambdaLR

from aftershock.lab.data.sampler import offsets
from aftershock.lab.zoo.nets import ByteLM, Curve, TanhNet, Tokens, curve_loss, seeded, token_loss, two_sines
from aftershock.workload import Workload

Batches = Callable[[int], Any]
Rates = Callable[[int], float]

CONTEXT, WARMUP = 32, 50
LANGUAGE_RATE, CURVE_RATE = 3e-3, 1e-2
CURVE_STEPS, CURVE_DECAY = 1400, 300
"""Length of a regression, and of the linear decay at its end: without one, other batches of the same kind move the
final loss by up to 5.9 %, with it by 1 %, and a policy could not be judged at 2 %."""

_FIRST_LETTER, _NUM_LETTERS, _SPACE = 97, 26, b" "
_DRAWN_WORDS = 60_000
_HELD_OUT_FRAC = 0.05


class Words:
    """Windows of a made-up language: `num_words` spellings, drawn independently with Zipf frequencies 1/rank.

    Unlike a library of real text it has no odd corners, so the loss of a batch is near the mean loss, and a spike is
    the fault's. `language` chooses the spellings, `seed` the order of the windows; more words are harder to learn.

    Example:
        words = Words(seed=0, batch_size=8)
        inputs_BT, targets_BT = words.batch(3)
    """

    def __init__(self, *, seed: int, batch_size: int, language: int = 0, num_words: int = 200) -> None:
        self._seed_K, self._size, text_S = np.array([seed]), batch_size, _text(language, num_words)
        cut = round(len(text_S) * (1 - _HELD_OUT_FRAC))
        self._train_S, self._held_out_S = text_S[:cut], text_S[cut:]

    def batch(self, index: int) -> Tokens:
        starts_B = offsets(self._seed_K, index, self._size, len(self._train_S) - CONTEXT)[0]
        return _windows(self._train_S, starts_B)

    def held_out(self, num_sequences: int = 64) -> Tokens:
        """The same for every seed: evenly spaced windows that no batch holds."""
        return _windows(self._held_out_S, np.linspace(0, len(self._held_out_S) - CONTEXT - 1, num_sequences, dtype=int))


@functools.cache
def _text(language: int, num_words: int) -> np.ndarray:
    random = np.random.default_rng(language)
    lengths = random.integers(2, 8, size=num_words)
    words = [(_FIRST_LETTER + random.integers(_NUM_LETTERS, size=n)).astype(np.uint8).tobytes() for n in lengths]
    frequency = 1 / np.arange(1, num_words + 1)
    drawn = random.choice(num_words, size=_DRAWN_WORDS, p=frequency / frequency.sum())
    return np.frombuffer(_SPACE.join(words[i] for i in drawn), dtype=np.uint8)


def _windows(text_S: np.ndarray, starts_B: np.ndarray) -> Tokens:
    tokens_BS = torch.from_numpy(text_S[starts_B[:, None] + np.arange(CONTEXT + 1)].astype(np.int64))
    return Tokens(tokens_BS[:, :-1], tokens_BS[:, 1:])


def language(
    seed: int,
    *,
    words: Words | None = None,
    change: Callable[[Batches], Batches] = lambda batch: batch,
    loss: Callable[[nn.Module, Any], Tensor] = token_loss,
    rate: Rates = lambda step: 1.0,
    beta2: float = 0.95,
    clip_norm: float | None = 1.0,
    accumulate: int = 1,
    dropout: float = 0.0,
) -> Workload:
    """A byte LM of 43k parameters, trained as large ones are: AdamW, warm-up, clipping. `rate` multiplies 3e-3.

    `words` are by default 16 windows a batch; `change` gets their batches and gives those of the run.
    """
    model = seeded(seed, lambda: ByteLM(context=CONTEXT, dropout=dropout))
    optimizer = AdamW(model.parameters(), lr=LANGUAGE_RATE, betas=(0.9, beta2), weight_decay=0.1, fused=True)
    words = words or Words(seed=seed, batch_size=16)
    return Workload(
        model=model,
        optimizer=optimizer,
        scheduler=LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP) * rate(step)),
        batch=change(words.batch),
        loss=loss,
        clip_norm=clip_norm,
        accumulate=accumulate,
        held_out=held_out(token_loss, words.held_out()),
    )


def regression(
    seed: int,
    *,
    change: Callable[[Batches], Batches] = lambda batch: batch,
    batch_size: Callable[[int], int] = lambda step: 64,
    rate: Rates = lambda step: 1.0,
) -> Workload:
    """A tanh net of 301 parameters that learns a curve from minibatches: Adam, no clipping. `rate` multiplies 1e-2."""
    model = seeded(seed, TanhNet)
    optimizer = Adam(model.parameters(), lr=CURVE_RATE, betas=(0.9, 0.999), fused=True)
    curve = two_sines()

    def batch(index: int) -> Curve:
        chosen_N = torch.randint(len(curve.x_N1), (batch_size(index),), generator=random_numbers(seed, index))
        return Curve(curve.x_N1[chosen_N], curve.y_N1[chosen_N])

    return Workload(
        model=model,
        optimizer=optimizer,
        scheduler=LambdaLR(optimizer, lambda step: rate(step) * max(0.0, min(1.0, (CURVE_STEPS - step) / CURVE_DECAY))),
        batch=change(batch),
        loss=curve_loss,
        held_out=held_out(curve_loss, curve),
    )


def parts(count: int) -> Callable[[Batches], Batches]:
    """Each batch of tokens as a list of `count` equal ones, for a workload that accumulates."""

    def change(batch: Batches) -> Batches:
        return lambda index: [Tokens(*pair) for pair in zip(*(side.chunk(count) for side in batch(index)), strict=True)]

    return change


def held_out(loss: Callable[[nn.Module, Any], Tensor], batch: Any) -> Callable[[nn.Module], float]:
    """Reads `loss` of `batch` in evaluation mode, and leaves the model in the mode it was in."""

    @torch.no_grad()
    def read(model: nn.Module) -> float:
        training = model.training
        try:
            return float(loss(model.eval(), batch))
        finally:
            model.train(training)

    return read


def random_numbers(seed: int, index: int) -> torch.Generator:
    """Random numbers that depend on the seed and the step alone."""
    return torch.Generator().manual_seed(1_000_003 * seed + index)
