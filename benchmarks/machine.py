"""What the figures were measured on, and the ceilings of one core of it."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def describe() -> dict[str, str]:
    """CPU, cores, memory, versions."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")), "")
    flags = next((line for line in info.splitlines() if line.startswith("flags")), "").split()
    bf16 = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags]
    family = [
        line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith(("cpu family", "model\t"))
    ][:2]
    return {
        "CPU": f"{model or platform.processor()} (family/model {'/'.join(family)})",
        "cores used": "1, except where said",
        "bf16 instructions": ", ".join(bf16) or "none",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def line() -> str:
    """The same in one line, of what runs on any number of cores."""
    return "; ".join(f"{key}: {value}" for key, value in describe().items() if key != "cores used")


def matmul_limit(dtype: torch.dtype, *, size: int = 1024) -> float:
    """GFLOP/s of the fastest of ten square products on this core: what no training step can exceed."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    torch.mm(a, b)
    best = min(timed(lambda: torch.mm(a, b)) for _ in range(10))
    return 2 * size**3 / best / 1e9


def reset_peak_memory() -> None:
    """Start this process's peak resident memory anew (Linux: proc(5), /proc/PID/clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def memory_mb(field: str) -> float:
    """`VmRSS` (resident now) or `VmHWM` (its peak) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def host_s() -> float:
    """Processor time where one thread does all, which other programs blur least; else the wall's."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


class Clock:
    """Adds up what passes between `start` and `stop`, which take and ignore what a hook is called with."""

    def __init__(self) -> None:
        self.seconds, self._started = 0.0, 0.0

    def start(self, *_: Any) -> None:
        self._started = host_s()

    def stop(self, *_: Any) -> None:
        self.seconds += host_s() - self._started


def timed(function: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def in_turns(functions: dict[str, Callable[[], object]], *, rounds: int) -> dict[str, list[float]]:
    """Seconds of each call of each function, called in turns, so that the machine's mood falls on all alike."""
    for function in functions.values():
        function()
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            seconds[name].append(timed(function))
    return seconds


def ratio(slow: list[float], fast: list[float]) -> tuple[float, float, float]:
    """Median of the pairwise ratios slow/fast, with their quartiles."""
    ratios = [s / f for s, f in zip(slow, fast, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return statistics.median(ratios), low, high
