"""Cells: what a change does, what an unchanged one must not, and that no cell reaches the next."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import nn

from aftershock.lab.zoo import nets
from aftershock.replay.recording import record
from aftershock.replay.run import CONTROL, Cell, Edit, Run
from aftershock.replay.runner import CellResult, run_cell, run_grid
from aftershock.replay.subject import Subject
from aftershock.workload import Workload


class Do(Edit):
    """Whatever a function does, from a step on."""

    def __init__(self, act: Callable[[Run], object], *, first_step: int | None = None) -> None:
        self._act, self._first = act, first_step

    @property
    def first_step(self) -> int | None:
        return self._first

    def apply(self, run: Run) -> None:
        self._act(run)


def cell(name: str, act: Callable[[Run], object], *, first_step: int | None = None, full: bool = False) -> Cell:
    return Cell(name=name, family="test", edit=Do(act, first_step=first_step), full=full)


def rate(factor: float) -> Callable[[Run], object]:
    def act(run: Run) -> None:
        scheduler = run.workload.scheduler
        if scheduler is not None:
            scheduler.base_lrs = [lr * factor for lr in scheduler.base_lrs]
        for group in run.workload.optimizer.param_groups:
            group["lr"] *= factor

    return act


def to_float64(run: Run) -> None:
    model, before = run.workload.model, [p.data for p in run.workload.model.parameters()]
    held = [dict(run.workload.optimizer.state[p]) for p in model.parameters()]
    for p, state in zip(model.parameters(), held, strict=True):
        p.data = p.data.double()
        p.grad = None
        run.workload.optimizer.state[p] = {k: v.double() if v.ndim else v for k, v in state.items()}

    def back() -> None:
        for p, data, state in zip(model.parameters(), before, held, strict=True):
            p.grad, p.data = None, data
            run.workload.optimizer.state[p] = state

    run.undo.append(back)


def without_the_bad(run: Run) -> None:
    run.index_of = lambda step: step + 500 if 150 <= step < 153 else step


class TestOneCell:
    def test_a_control_has_the_recorded_bits(self, subject: Subject) -> None:
        """equivalence: every loss from the snapshot to ten spike lengths after the spike."""
        found = run_cell(subject, CONTROL, stop_early=False)
        assert found.by_step == {s: v for s, v in subject.recorded.items() if s >= subject.window.start}
        assert len(found.losses) == len(found.grad_norms) == len(found.updates) == subject.full - subject.window.start
        assert found.stopped == "end"
        assert found.held_out is not None
        assert found.error == ""

    def test_what_it_measures_beside(self, make: Callable[..., Workload], subject: Subject) -> None:
        """oracle: norms and distance against a loop written out by hand."""
        found = run_cell(subject, CONTROL, steps=3)
        subject.restore()
        model, optimizer = subject.workload.model, subject.workload.optimizer
        start = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        after = start
        for i in range(3):
            before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
            loss = subject.workload.backward(subject.window.start + i)
            grad = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            optimizer.step()
            assert subject.workload.scheduler is not None
            subject.workload.scheduler.step()
            optimizer.zero_grad()
            after = nn.utils.parameters_to_vector(model.parameters()).detach()
            assert found.losses[i] == loss.item()
            assert found.grad_norms[i] == pytest.approx(grad.norm().item(), rel=1e-5)  # another order of summing
            assert found.updates[i] == pytest.approx((after - before).norm().item(), rel=1e-4)  # float32 differences
        assert found.distance == pytest.approx((after - start).norm().item(), rel=1e-4)
        assert found.held_out is None, "three steps are not ten spike lengths"

    def test_the_fault_taken_away_takes_the_spike_away(self, subject: Subject) -> None:
        """planted: without the bad batches there is none; with a tenth of the rate there still is."""
        base = subject.baseline
        cured, slower = (
            run_cell(subject, cell(name, act)).response(base)
            for name, act in (("data", without_the_bad), ("lr*0.1", rate(0.1)))
        )
        assert cured is not None
        assert not cured.present
        assert slower is not None
        assert slower.present

    @pytest.mark.parametrize("act", [to_float64, rate(0.3), without_the_bad])
    def test_nothing_is_left_of_a_cell(self, subject: Subject, act: Callable[[Run], object]) -> None:
        """equivalence: the control after it is the control before it, bit for bit."""
        before = run_cell(subject, CONTROL, steps=30)
        other = run_cell(subject, cell("other", act), steps=60)
        assert (other.error == "" and other.losses[:30] != before.losses) or act is without_the_bad
        after = run_cell(subject, CONTROL, steps=30)
        assert after.losses == before.losses
        assert after.updates == before.updates

    def test_an_edit_that_leaves_something_is_found(self, subject: Subject) -> None:
        """planted: a frozen parameter that is not thawed; the fault names it."""
        model = subject.workload.model

        def freeze(run: Run) -> None:
            next(run.workload.model.parameters()).requires_grad_(False)

        with pytest.raises(RuntimeError, match="inner.weight"):
            run_cell(subject, cell("freeze", freeze), steps=3)
        next(model.parameters()).requires_grad_(True)
        assert run_cell(subject, CONTROL, steps=3).losses == tuple(subject.recorded[100 + i] for i in range(3))

    def test_a_failing_edit_is_a_result(self, subject: Subject) -> None:
        """contract: with its words, and undone."""

        def fail(run: Run) -> None:
            run.workload.clip_norm = 7.0
            run.undo.append(lambda: setattr(run.workload, "clip_norm", None))
            raise ValueError("there is no attention here")

        found = run_cell(subject, cell("qk", fail), steps=3)
        assert found.stopped == "error"
        assert found.error == "ValueError: there is no attention here"
        assert subject.workload.clip_norm is None
        assert found.response(subject.baseline) is None

    def test_an_edit_may_end_its_cell(self, subject: Subject) -> None:
        """contract: `keep_going`."""

        def end(run: Run) -> None:
            run.keep_going = lambda step, loss: step < 104

        found = run_cell(subject, cell("end", end))
        assert (found.stopped, len(found.losses)) == ("edit", 5)

    def test_hooks_come_in_order(self, subject: Subject) -> None:
        """contract: with the loop's step; the transform sees a micro-batch, and the step it belongs to."""
        seen: list[tuple[str, int]] = []

        def listen(run: Run) -> None:
            def transform(batch: object) -> object:
                seen.append(("transform", run.step))
                return batch

            run.before_step.append(lambda step: seen.append(("before", step)))
            run.after_backward.append(lambda step: seen.append(("backward", step)))
            run.after_step.append(lambda step: seen.append(("after", step)))
            run.transform = transform

        run_cell(subject, cell("listen", listen), steps=2)
        names = ["before", "transform", "backward", "after"]
        assert seen == [(name, step) for step in (100, 101) for name in names]


