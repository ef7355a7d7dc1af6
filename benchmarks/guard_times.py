"""The clocks of `guard_cost`: a step, what comes after its backward, and what is not done at every step.

Must not import `guard_cost`, which makes tables of them.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import guards, machine
from benchmarks.guards import Side
from benchmarks.tap_cost import STEPS, Training

REPEATS = 5
"""Times that a snapshot, a restoration and a checkpoint are taken on their own."""


class Timed(NamedTuple):
    """Seconds a step, and of them those outside forward and backward (nan on a GPU, where nobody waits)."""

    step_s: float
    own_s: float


def build(shape: dict[str, int], *, autocast: bool, device: str) -> Training:
    """A model that trains quietly, embeddings as small as GPT-2's, with one step of its optimizer behind it."""
    training = Training(shape, autocast=autocast, device=device)
    with torch.no_grad():
        training.model.get_parameter("embed.weight").mul_(0.02)
    forward_backward(training, training.ids_BT)
    training.optimizer.step()
    training.optimizer.zero_grad(set_to_none=True)
    return training


def forward_backward(training: Training, ids_BT: Tensor) -> Tensor:
    """The loss, detached; gradients are in place."""
    with torch.autocast(training.device, dtype=torch.bfloat16, enabled=training.autocast):
        logits_BTV = training.model(ids_BT[:, :-1])
    loss = F.cross_entropy(logits_BTV.float().flatten(0, 1), ids_BT[:, 1:].flatten())
    loss.backward()
    return loss.detach()


def now(training: Training) -> float:
    """Seconds: of this processor where one thread does all, else of the wall once the GPU has done all."""
    if training.device == "cuda":
        torch.cuda.synchronize()
    return machine.host_s() if training.device == "cpu" else time.perf_counter()


def timed(training: Training, call: Callable[[], object]) -> float:
    """Seconds of one call, as `now` counts them."""
    started = now(training)
    call()
    return now(training) - started


def whole_steps(training: Training, side: Side) -> Timed:
    """One step of seconds, or enough of milliseconds on a GPU."""
    num_steps, own_s = STEPS[training.device], 0.0
    started = now(training)
    for _ in range(num_steps):
        before = machine.host_s()
        ids_BT = side.fetch()
        fetched = machine.host_s()
        loss = forward_backward(training, ids_BT)
        behind = machine.host_s()
        side.finish(loss)
        own_s += fetched - before + machine.host_s() - behind
    step_s = (now(training) - started) / num_steps
    return Timed(step_s, own_s / num_steps if training.device == "cpu" else float("nan"))


class Kept:
    """Gradients of one backward, put back before each use: so what comes after it is timed without it."""

    def __init__(self, training: Training) -> None:
        self._training = training
        self.loss = forward_backward(training, training.ids_BT)
        self._grads = [(p, p.grad) for p in training.model.parameters() if p.grad is not None]
        training.optimizer.zero_grad(set_to_none=True)

    def back(self) -> None:
        """Fresh copies are in place."""
        for p, grad in self._grads:
            p.grad = grad.clone()

    def finish(self, side: Side) -> float:
        """Seconds of fetch and finish."""
        self.back()
        return timed(self._training, lambda: (side.fetch(), side.finish(self.loss)))


def count_waits(kept: Kept, side: Side) -> int:
    """Times that the host waits for the GPU in one finish."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        kept.back()
        torch.cuda.set_sync_debug_mode("warn")
        side.fetch()
        side.finish(kept.loss)
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in found)


class Once(NamedTuple):
    """Seconds of what is not done at every step, and bytes. `kept_s`: a rewind of a guard that keeps incidents."""

    first_s: float
    take_s: float
    restore_s: float
    rewind_s: float
    kept_s: float
    incident_s: float
    save_s: float
    restart_s: float
    ring_bytes: int
    checkpoint_bytes: int


def on_its_own(training: Training, kept: Kept) -> Once:
    """Snapshots, a restoration, rewinds by the default policy after three NaN losses, and a checkpoint by hand."""
    middle = statistics.median
    with tempfile.TemporaryDirectory() as folder:
        rewind_s, ring = _ring(training, kept)
        gc.collect()
        kept_s, incident_s = _planted(kept, _guard(training, Path(folder) / "guard"))
        gc.collect()
        saves = [machine.timed(lambda: guards.save(training, Path(folder))) for _ in range(3)]
        path = Path(folder) / "checkpoint.pt"
        restarts = [machine.timed(lambda: guards.restart(training, path)) for _ in range(3)]
        return Once(
            first_s=ring.first_s,
            take_s=ring.take_s,
            restore_s=ring.restore_s,
            rewind_s=rewind_s,
            kept_s=kept_s,
            incident_s=incident_s,
            save_s=middle(saves),
            restart_s=middle(restarts),
            ring_bytes=ring.nbytes,
            checkpoint_bytes=path.stat().st_size,
        )


class Ring(NamedTuple):
    """Seconds of a snapshot into new memory, into memory at hand, and back; the bytes of all."""

    first_s: float
    take_s: float
    restore_s: float
    nbytes: int


def _ring(training: Training, kept: Kept) -> tuple[float, Ring]:
    """A rewind without a folder, and the ring."""
    guard = _guard(training, None)
    rewind_s, _ = _planted(kept, guard)
    recorder, takes = guard.recorder, []
    for number in range(1, 2 * recorder.slots + REPEATS):
        step = guard.step_count + number
        takes.append(timed(training, lambda step=step: recorder.take(step, 0)))
    newest = recorder.healthy[-1]
    restores = [timed(training, lambda: recorder.restore(newest, rng=False)) for _ in range(REPEATS)]
    # The planted failure's snapshot, from before the first step, holds one slot and no moments.
    first, later = takes[: recorder.slots - 1], takes[recorder.slots :]
    middle = statistics.median
    return rewind_s, Ring(middle(first), middle(later), middle(restores), recorder.nbytes)


def _guard(training: Training, folder: Path | None) -> guards.Guard:
    return guards.Guard(training.model, training.optimizer, clip_norm=guards.MAX_NORM, folder=folder)


def _planted(kept: Kept, guard: guards.Guard) -> tuple[float, float]:
    """Wall seconds of the third NaN loss in a row, which rewinds, and of the first, which opens an incident."""
    kept.back()
    guard.step(kept.loss)
    nan, took = torch.full_like(kept.loss, float("nan")), []
    for _ in range(3):
        kept.back()
        took.append(machine.timed(lambda: guard.step(nan)))
    assert "1 rewind" in guard.report(), guard.report()
    guard.close()
    return took[2], took[0]
