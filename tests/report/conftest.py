"""Studies with a planted result, written through the real store: 2 sizes x 2 arms x 7 rates x 2 seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aftershock.config import override
from aftershock.lab.recipe import PAPER_LRS, RunConfig
from aftershock.report.numbers import study_numbers
from aftershock.store.study import RunRef, write_manifest
from aftershock.store.writer import RunWriter

SIZES = {"w32-d2": (32, 2, 5.95, 0.1), "w64-d3": (64, 3, 6.05, 0.03)}
"""width, depth, initial loss, first rate at which the arm without qk-layernorm diverges."""

ARMS = {"qk-norm": "head", "no-qk-norm": "off"}
STEPS = 160

StudyBuilder = Callable[..., Path]


@pytest.fixture(scope="session")
def build_study(tmp_path_factory: pytest.TempPathFactory) -> StudyBuilder:
    """build_study(arms=, sizes=, rates=, seeds=, leave=): `leave(ref)` names how a run is left: done, open, missing."""

    def build(
        *,
        arms: Sequence[str] = tuple(ARMS),
        sizes: Sequence[str] = tuple(SIZES),
        rates: Sequence[float] = PAPER_LRS,
        seeds: Sequence[int] = (0, 1),
        leave: Callable[[RunRef], str] = lambda ref: "done",
        tensors: bool = True,
    ) -> Path:
        folder = tmp_path_factory.mktemp("study")
        refs = [
            RunRef(run_id=f"{_index:012x}", size=size, arm=arm, lr=lr, seed=seed)
            for _index, (size, arm, lr, seed) in enumerate(
                ((size, arm, lr, seed) for size in sizes for arm in arms for lr in rates for seed in seeds), 0xA1B2C3
            )
        ]
        write_manifest(folder, name="qk-norm", title="qk-layernorm on and off", runs=refs)
        for ref in refs:
            if leave(ref) != "missing":
                _write_run(folder / "runs" / ref.run_id, ref, seal=leave(ref) == "done", tensors=tensors)
        return folder

    return build


@pytest.fixture(scope="session")
def full_study(build_study: StudyBuilder) -> Path:
    """The whole grid, all runs at their end: without qk-layernorm w32-d2 fails from 0.1, w64-d3 from 0.03."""
    return build_study()


@pytest.fixture(scope="session")
def numbers(full_study: Path) -> dict[str, Any]:
    """`study_numbers` of the whole grid; read only."""
    return study_numbers(full_study)


def _write_run(folder: Path, ref: RunRef, *, seal: bool, tensors: bool) -> None:
    width, depth, l0, limit = SIZES[ref.size]
    off = ARMS[ref.arm] == "off"
    config = override(
        RunConfig(),
        {"model.width": width, "model.depth": depth, "model.qk_norm": ARMS[ref.arm], "optim.lr": ref.lr,
         "seed": ref.seed, "data_seed": ref.seed, "steps": STEPS},
    )  # fmt: skip
    rng = np.random.default_rng([width, ref.seed, round(-1000 * math.log10(ref.lr)), off])
    best = 1.95 - 0.0018 * width
    away = math.log10(ref.lr / 0.02)
    final = best + 0.22 * away**2 * (1.6 if away < 0 else 0.35) + 0.012 * rng.standard_normal()
    diverges = off and ref.lr >= limit * 0.99
    died = int(STEPS * (0.42 - 0.11 * math.log10(ref.lr / limit))) + 3 * ref.seed if diverges else None
    steps = died if died is not None and seal else STEPS if seal else STEPS // 2
    with RunWriter.open(folder, config=config, flush_every=1000) as run:
        losses = _losses(rng, l0, final, steps, died)
        for step in range(steps):
            run.scalars(step, _scalars(config, step, losses[step], l0, rng))
            if step % 10 == 0:
                row = _stats(rng, ref, depth, step, died, off, tensors)
                run.stats(step, list(row), np.array(list(row.values())))
        if died is not None and seal:
            run.scalars(died, {"loss/train/ce": math.nan})
            run.event("diverged", died, signal="loss/train/ce", value=math.nan)
        if seal:
            summary: dict[str, Any] = {
                "final_loss": None if died is not None else final,
                "initial_loss": l0,
                "final_train_loss": None if died is not None else losses[-1],
                "diverged_step": died,
                "steps": steps,
                "tokens": steps * 1024,
                "num_params": 12 * depth * width**2 + 512 * width,
                "num_block_params": 12 * depth * width**2,
                "seconds": 3.5 + width / 20,
                "fleet_size": 14,
            }
            run.close("diverged" if died is not None else "finished", summary)


def _losses(rng: np.random.Generator, l0: float, final: float, steps: int, died: int | None) -> np.ndarray:
    step = np.arange(steps)
    curve = final + (l0 - final) * np.exp(-step / (0.16 * STEPS)) + 0.03 * rng.standard_normal(steps)
    if died is not None:
        curve = curve + np.exp((step - died + 14) / 7.0)
    return curve


def _scalars(config: RunConfig, step: int, loss: float, l0: float, rng: np.random.Generator) -> dict[str, float]:
    scale = min(1.0, (step + 1) / 25) * (0.5 + 0.5 * math.cos(math.pi * step / STEPS))
    row = {
        "loss/train/ce": float(loss),
        "loss/train/total": float(loss) * 1.001,
        "optim/all/lr": config.optim.lr * scale,
        "grad/all/norm": float(0.4 + 0.2 * rng.random() + 2 * math.exp(-step / 9)),
    }
    return row | {"loss/eval/ce": l0} if step == 0 else row


def _stats(
    rng: np.random.Generator, ref: RunRef, depth: int, step: int, died: int | None, off: bool, tensors: bool
) -> dict[str, float]:
    growth = 1 + 40 * ref.lr**0.8 * step / STEPS
    row: dict[str, float] = {}
    for block in range(depth):
        peak = 3.0 * growth * (1.5 - 0.2 * block)
        calm = 1.6 * peak if off else min(peak, 5 + growth**0.3)
        logit = peak * math.exp(9.0 * (step / died) ** 2) if died else calm
        row[f"attn/blocks.{block}/max_logit"] = logit * (1 + 0.05 * rng.random())
        row[f"attn/blocks.{block}/entropy"] = 3.2 / (1 + math.log10(1 + logit))
        row[f"output/blocks.{block}/rms"] = 1 + 0.4 * block + ref.lr * step / 20
    row["output/head/log_z"] = 5.5 + 0.2 * rng.standard_normal()
    names = ["embed", "final_norm", "head"]
    names += [f"blocks.{b}.{part}" for b in range(depth) for part in ("attn.qkv", "attn.out", "mlp.in", "mlp.out")]
    for name in names if tensors else []:
        for kind, level in (("param", 0.12), ("grad", 3e-3), ("update", 0.8)):
            row[f"{kind}/{name}/rms"] = level * (1 + 0.1 * rng.random())
    return row