class TestStopping:
    def test_clear_answers_stop_early_and_mean_the_same(self, subject: Subject) -> None:
        """equivalence: present or not is what the full length says."""
        base = subject.baseline
        for name, act, expected in (("control", lambda run: None, "spike"), ("data", without_the_bad, "quiet")):
            short, whole = (run_cell(subject, cell(name, act), stop_early=early) for early in (True, False))
            assert short.stopped == expected
            assert whole.stopped == "end"
            assert len(short.losses) < len(whole.losses)
            assert short.losses == whole.losses[: len(short.losses)]
            answers = short.response(base), whole.response(base)
            assert answers[0] is not None
            assert answers[1] is not None
            assert answers[0].present == answers[1].present
            assert answers[0].peak_excess == answers[1].peak_excess
            assert not answers[0].complete
            assert answers[1].complete

    def test_a_full_cell_is_never_stopped(self, subject: Subject) -> None:
        """contract."""
        found = run_cell(subject, cell("full", lambda run: None, full=True))
        assert found.stopped == "end"
        assert found.first + len(found.losses) == subject.full

    def test_a_spike_that_comes_late_is_waited_for(self, subject: Subject) -> None:
        """planted: the bad batches come 3 steps after the recorded end."""

        def later(run: Run) -> None:
            run.index_of = lambda step: step - 6 if step >= 156 else step + 500 if step >= 150 else step

        found = run_cell(subject, cell("later", later)).response(subject.baseline)
        assert found is not None
        assert found.present
        assert found.onset == 156


