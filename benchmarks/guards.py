"""Those that make a training step safe, each as a context: ours, and rivals by their public rules.

Two rules are derived anew from their definitions, so that nothing has to be installed; Lightning's is the real one, or
`watchers.Missing`. None of them hooks into forward or backward: all they do is in `Side.fetch` and `Side.finish`.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aftershock.guard.guard import Guard
from benchmarks import machine, watchers
from benchmarks.tap_cost import Training

EVERY = 50
"""Steps between snapshots, and between checkpoints."""
MAX_NORM = 1.0
"""All clip to this global norm, the bare loop too."""
NUM_BATCHES = 64
"""Different ones, so that nobody learns a single batch by heart and spikes at the end of that."""


class Side(NamedTuple):
    """`fetch`: the next batch, and what is due between two steps; `finish`: all that comes after backward."""

    fetch: Callable[[], Tensor]
    finish: Callable[[Tensor], object]
    guard: Guard | None = None


Safety = Callable[[Training, Path], AbstractContextManager[Side]]


@contextmanager
def bare(training: Training, _: Path) -> Iterator[Side]:
    """Nobody guards: clip, step, clear."""
    yield Side(_fetch(training), lambda _: _plain_finish(training))


@contextmanager
def aftershock(training: Training, _: Path) -> Iterator[Side]:
    """Ours, as its users set it up; it clips where the bare loop does."""
    with Guard(training.model, training.optimizer, clip_norm=MAX_NORM, snapshot_every=EVERY) as guard:
        batches = guard.batches(shuffled(training) * 1_000)
        yield Side(lambda: next(batches), guard.step, guard)


@contextmanager
def lightning(training: Training, _: Path) -> Iterator[Side]:
    """The plain loop with Lightning's SpikeDetection behind it: it finds, stops the run, and mends nothing."""
    with watchers.lightning() as hooks:
        index = itertools.count()

        def finish(loss: Tensor) -> None:
            _plain_finish(training)
            hooks.end(loss, next(index))

        yield Side(_fetch(training), finish)


@contextmanager
def skip_step(training: Training, _: Path) -> Iterator[Side]:
    """OLMo-style: the decision is a number on the device that everything the optimizer does is multiplied with."""
    rule = SkipStep(training.optimizer)

    def finish(loss: Tensor) -> None:
        norm = nn.utils.clip_grad_norm_(training.model.parameters(), MAX_NORM)
        rule.step(rule.decide(loss, norm))
        training.optimizer.zero_grad(set_to_none=True)

    yield Side(_fetch(training), finish)


@contextmanager
def zclip(training: Training, _: Path) -> Iterator[Side]:
    """ZClip in place of clipping to a fixed norm."""
    rule = ZClip(training.model)

    def finish(_: Tensor) -> None:
        rule.clip()
        training.optimizer.step()
        training.optimizer.zero_grad(set_to_none=True)

    yield Side(_fetch(training), finish)


@contextmanager
def checkpoint(training: Training, folder: Path) -> Iterator[Side]:
    """The plain loop that saves model and optimizer every so often: what a restart by hand needs."""
    count = itertools.count(1)

    def finish(_: Tensor) -> None:
        _plain_finish(training)
        if next(count) % EVERY == 0:
            save(training, folder)

    yield Side(_fetch(training), finish)


SAFETIES: dict[str, Safety] = {
    "bare": bare,
    "Aftershock Guard, default": aftershock,
    "Lightning SpikeDetection (finds only)": lightning,
    "OLMo-style skip-step (skips only)": skip_step,
    "ZClip (clips only)": zclip,
    "checkpoint and restart by hand": checkpoint,
}


def shuffled(training: Training) -> list[Tensor]:
    """The training's batch with its tokens in other orders: always the same ones."""
    draw, ids_BT = torch.Generator().manual_seed(0), training.ids_BT
    orders = [torch.randperm(ids_BT.numel(), generator=draw) for _ in range(NUM_BATCHES)]
    return [ids_BT.flatten()[order.to(ids_BT.device)].view_as(ids_BT) for order in orders]


def save(training: Training, folder: Path) -> Path:
    """`torch.save` of model and optimizer, into the page cache: nothing waits for the disk."""
    path, new = folder / "checkpoint.pt", folder / "checkpoint.pt.new"
    torch.save({"model": training.model.state_dict(), "optimizer": training.optimizer.state_dict()}, new)
    return new.replace(path)


