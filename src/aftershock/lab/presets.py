"""Sweeps with a name: the demo's stability map."""

from __future__ import annotations

from aftershock.lab.recipe import DecoderConfig, LanguageData, OptimConfig, RunConfig
from aftershock.lab.sweep import SweepSpec


def tiny_run(*, steps: int = 300, context: int = 64, batch_size: int = 8) -> RunConfig:
    """The paper's settings at a CPU's length: warm-up of 5 % of the steps as in the paper, byte-level text."""
    return RunConfig(
        data=LanguageData(context=context),
        model=DecoderConfig(width=32, depth=2, heads=2),
        optim=OptimConfig(warmup_steps=max(1, steps // 20)),
        steps=steps,
        batch_size=batch_size,
    )


def demo() -> SweepSpec:
    """The stability map of `make demo`: two sizes, with and without qk-layernorm, the 7-rate ladder, two seeds."""
    return SweepSpec(
        name="demo",
        title="Where training breaks: learning rate against size, with and without qk-layernorm",
        base=tiny_run(),
        sizes=("32x2", "64x3"),
        arms=("baseline", "no_qk_norm"),
        seeds=(0, 1),
    )