class TestGrid:
    def test_workers_give_what_this_process_gives(self, subject: Subject) -> None:
        """equivalence: forked or not, with a shared prefix or without, every cell has the same bits."""
        late = cell("late", rate(0.1), first_step=140)
        later = cell("later", without_the_bad, first_step=150)
        cells = [CONTROL, cell("data", without_the_bad), late, later, cell("float64", to_float64)]
        held = set(subject.states)
        forked = {r.name: r for r in run_grid(subject, cells, processes=2)}
        alone = {r.name: r for r in run_grid(subject, cells, processes=1)}
        single = {c.name: run_cell(subject, c) for c in cells}
        for name in single:
            for other in (forked, alone):
                assert other[name]._replace(seconds=0.0) == single[name]._replace(seconds=0.0)
        assert set(subject.states) == held, "the states of shared prefixes are forgotten"

    def test_a_worker_that_dies_is_reported(self, subject: Subject) -> None:
        """planted: by its cell's name and exit code; the others come in."""
        cells = [CONTROL, cell("dies", lambda run: os._exit(9)), cell("data", without_the_bad)]
        found = {r.name: r for r in run_grid(subject, cells, processes=2)}
        assert found["dies"].stopped == "error"
        assert "exit code 9" in found["dies"].error
        assert found["control"].stopped == "spike"
        assert found["data"].stopped == "quiet"

    @pytest.mark.parametrize("processes", [1, 2])
    def test_the_budget_leaves_no_cell_out_of_the_list(self, subject: Subject, processes: int) -> None:
        """contract: what there was no time for says so, in its own result; the first cells go first."""
        cells = [cell(f"cell#{i}", lambda run: None, full=True) for i in range(6)]
        found = list(run_grid(subject, cells, processes=processes, minutes=1e-9))
        assert [r.name for r in found] == [c.name for c in cells]
        assert {r.stopped for r in found} == {"budget"}
        assert {r.response(subject.baseline) for r in found} == {None}

    def test_bad_settings(self, subject: Subject) -> None:
        """contract: at the call, before anything runs."""
        with pytest.raises(ValueError, match="give at least 1"):
            run_grid(subject, [CONTROL], processes=0)
        with pytest.raises(ValueError, match="give at least 1"):
            run_grid(subject, [CONTROL], minutes=0.0)
        with pytest.raises(ValueError, match="control"):
            run_grid(subject, [CONTROL, CONTROL])


@pytest.mark.parametrize(
    "kind",
    [
        {"dropout": 0.3},
        {"accumulate": 3},
        {"bf16": True},
        {"dropout": 0.1, "accumulate": 2, "bf16": True, "clip_norm": 1.0},
    ],
    ids=lambda kind: "+".join(kind),
)
def test_unchanged_replays_have_the_recorded_bits(make: Callable[..., Workload], kind: dict[str, float]) -> None:
    """equivalence: dropout, accumulation, bf16 and clipping each, twice in this process and once in a fork."""
    subject = record(make(**kind), steps=260, tail=5)
    assert subject is not None
    recorded = tuple(v for s, v in subject.recorded.items() if s >= subject.window.start)
    cells = [Cell(name=f"control#{i}", family="control", edit=CONTROL.edit, full=True) for i in range(2)]
    results: list[CellResult] = [*(run_cell(subject, c) for c in cells), *run_grid(subject, cells, processes=2)]
    assert all(r.losses[: len(recorded)] == recorded for r in results)


def test_the_tanh_net_spikes_again_and_not_at_half_the_rate() -> None:
    """planted: a spontaneous spike of second-moment lag comes again bit for bit; half the rate removes it."""
    model, points = nets.seeded(0, nets.TanhNet), nets.two_sines()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, betas=(0.9, 0.99), fused=True)
    workload = Workload(model=model, optimizer=optimizer, batch=lambda index: points, loss=nets.curve_loss)
    subject = record(workload, steps=1200)
    assert subject is not None
    again = run_cell(subject, CONTROL, stop_early=False)
    assert all(loss == subject.recorded.get(step, loss) for step, loss in again.by_step.items())
    found = run_cell(subject, cell("lr*0.5", rate(0.5)), stop_early=False).response(subject.baseline)
    assert found is not None
    assert not found.present
