"""The plain training loop of a replay: one `Run`, step by step, with what each step measured.

The same order as in the recording: gradients, clip, optimizer, scheduler, gradients to None. Knows no subject and no
cell. Must not import the runner or the lab.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aftershock.replay.run import Run
from aftershock.workload import Workload


class Taken(NamedTuple):
    """One step: its loss, the norm of its gradient before clipping, the length of the weights' change, and the rate of
    the first group by its schedule. What was not measured is nan."""

    step: int
    loss: float
    grad_norm: float = math.nan
    update_norm: float = math.nan
    lr: float = math.nan


def take_steps(run: Run, start: int, stop: int) -> Iterator[Taken]:
    """Train from step `start` up to `stop`, or until `run.keep_going` says no."""
    for step in range(start, stop):
        taken = take_step(run, step)
        yield taken
        if not run.keep_going(step, taken.loss):
            return


def take_step(run: Run, step: int) -> Taken:
    """One step. Cost beside the training's own: a norm of the gradients and a copy of the weights."""
    workload = run.workload
    run.step = step
    for hook in run.before_step:
        hook(step)
    loss = backward(run, step)
    for hook in run.after_backward:
        hook(step)
    params = trained(run)
    grads = [p.grad for p in params if p.grad is not None]
    if run.clip_norm is not None and grads:
        grad_norm = torch.nn.utils.clip_grad_norm_(params, run.clip_norm)
    else:
        grad_norm = length(grads)
    before = [p.detach().clone() for p in params]
    rate = float(workload.optimizer.param_groups[0]["lr"])
    workload.optimizer.step()
    if workload.scheduler is not None:
        workload.scheduler.step()
    workload.optimizer.zero_grad(set_to_none=True)
    update = length([p.detach() - old for p, old in zip(params, before, strict=True)])
    for hook in run.after_step:
        hook(step)
    return Taken(step, loss.item(), grad_norm.item(), update.item(), rate)


def backward(run: Run, step: int) -> Tensor:
    """Gradients of a step into `.grad`; its mean loss, detached."""
    index, count = run.index_of(step), run.workload.accumulate
    total = None
    for part, batch in enumerate(parts(run.workload, run.batch(index), index)):
        run.part = part
        loss = run.loss(run.workload.model, run.transform(batch)) / count
        loss.backward()
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None
    return total


def parts(workload: Workload, batch: Any, index: int) -> list[Any]:
    """The micro-batches of a batch. Raises ValueError when they are not `workload.accumulate`."""
    if workload.accumulate == 1:
        return [batch]
    if len(batch) != workload.accumulate:
        raise ValueError(
            f"batch {index} has {len(batch)} micro-batches and the workload accumulates {workload.accumulate}; "
            "return a sequence of that many"
        )
    return list(batch)


def trained(run: Run) -> list[Tensor]:
    """The model's parameters as they are now, in its order; an edit may have put in others."""
    return list(run.workload.model.parameters())


def length(tensors: list[Tensor]) -> Tensor:
    """The 2-norm of all elements, in float32 at least."""
    if not tensors:
        return torch.zeros(())
    wide = [t.detach() if t.dtype in (torch.float32, torch.float64) else t.detach().float() for t in tensors]
    norms = [norm.to(torch.float64) for norm in torch._foreach_norm(wide)]
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
