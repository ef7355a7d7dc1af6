"""`python -m benchmarks.run`: every speed figure the project quotes, as ratios, written into RESULTS.md.

One process, one thread, rivals and ours in turns; figures are medians of pairwise ratios with quartiles.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch

from benchmarks import machine, results, tap_cost, work

TOKENS = work.BATCH * work.CONTEXT
RIVALS = {
    "eager fp32": {"autocast": False, "compiled": False},
    "eager bf16 autocast": {"autocast": True, "compiled": False},
    "compiled fp32": {"autocast": False, "compiled": True},
    "compiled bf16 autocast": {"autocast": True, "compiled": True},
}


def solo(width: int, *, rounds: int, limit_bf16: float, limit_fp32: float) -> list[str]:
    """One model: ours in the bf16 layout, all measurements every 10 steps, against four modes of the plain loop."""
    batches = work.text()
    steps = 10
    calls: dict[str, Callable[[], object]] = {
        "ours, bf16 layout": work.ours([work.config(width, bf16=True)], batches=batches),
        "ours, fp32": work.ours([work.config(width, bf16=False)], batches=batches),
    }
    calls |= {name: work.theirs(width, batches=batches, steps=steps, **mode) for name, mode in RIVALS.items()}
    seconds = machine.in_turns(calls, rounds=rounds)
    block_flops, head_flops = work.flops_a_token(width)
    ideal_s = TOKENS * (block_flops / limit_bf16 + head_flops / limit_fp32) / 1e9
    took = statistics.median(seconds["ours, bf16 layout"]) / steps
    lines = [f"| width {width} | tokens/s | ours, bf16 layout, is faster by |", "|---|---|---|"]
    for name, values in seconds.items():
        middle, low, high = machine.ratio(values, seconds["ours, bf16 layout"])
        rate = TOKENS * steps / statistics.median(values)
        lines.append(f"| {name} | {rate:,.0f} | {middle:.2f}x ({low:.2f} to {high:.2f}) |")
    lines.append("")
    lines.append(f"Share of the core's matmul limit reached by the bf16 layout: {ideal_s / took:.0%}.")
    return [*lines, ""]


def measuring(width: int, *, rounds: int) -> str:
    """What all measurements at interval 10 cost."""
    batches = work.text()
    run = [work.config(width, bf16=True)]
    calls: dict[str, Callable[[], object]] = {
        "on": work.ours(run, batches=batches, every=10),
        "off": work.ours(run, batches=batches, every=0),
    }
    seconds = machine.in_turns(calls, rounds=rounds)
    middle, low, high = machine.ratio(seconds["on"], seconds["off"])
    cost = f"{middle - 1:+.1%} ({low - 1:+.1%} to {high - 1:+.1%})"
    return f"| all measurements every 10 steps, width {width} | {cost} | at most 3 % |"


def fleet(*, rounds: int) -> list[str]:
    """A fleet of 16 at width 16, 128 tokens a step, against 16 runs one after another: ours, and the plain loop."""
    batches = work.text()
    shape = {"depth": 2, "batch": 1, "heads": 1}
    configs = [work.config(16, bf16=False, seed=seed, **shape) for seed in range(16)]
    alone = [work.ours([config], batches=batches, steps=1) for config in configs]
    plain = [work.theirs(16, batches=batches, autocast=False, compiled=False, steps=1, **shape) for _ in configs]
    seconds = machine.in_turns(
        {
            "fleet": work.ours(configs, batches=batches, steps=1, every=0),
            "alone": lambda: [call() for call in alone],
            "plain": lambda: [call() for call in plain],
        },
        rounds=rounds * 10,
    )
    lines = []
    for name, title in (
        ("alone", "our own runs, one after another"),
        ("plain", "plain loops, eager fp32, one after another"),
    ):
        middle, low, high = machine.ratio(seconds[name], seconds["fleet"])
        lines.append(
            f"| fleet of 16 at width 16, against {title} | {middle:.2f}x ({low:.2f} to {high:.2f}) | at least 2x |"
        )
    return lines


def cores(*, seconds: float = 10.0) -> str:
    """Steps a second of two processes of one thread against one: width 128, bf16 layout."""
    rates = []
    for number in (1, 2, 1, 2):
        with multiprocessing.get_context("spawn").Pool(number) as pool:
            rates.append(sum(pool.map(_steps_a_second, [seconds] * number)))
    one, two = max(rates[0], rates[2]), max(rates[1], rates[3])
    return f"| two processes on two cores, against one | {two / one:.2f}x | at least 1.9x |"


def memory(num_replicas: int = 16) -> list[str]:
    """Peak memory that training adds, a fleet of K against K times a run alone: resident, and without the heap's holes.

    With every large block mapped on its own (glibc's MALLOC_MMAP_THRESHOLD_), which is slower, what is resident is what
    tensors hold; as it is, the heap keeps freed blocks between living ones.
    """
    title = f"memory of a fleet of {num_replicas} at width 64, against {num_replicas} runs alone"
    lines = []
    for what, settings in (("resident", {}), ("held by tensors", {"MALLOC_MMAP_THRESHOLD_": "65536"})):
        os.environ.update(settings)
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            alone, together = pool.apply(_peak_mb, (1,)), pool.apply(_peak_mb, (num_replicas,))
        for name in settings:
            del os.environ[name]
        lines.append(f"| {title}: {what} | {together / (num_replicas * alone):.2f}x | at most 1.1x |")
    return lines


def _steps_a_second(seconds: float) -> float:
    torch.set_num_threads(1)
    call = work.ours([work.config(128, bf16=True)], batches=work.text())
    call()
    time.sleep(0.5)  # so that all processes run at the same time
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        call()
        count += 10
    return count / (time.perf_counter() - started)


def _peak_mb(num_replicas: int) -> float:
    torch.set_num_threads(1)
    batches = work.text()
    # A step of the smallest fleet first: code and kernels are loaded once whatever K is.
    work.ours([work.config(64, bf16=False, batch=1)], batches=batches, steps=2)()
    machine.reset_peak_memory()
    before = machine.memory_mb("VmRSS")
    work.ours([work.config(64, bf16=False, seed=k) for k in range(num_replicas)], batches=batches)()
    return machine.memory_mb("VmHWM") - before


def gpu() -> list[str]:
    """The two GPU figures, where there is one."""
    if not torch.cuda.is_available():
        return ["No GPU on this machine: the fleet of 16 at width 256 and the largest model's MFU are not measured."]
    from benchmarks.gpu import fleet_of_16, largest_model

    return [fleet_of_16(), largest_model()]


def main() -> None:
    """Measure everything and write RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="turns a figure is measured in")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    bf16, fp32 = machine.matmul_limit(torch.bfloat16), machine.matmul_limit(torch.float32)
    lines = ["| machine | |", "|---|---|", *(f"| {key} | {value} |" for key, value in machine.describe().items())]
    lines += [f"| matmul limit of one core | {bf16:.0f} GFLOP/s bf16, {fp32:.0f} fp32 ({bf16 / fp32:.1f}x) |", ""]
    for width in (128, 256):
        lines += solo(width, rounds=rounds, limit_bf16=bf16, limit_fp32=fp32)
        print("\n".join(lines[-9:]), file=sys.stderr, flush=True)
    lines += ["| figure | measured | target |", "|---|---|---|", *fleet(rounds=rounds)]
    lines += [measuring(128, rounds=2 * rounds), measuring(256, rounds=2 * rounds), cores(), *memory(), "", *gpu(), ""]
    print("\n".join(lines))
    results.write(lines, mark="measured")
    watching = tap_cost.lines(rounds=max(3, rounds // 2))
    print("\n".join(watching))
    results.write(watching, mark="tap cost cpu")


if __name__ == "__main__":
    main()
