"""`python -m benchmarks.replay_stacked`: would cells of a replay run faster as one fleet? Gradients of many members at
once, by `torch.func` on stacked weights, against as many single ones, on models of the zoo at the start of an incident.

The question behind it: a stacked cell would have to have the bits of one that runs alone, or controls say nothing.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from aftershock.bench.diagnosis import capture
from aftershock.lab.zoo.registry import specimen
from aftershock.replay.subject import Subject
from benchmarks import machine, results
from benchmarks.replay_grid import SPECIMENS

MEMBERS, REPEATS = 16, 5
READING = f"""\
## Cells of a replay as one fleet

Forward and backward of {MEMBERS} members with the same weights and batch: stacked, and one after another; processor
time of one core, the shortest of {REPEATS}. `ratio`: stacked over one after another. `other bits`: tensors whose
gradient differs from that of a member alone.
"""


class Timed(NamedTuple):
    """Seconds of all members both ways, and tensors with other bits."""

    name: str
    stacked_s: float
    alone_s: float
    differ: int
    tensors: int


class _Loss(nn.Module):
    """A workload's loss as a module, so that its weights can be given from outside."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.model, self._loss = subject.workload.model, subject.workload.loss

    def forward(self, batch: Any) -> Tensor:
        return self._loss(self.model, batch)


def measure(name: str, *, seed: int) -> Timed:
    """One incident, at its snapshot."""
    subject = capture(specimen(name), seed)
    if subject is None:
        raise SystemExit(f"{name} did not spike with seed {seed}")
    subject.restore()
    run, wrapped = subject.run(), _Loss(subject)
    batch = run.batch(run.index_of(subject.window.start))
    weights = {key: p.detach() for key, p in wrapped.named_parameters()}
    stack = {key: torch.stack([p] * MEMBERS) for key, p in weights.items()}
    together = vmap(grad_and_value(lambda own: functional_call(wrapped, own, (batch,))))

    def alone() -> dict[str, Tensor]:
        wrapped.zero_grad()
        wrapped(batch).backward()
        return {key: p.grad for key, p in wrapped.named_parameters() if p.grad is not None}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some kernels have no batching rule, and say so
        stacked = together(stack)[0]
        stacked_s = _shortest(lambda: together(stack))
    single = {key: grad.clone() for key, grad in alone().items()}
    differ = sum(not bool((stacked[key] == grad).all()) for key, grad in single.items())
    return Timed(name, stacked_s, _shortest(lambda: [alone() for _ in range(MEMBERS)]), differ, len(single))


def _shortest(work: Callable[[], object]) -> float:
    taken = []
    for _ in range(REPEATS):
        begun = time.process_time()
        work()
        taken.append(time.process_time() - begun)
    return min(taken)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    done = [measure(name, seed=arguments.seed) for name in SPECIMENS]
    lines = [
        READING,
        machine.line(),
        "",
        "| incident | stacked, ms | one after another, ms | ratio | other bits |",
        "|---|---|---|---|---|",
        *(
            f"| {one.name} | {1e3 * one.stacked_s:.1f} | {1e3 * one.alone_s:.1f} | {one.stacked_s / one.alone_s:.2f} | "
            f"{one.differ} of {one.tensors} |"
            for one in done
        ),
        "",
    ]
    print("\n".join(lines))
    results.write(lines, mark="replay stacked")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
