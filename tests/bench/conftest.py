"""A corpus without training: noise with spikes that the gradient norm foretells, and quiet runs."""

from __future__ import annotations

import random

import pytest

from aftershock.bench.corpus import Signal, Trace, place_targets

STEPS = 420


def make_trace(specimen: str, seed: int, *, lead: int = 3, spikes: tuple[int, ...] = (220, 320)) -> Trace:
    """A loss that rises at each of `spikes` and peaks 3 steps on; the gradient norm rises `lead` steps before that."""
    rng = random.Random(f"{specimen}-{seed}")
    loss = [2.2 + rng.gauss(0, 0.02) for _ in range(STEPS)]
    grad = [0.24 + abs(rng.gauss(0, 0.03)) for _ in range(STEPS)]
    for onset in spikes:
        loss[onset : onset + 7] = [2.7, 3.3, 4.1, 5.1, 4.0, 3.0, 2.6]
        grad[onset - lead : onset + 4] = [8.0] * (lead + 4)
    found = [(onset, onset + 3, onset + 7) for onset in spikes]
    targets, num_steps = place_targets(found, fault=None, num_steps=STEPS)
    signals = {"loss/train/mean": loss, "grad/all/norm": grad}
    series = {name: Signal(list(range(num_steps)), values[:num_steps]) for name, values in signals.items()}
    return Trace(specimen, "spontaneous" if spikes else "healthy", seed, series, targets, num_steps)


@pytest.fixture(scope="session")
def traces() -> list[Trace]:
    """Two specimens, one of them healthy, with four seeds each."""
    spiky = [make_trace("spiky", seed) for seed in range(4)]
    return spiky + [make_trace("quiet", seed, spikes=()) for seed in range(4)]
