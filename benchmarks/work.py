"""The work that is timed: our fleets and the rival's loops on the same architecture, batch and text.

Every function returns a call that takes one optimizer step (or `every` of them, for what is measured at an interval).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from aftershock.lab.data import Batches, build_batches
from aftershock.lab.fleet import Fleet
from aftershock.lab.recipe import DecoderConfig, LanguageData, OptimConfig, PrecisionConfig, RunConfig
from benchmarks.rival import PlainDecoder, training_step

DEPTH, CONTEXT, BATCH, VOCAB = 4, 128, 16, 256
LR = 1e-3


def config(
    width: int, *, bf16: bool, depth: int = DEPTH, batch: int = BATCH, heads: int = 0, seed: int = 0
) -> RunConfig:
    """The benchmark's run: the paper's decoder at head dimension 64 (or as given)."""
    return RunConfig(
        data=LanguageData(context=CONTEXT),
        model=DecoderConfig(width=width, depth=depth, heads=heads or width // 64),
        optim=OptimConfig(lr=LR),
        precision=PrecisionConfig(matmul="bfloat16" if bf16 else "params"),
        steps=10_000,
        batch_size=batch,
        seed=seed,
        data_seed=seed,
    )


def ours(configs: list[RunConfig], *, batches: Batches, every: int = 10, steps: int = 10) -> Callable[[], None]:
    """`steps` steps of a fleet, with all measurements taken every `every`th (0: never)."""
    fleet = Fleet(configs, batches=batches)
    state = [fleet.init()]

    def call() -> None:
        for i in range(steps):
            state[0], _ = fleet.step(state[0], measure=every > 0 and i % every == 0)

    return call


def theirs(
    width: int,
    *,
    batches: Batches,
    autocast: bool,
    compiled: bool,
    steps: int = 10,
    depth: int = DEPTH,
    batch: int = BATCH,
    heads: int = 0,
) -> Callable[[], None]:
    """`steps` steps of the plain loop, without measurements. Batches come from our sampler, which costs both alike."""
    torch.manual_seed(0)
    model = PlainDecoder(width=width, depth=depth, heads=heads or width // 64, vocab_size=VOCAB, context=CONTEXT)
    step = training_step(model, lr=LR, autocast=autocast, compiled=compiled)
    seed_K = np.zeros(1, dtype=np.uint64)
    index = [0]

    def call() -> None:
        for _ in range(steps):
            data = batches.train(seed_K, index[0], batch)
            step(data.inputs_KBT[0], data.targets_KBT[0])
            index[0] += 1

    return call


def text() -> Batches:
    """The embedded corpus."""
    return build_batches(LanguageData(context=CONTEXT))


def flops_a_token(width: int) -> tuple[float, float]:
    """Forward and backward matmul FLOPs a token: in the blocks (matmul dtype), and in the head (float32).

    6 N for the weights, N = 12 L d^2, and 12 L T d for scores and weighted values, without the causal half saved.
    """
    return 6 * 12 * DEPTH * width**2 + 12 * DEPTH * CONTEXT * width, 6 * width * VOCAB
