"""Trains a specimen in a plain loop and writes a run folder with one row of signals a step, to try detectors on.

Legend: lists run over micro-batches. The loop is any trainer's: nothing in it knows what will happen.
Must not import a specimen: whoever asks brings it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from aftershock.lab.zoo.indicators import Curvatures, Outputs, Tensors, Weights, batch_row, is_adam
from aftershock.lab.zoo.labels import label
from aftershock.lab.zoo.specimen import Specimen, Trial
from aftershock.signals.tap import TensorTap
from aftershock.signals.tensors import Stat
from aftershock.store.writer import RunWriter

LOSS = "loss/train/mean"

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
      every 4 steps. `curvature/all/sharpest`: the same of the sharpest direction (`sharpness`), every 20 steps
    - `param/all/norm` |W|; `param/min/of_first`, the smallest over tensors of |W| / |W at the first step|;
      `update/max/ratio`, the largest of |u| / |W|; `grad/max/over_usual`, the largest of gradient norm / its median
      over the tensor's last 32 steps
    - `grad/all/cosine_previous` = cos(g_t, g_t-1), `update/all/cosine_descent` = cos(u, -g)
    - `optim/max|all/saturated_frac`, `eps_floor_frac`: share of |m / sqrt v| > 0.9 and of v at the floor that eps sets,
      largest over tensors and of all elements; `optim/all/first_norm` |m|, `second_root_sum` = sum sqrt v, and
      `first_over_root` = rms m / mean sqrt v; Adam only
    - `output/rms`, `output/abs_max` of the model's output, `output/log_z_max` its largest log Z;
      `activation/max/abs_max` and `kurtosis`, the largest over the blocks of a `ByteLM`, else over the linear layers
      but the last; `activation/last/rms` of the last of these
    - `attention/min/entropy`: of a `ByteLM`, the smallest over heads of the mean over queries, 4 sequences of the batch
    - `param/qk/spectral_norm`: the largest of W_q and W_k; `update/qk/stable_rank`, `spectral_entropy`: the smallest
      over heads, of the first-order change of W_q' W_k in 10 steps; `param/head/mean_norm`: length of the mean output
      embedding. Every 10 steps
    - `batch/tokens/<stat>` of `signals.batches.batch_stats`; `batch/max/loss`, the largest of a sequence, and
      `loss_over_mean`

    What is of a forward pass is of the step's last (micro-)batch. Between two measurements the last value is held. A
    signal that does not exist for the workload has no column. Ends after `steps` (by default the specimen's), or 50
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
    # A batch is asked for by the curvature, the step and the signals: made once, which its being pure allows.
    workload = replace(trial.workload, batch=functools.lru_cache(maxsize=1)(trial.workload.batch))
    disturbance, model, optimizer = trial.disturbance, workload.model, workload.optimizer
    curvatures, weights, tensors, left = Curvatures(workload), Weights(model), Tensors(model), AFTER_NONFINITE
    stats: list[Stat] = ["param", "grad", "update", "cosines"]
    stats += ("rms_t", "moments") if is_adam(optimizer) else ()
    with TensorTap(model, optimizer, stats=stats, gradients="call") as tap, Outputs(model) as outputs:
        for index in range(length):
            if disturbance is not None:
                disturbance.before_forward(index)
            parts = list(workload.micro_batches(index))
            row = curvatures.row(index) | weights.row(index) | batch_row(parts)
            row[LOSS] = workload.backward(index).item()
            if disturbance is not None:
                disturbance.after_backward(index)
            tap.measure_gradients()
            row |= outputs.row(parts[-1])
            row["optim/all/lr"] = optimizer.param_groups[0]["lr"]
            if workload.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), workload.clip_norm)
            optimizer.step()
            if workload.scheduler is not None:
                workload.scheduler.step()
            optimizer.zero_grad()
            yield index, row
            yield from ((step, tensors.row(values)) for step, values in tap.read(wait=True))
            if left < AFTER_NONFINITE or not math.isfinite(row[LOSS]):
                left -= 1
            if left < 0:
                break
    yield from ((step, tensors.row(values)) for step, values in tap.read())
