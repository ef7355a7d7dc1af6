"""Controls: the recorded bits again, or the reason why not: chance, a strike from outside, another loader."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from aftershock.lab.zoo import nets
from aftershock.replay.controls import control_cells, judge_controls, recompute, run_controls
from aftershock.replay.recording import record
from aftershock.replay.run import Cell, Edit, Run
from aftershock.replay.runner import run_cell, run_grid
from aftershock.replay.subject import Subject
from aftershock.workload import Workload

Build = Callable[..., Workload]


def test_unchanged_replays_are_the_record(subject: Subject) -> None:
    """equivalence: bit for bit, in this process and in forked ones."""
    found = run_controls(subject)
    assert (found.kind, found.why, found.came_back, found.first_difference) == ("deterministic", "none", 3, None)
    assert found.spread == found.off == 0.0
    assert found.recompute is None
    assert "3 of 3 unchanged replays have the recorded losses bit for bit" in found.words
    forked = judge_controls(subject, list(run_grid(subject, control_cells())))
    assert forked.kind == "deterministic"


def test_what_struck_from_outside_does_not_come_back(make: Build) -> None:
    """planted: one weight is multiplied by 2^10 while recording; the data are the recorded ones."""
    workload = make()
    workload.batch = _healthy(workload)

    def flip(step: int) -> None:
        if step == 150:
            with torch.no_grad():
                next(workload.model.parameters())[0, 0] *= 1024
                list(workload.model.parameters())[2][0, 0] *= 1024

    subject = record(workload, steps=260, before_step=flip)
    assert subject is not None
    assert subject.window.onset == 150
    found = run_controls(subject)
    assert (found.kind, found.why, found.came_back) == ("not_reproducible", "hardware", 0)
    assert found.first_difference == 150
    assert found.spread == 0.0
    assert found.off > 0
    assert found.recompute is not None
    assert found.recompute.agree
    assert found.recompute.batch
    assert "Not reproducible" in found.words
    assert "hardware" in found.words


def test_a_struck_gradient_shows_a_step_later(make: Build) -> None:
    """planted: the loss of step 151 is the first to differ, and computing it again gives the same twice."""
    workload = make()
    workload.batch = _healthy(workload)

    def strike(step: int) -> None:
        if step == 150:
            for p in workload.model.parameters():
                assert p.grad is not None
                p.grad.fill_(1e4)
            for group in workload.optimizer.param_groups:
                group["lr"] *= 100  # Adam bounds a gradient; the rate goes back with the scheduler's next step

    subject = record(workload, steps=260, after_backward=strike)
    assert subject is not None
    found = run_controls(subject)
    assert found.first_difference == 151
    assert found.why == "hardware"


def test_a_loader_that_gives_other_data_is_named(make: Build) -> None:
    """planted: the bad batches came once only."""
    workload = make()
    given, healthy = workload.batch, _healthy(workload)
    served: set[int] = set()

    def once(index: int) -> object:
        fresh = index not in served
        served.add(index)
        return given(index) if fresh else healthy(index)

    workload.batch = once
    subject = record(workload, steps=260)
    assert subject is not None
    found = run_controls(subject)
    assert (found.kind, found.why, found.first_difference) == ("not_reproducible", "loader", 150)
    assert found.recompute is not None
    assert found.recompute.agree
    assert found.recompute.batch is False


def test_chance_is_told_from_hardware(make: Build) -> None:
    """planted: noise that no random state holds, in the loss alone: two recomputes differ, the spike comes back."""
    workload = make()
    plain, noise = workload.loss, torch.Generator().manual_seed(5)

    def shaken(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return plain(model, batch) * (1 + 1e-3 * torch.rand((), generator=noise))

    workload.loss = shaken
    subject = record(workload, steps=260)
    assert subject is not None
    found = run_controls(subject)
    assert (found.kind, found.why, found.came_back) == ("reproducible", "nondeterminism", 3)
    assert found.first_difference == subject.window.start
    assert found.recompute is not None
    assert not found.recompute.agree
    assert 0 < found.spread
    assert "use_deterministic_algorithms" in found.words


def test_a_recompute_steps_nothing(subject: Subject) -> None:
    """contract: and it gives the recorded loss of a step of the middle."""
    held = set(subject.states)
    found = recompute(subject, 130)
    assert found.losses == (subject.recorded[130],) * 2
    assert found.agree
    assert found.batch
    assert set(subject.states) == held


def test_too_few_controls_and_none_that_ran(subject: Subject) -> None:
    """contract."""
    with pytest.raises(ValueError, match="at least 3"):
        run_controls(subject, number=2)
    with pytest.raises(ValueError, match="Without a control"):
        judge_controls(subject, list(run_grid(subject, control_cells(), processes=1, minutes=1e-9)))


class Set(Edit):
    """Settings of every parameter group, or the loss's clip."""

    def __init__(self, *, clip_norm: float | None = None, **settings: float) -> None:
        self._clip_norm, self._settings = clip_norm, settings

    def apply(self, run: Run) -> None:
        run.clip_norm = self._clip_norm
        for group in run.workload.optimizer.param_groups:
            group.update(self._settings)


def test_the_slingshot_again_and_what_removes_it() -> None:
    """planted: addition mod 31 spikes again; a larger eps and a tenth of the rate remove it, a clip does not."""
    train, _ = nets.sums(31, seed=0)
    model = nets.seeded(0, lambda: nets.ModularMlp(31, embed=32, hidden=64))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, betas=(0.9, 0.95), fused=True)
    workload = Workload(model=model, optimizer=optimizer, batch=lambda index: train, loss=nets.sum_loss)
    subject = record(workload, steps=1000, tail=0)
    assert subject is not None
    base = subject.baseline
    control = run_cell(subject, control_cells()[0])
    assert all(loss == subject.recorded.get(step, loss) for step, loss in control.by_step.items())
    assert control.stopped == "spike"
    present = {}
    for name, edit in {"eps": Set(eps=1e-5), "lr": Set(lr=1e-3), "clip": Set(clip_norm=1e-4)}.items():
        response = run_cell(subject, Cell(name=name, family="test", edit=edit), steps=110).response(base)
        assert response is not None
        present[name] = response.present
    assert present == {"eps": False, "lr": False, "clip": True}


def _healthy(workload: Workload) -> Callable[[int], object]:
    """The workload's batches without the bad ones."""
    batch = workload.batch
    return lambda index: batch(index + 500) if 150 <= index < 153 else batch(index)
