"""Planted studies: runs that follow a known law of size and rate, as the forecast sees them and as a folder on disk."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aftershock.forecast.observations import Observation, Observations, Reading, judged
from aftershock.lab.presets import tiny_run
from aftershock.lab.recipe import PAPER_LRS, RunConfig
from aftershock.lab.sizes import parse_size, with_size
from aftershock.store.study import RunRef, write_manifest
from aftershock.store.writer import RunWriter

L0, BEST, BROKEN = 6.4, 2.5, 3.5
CENTER = 4.3
"""log10 N at which the law's level holds."""


KAPPA, LOGIT_SLOPE = 1.0, 0.8
"""log10 of the early logit where runs fail, and its slope over log10 rate."""

Recorded = Callable[[RunRef], Mapping[str, Sequence[float]]]
Plant = Callable[..., Observations]
WriteStudy = Callable[..., Path]


@pytest.fixture(scope="session")
def config() -> RunConfig:
    base = tiny_run(steps=200)
    return dataclasses.replace(base, model=dataclasses.replace(base.model, qk_norm="off"), measure_every=4)


@pytest.fixture(scope="session")
def plant(config: RunConfig) -> Plant:
    """Runs whose failing rate is, in decades, level + slope (n - CENTER) + sigma z, z by seed of a size.

    The early logit reaches KAPPA at the failing rate, but for `noise`. Runs `dies` decades above it end in nan.
    """

    def build(
        *,
        level: float = -0.9,
        slope: float = -0.3,
        sigma: float = 0.2,
        sizes: Sequence[str] = ("16x2", "32x2", "48x2"),
        rates: Sequence[float] = PAPER_LRS,
        seeds: Sequence[int] = (0, 1, 2),
        noise: float = 0.05,
        dies: float = math.inf,
        draw: int = 0,
    ) -> Observations:
        generator = np.random.default_rng(draw)
        runs = []
        for size in map(parse_size, sizes):
            for seed in seeds:
                mean = level + slope * (math.log10(size.num_block_params) - CENTER)
                starts = mean + sigma * generator.standard_normal()
                for lr in rates:
                    above = math.log10(lr) - starts
                    died = above > dies
                    early = KAPPA + LOGIT_SLOPE * above + noise * generator.standard_normal()
                    values = {
                        "early_logit": early,
                        "logit": 1 + 2 * above,
                        "abs_log_z": 0.7,
                        "output_rms": 0.5 + 0.3 * above,
                    }
                    readings = {key: Reading(value, math.inf if died else value) for key, value in values.items()}
                    grad = -3 - 0.8 * (math.log10(lr) + 2) - 0.4 * (math.log10(size.num_block_params) - CENTER)
                    readings["grad_rms"] = Reading(-math.inf, math.inf) if died else Reading(grad, grad)
                    slow = 0.1 * (math.log10(lr) + 2) ** 2
                    runs.append(
                        Observation(
                            run_id=f"{size.label}-{lr:g}-{seed}",
                            size=size.label,
                            width=size.width,
                            depth=size.depth,
                            num_params=size.num_block_params,
                            lr=lr,
                            seed=seed,
                            initial_loss=L0,
                            final_loss=None if died else BROKEN if above >= 0 else BEST + slow,
                            fails=False,
                            seconds=1e-4 * size.num_block_params,
                            readings=readings,
                        )
                    )
        return Observations("planted", "no_qk_norm", config, judged(runs), ())

    return build


@pytest.fixture
def write_study(tmp_path: Path, config: RunConfig) -> WriteStudy:
    """`write_study(sizes, rates, seeds, change=, signals=, loss=)`: a study folder whose runs are written, not trained.

    `change(ref, config)` may alter a run's settings; `signals(ref)` gives {name: values}; `loss(ref)` None diverges.
    """

    def build(
        *,
        name: str = "study",
        sizes: Sequence[str] = ("16x2", "32x2"),
        rates: Sequence[float] = (1e-2, 1e-1, 1.0),
        seeds: Sequence[int] = (0, 1),
        arm: str = "no_qk_norm",
        change: Callable[[RunRef, RunConfig], RunConfig] = lambda ref, config: config,
        signals: Recorded | None = None,
        loss: Callable[[RunRef], float | None] = lambda ref: BROKEN if ref.lr > 0.5 else BEST,
        every: int = 4,
    ) -> Path:
        folder = tmp_path / name
        refs = [
            RunRef(run_id=f"{name}-{s}-{lr}-{i}", size=s, arm=arm, lr=lr, seed=i)
            for s in sizes
            for lr in rates
            for i in seeds
        ]
        write_manifest(folder, name=name, title="", runs=refs)
        for ref in refs:
            own = with_size(config, parse_size(ref.size))
            own = dataclasses.replace(own, optim=dataclasses.replace(own.optim, lr=ref.lr), seed=ref.seed)
            writer = RunWriter.open(folder / "runs" / ref.run_id, config=change(ref, own))
            columns = (signals or recorded)(ref)
            for row in range(max(map(len, columns.values()), default=0)):
                values = np.array([column[row] for column in columns.values()])
                writer.stats(row * every, list(columns), values)
            final = loss(ref)
            writer.close("finished" if final is not None else "diverged", summary(ref, final))
        return folder

    return build


def recorded(ref: RunRef) -> dict[str, list[float]]:
    """Seven measurements of what the forecast reads: the early logit is at index 1, ends are the mean of the last 5."""
    scale = ref.lr / 0.1
    return {
        "attn/blocks.0/max_abs_logit": [4.0, 5.0 * scale, 6.0, 8.0, 8.0, 8.0, 8.0],
        "output/head/abs_log_z": [6.0] * 7,
        "output/blocks.0/rms": [1.0] * 7,
        "output/blocks.1/rms": [2.0] * 7,
        "grad_clipped/blocks.0.mlp.in/rms": [1e-3] * 7,
    }


def summary(ref: RunRef, final: float | None) -> dict[str, Any]:
    return {
        "initial_loss": L0,
        "final_loss": final,
        "num_block_params": parse_size(ref.size).num_block_params,
        "seconds": 1.0,
    }
