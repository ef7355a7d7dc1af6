"""The GPU figures: a fleet of 16 at width 256 against 16 compiled runs, and the MFU of the largest model that fits."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from aftershock.lab.fleet import Fleet
from aftershock.lab.recipe import DecoderConfig, LanguageData, OptimConfig, PrecisionConfig, RunConfig
from benchmarks import work
from benchmarks.rival import PlainDecoder, training_step

PEAK_BF16_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}
"""Dense bf16 by the vendor's datasheets."""
STEPS = 20


def fleet_of_16() -> str:
    """Seconds a step of 16 compiled bf16 runs, one after another, over those of our fleet of 16."""
    batches = work.text()
    fleet = Fleet([work.config(256, bf16=True, seed=k) for k in range(16)], batches=batches, device="cuda")
    state = fleet.init()
    ids = torch.randint(0, work.VOCAB, (work.BATCH, work.CONTEXT), device="cuda")
    model = PlainDecoder(width=256, depth=work.DEPTH, heads=4, vocab_size=work.VOCAB, context=work.CONTEXT).cuda()
    plain = training_step(model, lr=work.LR, autocast=True, compiled=True)
    for _ in range(5):
        state, _ = fleet.step(state)
        plain(ids, ids)

    def ours() -> None:
        nonlocal state
        for _ in range(STEPS):
            state, _ = fleet.step(state)

    ratios = []
    for _ in range(5):
        together, alone = _seconds(ours), _seconds(lambda: [plain(ids, ids) for _ in range(STEPS)])
        ratios.append(16 * alone / together)
    name, gain = torch.cuda.get_device_name(), statistics.median(ratios)
    return f"Fleet of 16 at width 256 on {name}: {gain:.2f}x 16 compiled runs (target 6x)."


def largest_model() -> str:
    """MFU of the largest member of the paper's family that trains at batch 8 x 512 tokens."""
    for width, depth in ((4096, 24), (2048, 24), (1024, 24), (768, 12)):
        config = RunConfig(
            data=LanguageData(context=512),
            model=DecoderConfig(width=width, depth=depth, heads=width // 64),
            optim=OptimConfig(lr=work.LR),
            precision=PrecisionConfig(matmul="bfloat16"),
            batch_size=8,
        )
        try:
            fleet = Fleet([config], device="cuda")
            state = fleet.init()
            for _ in range(3):
                state, _ = fleet.step(state)
        except torch.OutOfMemoryError:
            continue

        def call(fleet: Fleet = fleet) -> None:
            nonlocal state
            for _ in range(STEPS):
                state, _ = fleet.step(state)

        flops = (6 * 12 * depth * width**2 + 12 * depth * 512 * width) * 8 * 512 * STEPS
        name = torch.cuda.get_device_name()
        peak = next((p for key, p in PEAK_BF16_TFLOPS.items() if key in name), None)
        rate = flops / _seconds(call) / 1e12
        share = f"{rate / peak:.0%} of {peak:.0f}" if peak else "peak unknown"
        return f"Largest model that fits: width {width}, depth {depth}: {rate:.0f} TFLOP/s, MFU {share}."
    return "No member of the family fits this GPU."


def _seconds(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - started