def restart(training: Training, path: Path) -> None:
    """Back to a checkpoint within the process; a new process and its imports would come on top."""
    state = torch.load(path, map_location=training.device)
    training.model.load_state_dict(state["model"])
    training.optimizer.load_state_dict(state["optimizer"])


class SkipStep:
    """AdamW times s in {0, 1}: s = 0 where loss or norm lies more than 6 sample deviations above its last 128.

    Every product with s stays on the device: decay, moments, step counter and update. The windows are full from the
    start, so the rule's whole work is done at every step; what it decides does not change what it costs. One tensor
    after another, as in the public code, which has no fused kernel for it; the optimizer's own moments are used.
    """

    WINDOW, SIGMAS = 128, 6.0

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        device = optimizer.param_groups[0]["params"][0].device
        values_W = torch.linspace(0.0, 20.0, self.WINDOW, device=device)
        self._losses, self._norms = (deque(values_W.unbind(), maxlen=self.WINDOW) for _ in range(2))

    def decide(self, loss: Tensor, norm: Tensor) -> Tensor:
        """0-dim: 1. to take the step, 0. to skip it."""
        ok = torch.ones((), dtype=torch.bool, device=loss.device)
        for window, value in ((self._losses, loss), (self._norms, norm)):
            std, mean = torch.std_mean(torch.stack(tuple(window)))
            ok = ok & (value - mean <= self.SIGMAS * std)
            window.append(value)
        return ok.to(torch.float32)

    @torch.no_grad()
    def step(self, s: Tensor) -> None:
        group = self._optimizer.param_groups[0]
        (beta1, beta2), lr = group["betas"], group["lr"]
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self._optimizer.state[p]
            moment, square, step = state["exp_avg"], state["exp_avg_sq"], state["step"]
            step.add_(s)
            p.mul_(1 - s * (lr * group["weight_decay"]))
            moment.lerp_(p.grad, s * (1 - beta1))
            square.mul_(1 - s * (1 - beta2)).add_((p.grad * p.grad).mul_(s * (1 - beta2)))
            below = square.sqrt().div_((1 - beta2**step).sqrt()).add_(group["eps"])
            p.add_(torch.div(moment, below, out=below).mul_(-s * lr / (1 - beta1**step)))


class ZClip:
    """Norms whose z-score exceeds 2.5 are clipped to mean + 2.5 sigma / (z / 2.5), all to 1; one `.item()` a step.

    Mean and variance start from 25 norms and move by 0.03 with each norm as clipped by its z-score.
    """

    WARMUP, LIMIT, DECAY = 25, 2.5, 0.97

    def __init__(self, model: nn.Module) -> None:
        self._params = list(model.parameters())
        self._first: list[float] = []
        self._mean = self._var = 0.0

    def clip(self) -> None:
        grads = [p.grad for p in self._params if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))).item()
        factor = min(self._target(norm), MAX_NORM) / (norm + 1e-6)
        if factor < 1:
            torch._foreach_mul_(grads, factor)

    def _target(self, norm: float) -> float:
        if len(self._first) < self.WARMUP:
            self._first.append(norm)
            self._mean, self._var = statistics.fmean(self._first), statistics.pvariance(self._first)
            return norm
        sigma = math.sqrt(self._var)
        z = (norm - self._mean) / (sigma + 1e-6)
        target = self._mean + self.LIMIT * sigma / (z / self.LIMIT) if z > self.LIMIT else norm
        self._mean = self.DECAY * self._mean + (1 - self.DECAY) * target
        self._var = self.DECAY * self._var + (1 - self.DECAY) * (target - self._mean) ** 2
        return target


class Shares:
    """Seconds in parts of `guard.step`: the optimizer, what is measured and decided before it, and what after."""

    def __init__(self, guard: Guard) -> None:
        self.seconds: dict[str, float] = {"begin": 0.0, "optimize": 0.0, "end": 0.0}
        for name in self.seconds:
            setattr(guard.steps, name, self._timed(name, getattr(guard.steps, name)))

    def _timed(self, name: str, call: Callable[..., object]) -> Callable[..., object]:
        def timed(*args: object, **settings: object) -> object:
            started = machine.host_s()
            result = call(*args, **settings)
            self.seconds[name] += machine.host_s() - started
            return result

        return timed


def _fetch(training: Training) -> Callable[[], Tensor]:
    batches = itertools.cycle(shuffled(training))
    return lambda: next(batches)


def _plain_finish(training: Training) -> None:
    nn.utils.clip_grad_norm_(training.model.parameters(), MAX_NORM)
    training.optimizer.step()
    training.optimizer.zero_grad(set_to_none=True)
