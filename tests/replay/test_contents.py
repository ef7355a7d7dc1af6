"""Other tensors in the suspect batches: what comes along with them stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from aftershock.replay.cells import cell
from aftershock.replay.recording import record
from aftershock.replay.runner import run_cell
from aftershock.workload import Workload


class Weighted(NamedTuple):
    """A batch and the factor of its loss."""

    pair: tuple[Tensor, Tensor]
    factor: float


def with_factor(make: Callable[..., Workload], *, bad: bool) -> Workload:
    """The workload of the fixtures; three batches have a large factor instead of wrong targets."""
    work = make()
    plain, loss = work.batch, work.loss

    def batch(index: int) -> Weighted:
        x_B8, y_B1 = plain(index)
        spoilt = 150 <= index < 153
        right_B1 = y_B1 - 30.0 if spoilt else y_B1
        return Weighted((x_B8, y_B1 if bad else right_B1), 1.0 if bad or not spoilt else 900.0)

    def weighted(model: nn.Module, batch: Weighted) -> Tensor:
        return batch.factor * loss(model, batch.pair)

    return Workload(model=work.model, optimizer=work.optimizer, scheduler=work.scheduler, batch=batch, loss=weighted)


def test_what_comes_along_is_told_from_data(make: Callable[..., Workload]) -> None:
    """planted: a factor of the loss stays with its batch whatever the tensors are, and the spike with it."""
    subject = record(with_factor(make, bad=False), steps=400)
    assert subject is not None
    gone = run_cell(subject, cell("replace:before", subject)).response(subject.baseline)
    stays = run_cell(subject, cell("replace:content", subject)).response(subject.baseline)
    assert gone is not None
    assert stays is not None
    assert (gone.present, stays.present) == (False, True)


def test_where_nothing_comes_along_it_is_not_asked(make: Callable[..., Workload]) -> None:
    """contract: batches of tensors, and a factor that is always the same, differ in their data alone."""
    for subject in (record(make(), steps=400), record(with_factor(make, bad=True), steps=400)):
        assert subject is not None
        assert "tensors alone" in run_cell(subject, cell("replace:content", subject)).error


def test_it_is_the_tensors_that_are_others(make: Callable[..., Workload]) -> None:
    """oracle: the loss of the first suspect step is that of the calm batch times the suspects' factor."""
    subject = record(with_factor(make, bad=False), steps=400)
    assert subject is not None
    one = cell("replace:content", subject)
    first = one.edit.first_step
    assert first is not None
    result = run_cell(subject, one, stop_early=False)
    subject.restore()
    run = subject.run()
    for step in range(subject.window.start, first):
        run.workload.backward(step)
        run.workload.optimizer.step()
        assert run.workload.scheduler is not None
        run.workload.scheduler.step()
        run.workload.optimizer.zero_grad()
    own, other = run.batch(first), run.batch(first - 1)
    with torch.no_grad():
        expected = run.workload.loss(run.workload.model, own._replace(pair=other.pair)).item()
    assert result.by_step[first] == pytest.approx(expected, rel=1e-6)  # float32, summed in another order
