"""Trains a specimen in a plain loop and writes a run folder with one row of signals a step, to try detectors on.

Legend: lists run over micro-batches. The loop is any trainer's: nothing in it knows what will happen.
Must not import a specimen: whoever asks brings it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aftershock.lab.zoo.labels import label
from aftershock.lab.zoo.nets import ByteLM
from aftershock.lab.zoo.specimen import Specimen, Trial
from aftershock.signals.curvature import Method, NoCurvature, directional_curvature
from aftershock.signals.tap import TensorTap
from aftershock.signals.tensors import Stat
from aftershock.store.writer import RunWriter
from aftershock.workload import Workload

LOSS = "loss/train/mean"

CURVATURE_EVERY = 4
"""Curvature costs three gradients; between two measurements the last value is held."""
AFTER_NONFINITE = 50
"""Steps trained on after the loss is first not finite: enough to see that it does not come back."""


def record(specimen: Specimen, *, seed: int, folder: str | Path, faulty: bool = True, steps: int | None = None) -> Path:
    """Train `specimen` and write the run folder `folder`; its path. Measuring does not change a bit of the training.

    Signals of a row, each of its own step:

    - `loss/train/mean`; `optim/all/lr`: the rate of the first group at this step
    - `grad/all/norm`: over all parameters, as the backward pass left it, before clipping; `update/all/norm`: length of
      the weights' change
    - `optim/max/rms_t`, `optim/max/rms_t_share`: the largest over tensors (see `signals.tensors.statistics`); Adam only
    - `grad/embed/over_median`: the largest over embeddings of gradient norm / median gradient norm of the other tensors
    - `output/log_z`: mean logsumexp of the logits, where the model's outputs are more than one a row
    - `attention/max/logit`: of a `ByteLM`, the largest over layers, heads and batch
    - `curvature/all/directional`: curvature along the step against the edge of stability with momentum, 1 at the edge
      (`Curvature.momentum_edge_share`), of the step's (first micro-)batch before the step; from step 4 on, measured
      every 4 steps

    A signal that does not exist for the workload has no column. Ends after `steps` (by default the specimen's), or 50
    steps after the loss was first not finite. The summary holds `finite`, `steps`, `held_out_loss` (null without one)
    and `spikes`, how many `label` finds. Random numbers are torch's, started at `seed` and put back.

    Example:
        record(specimen("slingshot"), seed=0, folder="runs/slingshot-0")
    """
    length = specimen.steps if steps is None else steps
    if length < 1:
        raise ValueError(f"steps must be at least 1, got {length}")
    config = {"specimen": specimen.name, "seed": seed, "faulty": faulty, "steps": length}
    tags = {"kind": specimen.kind, "cause": specimen.cause}
    with RunWriter.open(folder, config=config, tags=tags) as run, torch.random.fork_rng([]):
        torch.manual_seed(seed)
        trial = specimen.build(seed, faulty=faulty)
        losses: list[float] = []
        for step, row in _rows(trial, length):
            run.scalars(step, row)
            losses += [value for name, value in row.items() if name == LOSS]
        read = trial.workload.held_out
        finite = math.isfinite(losses[-1])
        summary = {
            "finite": finite,
            "steps": len(losses),
            "held_out_loss": None if read is None else read(trial.workload.model),
            "spikes": len(label(losses)),
        }
        run.close("finished" if finite else "diverged", summary)
    return Path(folder)


def _rows(trial: Trial, length: int) -> Iterator[tuple[int, dict[str, float]]]:
    """Trains step by step; yields signals as they come in, the tap's one step late."""
    workload, disturbance = trial
    model, optimizer = workload.model, workload.optimizer
    curvature, left = _Curvature(workload), AFTER_NONFINITE
    stats: list[Stat] = ["grad", "update", "rms_t"] if _adam(optimizer) else ["grad", "update"]
    with TensorTap(model, optimizer, stats=stats, gradients="call") as tap, _Output(model) as output:
        for index in range(length):
            if disturbance is not None:
                disturbance.before_forward(index)
            row = curvature.row(index)
            row[LOSS] = workload.backward(index).item()
            if disturbance is not None:
                disturbance.after_backward(index)
            tap.measure_gradients()
            row |= output.row()
            row["optim/all/lr"] = optimizer.param_groups[0]["lr"]
            if workload.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), workload.clip_norm)
            optimizer.step()
            if workload.scheduler is not None:
                workload.scheduler.step()
            optimizer.zero_grad()
            yield index, row
            yield from ((step, _overall(values)) for step, values in tap.read(wait=True))
            if left < AFTER_NONFINITE or not math.isfinite(row[LOSS]):
                left -= 1
            if left < 0:
                break
    yield from ((step, _overall(values)) for step, values in tap.read())


def _adam(optimizer: torch.optim.Optimizer) -> bool:
    return all("betas" in group for group in optimizer.param_groups)


def _overall(values: dict[str, float]) -> dict[str, float]:
    """The tap's signals of all tensors as the few of the whole model."""
    row = {name: values[name] for name in ("grad/all/norm", "update/all/norm")}
    largest = {
        "optim/max/rms_t": "/rms_t",
        "optim/max/rms_t_share": "/rms_t_share",
        "grad/embed/over_median": "/over_median",
    }
    for name, ending in largest.items():
        found = [value for place, value in values.items() if place.endswith(ending)]
        if found:
            # max() would step over a nan, which here is the news.
            row[name] = math.nan if any(map(math.isnan, found)) else max(found)
    return row


class _Output:
    """What the model's last forward pass put out, seen through a hook."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._last = model, torch.zeros(0)

    def __enter__(self) -> _Output:
        self._handle = self._model.register_forward_hook(self._keep)
        if isinstance(self._model, ByteLM):
            self._model.watch = True
        return self

    def __exit__(self, *error: Any) -> None:
        self._handle.remove()
        if isinstance(self._model, ByteLM):
            self._model.watch = False

    def _keep(self, model: nn.Module, inputs: Any, output: Tensor) -> None:
        self._last = output.detach()

    def row(self) -> dict[str, float]:
        row = {}
        if self._last.shape[-1] > 1:
            row["output/log_z"] = self._last.double().logsumexp(-1).mean().item()
        if isinstance(self._model, ByteLM):
            row["attention/max/logit"] = self._model.max_logit()
        return row


class _Curvature:
    """Directional curvature, measured now and then and held in between."""

    def __init__(self, workload: Workload) -> None:
        self._workload, self._held = workload, dict[str, float]()
        self._method: Method = "auto"

    def row(self, index: int) -> dict[str, float]:
        if index and index % CURVATURE_EVERY == 0:
            self._measure(index)
        return dict(self._held)

    def _measure(self, index: int) -> None:
        model, optimizer = self._workload.model, self._workload.optimizer
        batch = next(self._workload.micro_batches(index))
        value = math.nan
        with contextlib.suppress(NoCurvature):
            found = directional_curvature(
                model,
                lambda: self._workload.loss(model, batch),
                lr=optimizer.param_groups[0]["lr"],
                optimizer=optimizer if _adam(optimizer) else None,
                method=self._method,
            )
            value = found.momentum_edge_share
            # A kernel that has no second derivative now has none later: it is tried once.
            self._method = "finite_difference" if found.method == "finite_difference" else "auto"
        self._held = {"curvature/all/directional": value}
