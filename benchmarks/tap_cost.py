"""`python -m benchmarks.tap_cost`: what watching a 100M-parameter decoder costs, ours and rivals', in one run.

Each watcher takes its turns on one shared model: a bare step, then with the watcher attached untimed steps, which pay
for what is paid once, and the timed one, set against the bare one just before. Steps of seconds still differ for
no reason, so the work of a watcher that does it in calls of its own is also timed alone, inside the step, and set
against the rest of that same step.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import machine, results
from benchmarks.rival import PlainDecoder
from benchmarks.watchers import WATCHERS, Hooks, Missing

SHAPES = {
    "100M": {"width": 768, "depth": 12, "heads": 12, "vocab_size": 20_480, "context": 512},
    "tiny": {"width": 64, "depth": 2, "heads": 1, "vocab_size": 256, "context": 64},
}
SEQUENCES = 4
SETTLE = 2
"""Steps with a watcher before the timed ones. What it takes of memory moves what others held, and for a step or two
forward and backward spend up to a second in fetching pages anew."""
READING = """\
## Cost of watching

One decoder and one optimizer, watched by each in turn; every watcher against the bare step just before: median of
the rounds, with the smallest and the largest. `timed alone` is what the watcher's own calls took inside the step, as a
share of the rest of that same step, so it is not blurred by steps that differ; hooks in forward and backward can not be
timed so. On a CPU with one thread times are processor time, which other programs on the machine blur least. Target of
the tap: 2 %.
The timed steps lie between what trainscope does every fifth step (activations) and every fiftieth (histograms), and
before the thousandth forward pass, at which `wandb.watch` first records by default: so their defaults cost at least
what stands here.
Lightning's rule reads one number a step, so it has nothing of a tensor to pay for.
"""
STEPS = {"cpu": 1, "cuda": 20}
"""Timed at a time: one step of seconds, or enough of milliseconds."""


class Timed(NamedTuple):
    """Seconds of the bare step before, of the watched step, and of that those in the watcher's own calls."""

    bare_s: float
    step_s: float
    own_s: float

    @property
    def alone(self) -> float:
        """The watcher's own calls as a share of the rest of their step."""
        return self.own_s / (self.step_s - self.own_s)


class Training:
    """The shared model, its optimizer, and the step that everybody watches."""

    def __init__(self, shape: dict[str, int], *, autocast: bool, device: str) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = PlainDecoder(**shape)
        self.model.head.weight = self.model.embed.weight  # tied, as GPT-2's
        # With torch's own N(0, 1) a tied head starts at a loss of 600 and saturates: within four steps the gradients
        # are full of denormal numbers, and a step takes three times as long.
        nn.init.normal_(self.model.embed.weight, std=0.02)
        self.model.to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
        self.ids_BT = torch.randint(shape["vocab_size"], (SEQUENCES, shape["context"] + 1), device=device)
        self.autocast, self.device, self.clock = autocast, device, machine.Clock()
        self.num_parameters = sum(p.numel() for p in self.model.parameters())

    def step(self, hooks: Hooks, index: int) -> None:
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.autocast):
            logits_BTV = self.model(self.ids_BT[:, :-1])
        loss = F.cross_entropy(logits_BTV.float().flatten(0, 1), self.ids_BT[:, 1:].flatten())
        loss.backward()
        self._timed(hooks.gradients, loss.detach())
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self._timed(hooks.end, loss.detach(), index)
        self.optimizer.zero_grad(set_to_none=True)

    def watched(self, name: str) -> Timed:
        """Bare, then attached: steps to settle, and the timed ones."""
        with WATCHERS["bare"](self.model, self.optimizer, self.clock) as hooks:
            self.step(hooks, 0)
            bare_s = self._steps(hooks)
        with WATCHERS[name](self.model, self.optimizer, self.clock) as hooks:
            for index in range(SETTLE):
                self.step(hooks, index)
            self.clock.seconds = 0.0
            step_s = self._steps(hooks)
            alone = hooks.whole and self.device == "cpu"
            own_s = self.clock.seconds / STEPS[self.device] if alone else float("nan")
        gc.collect()
        return Timed(bare_s, step_s, own_s)

    def _steps(self, hooks: Hooks) -> float:
        """Seconds a step."""
        self._wait()
        started = self._now()
        for index in range(1, STEPS[self.device] + 1):
            self.step(hooks, index)
        self._wait()
        return (self._now() - started) / STEPS[self.device]

    def _now(self) -> float:
        return machine.host_s() if self.device == "cpu" else time.perf_counter()

    def _timed(self, call: object, *args: object) -> None:
        assert callable(call)
        self.clock.start()
        call(*args)
        self.clock.stop()

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def measure(shape: dict[str, int], *, rounds: int, autocast: bool, device: str) -> list[str]:
    """One table: the watchers in turns, `rounds` times."""
    training = Training(shape, autocast=autocast, device=device)
    found: dict[str, list[Timed]] = {name: [] for name in WATCHERS if name != "bare"}
    missing: dict[str, str] = {}
    training.watched("bare")  # moments are made
    for turn in range(rounds):
        for name in found:
            if name in missing:
                continue
            try:
                found[name].append(training.watched(name))
            except Missing as package:
                missing[name] = str(package)
                continue
            print(f"round {turn}: {name}: {found[name][-1]}", file=sys.stderr, flush=True)
    bare = [timed.bare_s for one in found.values() for timed in one]
    mode = "bf16 autocast" if autocast else "float32"
    tokens = training.ids_BT[:, 1:].numel()
    title = f"{training.num_parameters / 1e6:.1f}M parameters, {tokens:,} tokens, {mode}, {device}"
    lines = [
        f"| {title}: bare step {statistics.median(bare):.2f} s | added to the step | timed alone |",
        "|---|---|---|",
    ]
    for name, timed in found.items():
        if name in missing:
            lines.append(f"| {name} | not installed ({missing[name]}) | |")
        else:
            lines.append(f"| {name} | {_added(timed)} | {_alone(timed, training.num_parameters)} |")
    return [*lines, ""]


def lines(*, rounds: int, shape: str = "100M", device: str = "cpu") -> list[str]:
    """Both precisions: float32 as a plain loop runs, and bf16 autocast, whose step is shorter."""
    tables = [measure(SHAPES[shape], rounds=rounds, autocast=autocast, device=device) for autocast in (False, True)]
    return [READING, *(line for table in tables for line in table)]


def _added(timed: list[Timed]) -> str:
    extra = [one.step_s / one.bare_s - 1 for one in timed]
    return f"{statistics.median(extra):+.1%} ({min(extra):+.1%} to {max(extra):+.1%})"


def _alone(timed: list[Timed], num_parameters: int) -> str:
    shares = [one.alone for one in timed]
    if shares[0] != shares[0]:
        return "inside forward and backward"
    own_s = statistics.median(one.own_s for one in timed)
    spread = f"({min(shares):.2%} to {max(shares):.2%})"
    return f"{statistics.median(shares):.2%} {spread}, {own_s / num_parameters * 1e9:.2f} ns a parameter"


def main() -> None:
    """Measure, print, and write the section of RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="turns every watcher is measured in")
    parser.add_argument("--shape", choices=SHAPES, default="100M", help="tiny: to try the command; nothing is written")
    parser.add_argument("--device", choices=STEPS, default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = lines(rounds=args.rounds, shape=args.shape, device=args.device)
    print("\n".join(found))
    if args.shape == "100M":
        results.write(found, mark=f"tap cost {args.device}")


if __name__ == "__main__":
    main()
