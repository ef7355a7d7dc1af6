"""A workload: model + optimizer + data + loss, everything that one training step needs, in plain PyTorch.

A batch is a pure function of its index, so going back, leaving out and running again are one line each. Holds no loop:
who trains a workload (a recipe of the lab, the guard's checks, a replay) brings their own.
Must not import any other room.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler


@dataclass(kw_only=True)
class Workload:
    """What to train, step by step: `loss(model, batch(i))`, backward, clip, `optimizer.step()`, `scheduler.step()`.

    - `batch`: the batch of a global index; the same index gives the same batch, whatever came before
    - `loss`: the mean loss of a batch, a scalar with a graph
    - `clip_norm`: global norm to which gradients are clipped; None leaves them
    - `accumulate`: micro-batches a step: `batch(i)` is then a sequence of that many, and the step's loss their mean
    - `held_out`: the loss on data that no batch holds, read without changing the model; None where there is none

    Example:
        workload = Workload(model=model, optimizer=optimizer, batch=lambda i: data[i], loss=mean_squared_error)
    """

    model: nn.Module
    optimizer: Optimizer
    batch: Callable[[int], Any]
    loss: Callable[[nn.Module, Any], Tensor]
    scheduler: LRScheduler | None = None
    clip_norm: float | None = None
    accumulate: int = 1
    held_out: Callable[[nn.Module], float] | None = None

    def micro_batches(self, index: int) -> Iterator[Any]:
        """The parts of step `index`'s batch, one after another. Raises ValueError when they are not `accumulate`."""
        batch = self.batch(index)
        if self.accumulate == 1:
            yield batch
            return
        if len(batch) != self.accumulate:
            raise ValueError(
                f"batch({index}) has {len(batch)} micro-batches and the workload accumulates {self.accumulate}; "
                "return a sequence of that many"
            )
        yield from batch

    def backward(self, index: int) -> Tensor:
        """Gradients of step `index` into `.grad`; the step's mean loss, detached."""
        total = None
        for part in self.micro_batches(index):
            loss = self.loss(self.model, part) / self.accumulate
            loss.backward()
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        return total
