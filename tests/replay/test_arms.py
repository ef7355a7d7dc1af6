"""Push through, skip, slow down, or never have spiked: what the arms share, and that each does what it says."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from aftershock.lab.zoo.labels import label
from aftershock.replay.arms import ARMS, READINGS, Within, compare_arms
from aftershock.replay.edits.clips import Clip
from aftershock.replay.edits.data import suspects
from aftershock.replay.edits.optimizer import Eps
from aftershock.replay.edits.rates import ScaledRate
from aftershock.replay.edits.shams import random_skip
from aftershock.replay.loop import take_steps
from aftershock.replay.recording import Label, find_spikes, record
from aftershock.replay.run import Cell, Edit, Run
from aftershock.replay.runner import run_cell
from aftershock.replay.subject import Subject
from aftershock.workload import Workload

GAIN = 0.05
SPIKE = range(150, 155)
BURST = range(150, 170)


class Lesson(NamedTuple):
    """How high the loss of a batch is, and how much is learned from it."""

    index: Tensor
    height: Tensor
    gain: Tensor


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))


def lessons(gain: Callable[[int], float], *, spike: range = SPIKE) -> Workload:
    """The batches of `spike` have a high loss. Each batch, at the full rate, lowers the held-out loss by `gain(index)`
    in log units, and moves the weight as far."""
    model = Scalar()

    def batch(index: int) -> Lesson:
        numbers = (float(index), 5.0 if index in spike else 1.0 + 0.001 * (index % 7), gain(index))
        return Lesson(*(torch.tensor(x, dtype=torch.float64) for x in numbers))

    def loss(model: nn.Module, batch: Lesson) -> Tensor:
        weight = model.get_parameter("weight")
        return batch.height - batch.gain * (weight - weight.detach())

    return Workload(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        batch=batch,
        loss=loss,
        held_out=lambda model: math.exp(-model.get_parameter("weight").item()),
    )


def taught_in_the_spike(index: int) -> float:
    return GAIN if index in SPIKE else 0.0


def bursts(*high: range, before: float = 0.2) -> Workload:
    """(weight - target)^2 / 2, at a rate of `before`, then of 2.5 in the steps of `high` and 0.2 elsewhere: at 2.5 the
    weight is thrown 1.5 times as far each step, at half of it it is not."""
    model = Scalar()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    def rate(step: int) -> float:
        return 2.5 if any(step in one for one in high) else before if step < BURST.start else 0.2

    def batch(index: int) -> Tensor:
        return torch.randn((), generator=torch.Generator().manual_seed(index), dtype=torch.float64)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return 1 + (model.get_parameter("weight") - 0.03 * batch).square() / 2

    def held_out(model: nn.Module) -> float:
        return 1 + model.get_parameter("weight").item() ** 2 / 2

    return Workload(
        model=model, optimizer=optimizer, scheduler=LambdaLR(optimizer, rate), batch=batch, loss=loss, held_out=held_out
    )


def recorded(workload: Workload, *, label: Label = find_spikes) -> Subject:
    found = record(workload, steps=400, label=label)
    assert found is not None
    return found


class TestArms:
    def test_what_skipping_costs(self) -> None:
        """planted: only the spike's batches teach, so every arm's loss is known, and no remedy removes the spike."""
        subject = recorded(lessons(taught_in_the_spike))
        assert tuple(subject.window)[1:] == (SPIKE.start, SPIKE.start, SPIKE.stop)
        found = compare_arms(subject)
        lost = len(SPIKE) * GAIN
        against_push = {name: math.log(arm.loss / found.arms["push"].loss) for name, arm in found.arms.items()}
        expected = {"push": 0.0, "skip": lost, "sham_skip": 0.0, "half": lost / 2}
        assert against_push == pytest.approx(expected, abs=1e-12)  # sums of five float64
        assert {name: arm.spiked for name, arm in found.arms.items()} == {
            "push": True,
            "skip": False,
            "sham_skip": True,
            "half": True,
        }
        assert found.arms["push"].distance == pytest.approx(lost)
        assert found.arms["skip"].distance == 0
        assert found.cure is None
        assert "lr*0.5 in steps 148 to 154: it spikes all the same" in found.left_out["never"]
        assert "eps*1e3 in steps 148 to 154: SGD has no eps" in found.left_out["never"]

    def test_all_take_the_same_steps(self, subject: Subject) -> None:
        """contract: the accepted steps from one snapshot to ten spike lengths later; what is pushed is as recorded."""
        found = compare_arms(subject)
        window = subject.window
        assert found.last == window.end + max(10 * window.length, window.end - window.start)
        assert {arm.steps for arm in found.arms.values()} == {found.last - window.start}
        assert {*found.arms, *found.left_out} == set(ARMS)
        assert len(found.readings) == READINGS
        assert window.end < found.readings[0]
        assert found.readings[-1] == found.last
        assert found.held_out
        assert found.arms["push"].spiked
        assert not found.arms["skip"].spiked, "the three bad batches are the cause"
        assert all(math.isfinite(arm.loss) and arm.distance > 0 for arm in found.arms.values())
        tail = [subject.recorded[step] for step in range(found.last - READINGS, found.last)]
        assert found.arms["push"].training == statistics.median(tail)

    def test_as_many_are_skipped_in_the_sham(self) -> None:
        """planted: also where the calm steps before the spike are too few. Each suspect moves the weight by 1000, each
        batch that only an arm that skips comes to by 1."""
        spike = range(150, 180)
        last = spike.stop + 10 * len(spike)
        inside = range(spike.start - 2, spike.stop)
        subject = recorded(lessons(lambda index: 1000.0 if index in inside else float(index >= last), spike=spike))
        assert suspects(subject.window) == inside
        assert len(random_skip(subject.window, draw=1).steps) < len(inside)
        found = compare_arms(subject)
        assert found.last == last
        moved = {name: arm.distance for name, arm in found.arms.items() if name != "half"}
        count = len(inside)
        assert moved == {"push": 1000.0 * count, "skip": count, "sham_skip": 1001.0 * count}

    def test_a_spike_that_half_the_rate_removes(self) -> None:
        """planted: the rate is too high for some steps; halved in those it never is, and the schedule's comes back."""
        subject = recorded(bursts(BURST))
        found = compare_arms(subject)
        window = subject.window
        assert found.cure == ("lr*0.5", suspects(window).start, window.end)
        never, push = found.arms["never"], found.arms["push"]
        assert (push.spiked, never.spiked) == (True, False)
        assert (push.again, never.again) == (None, None)
        assert never.distance < 1

    def test_a_spike_that_is_only_delayed(self) -> None:
        """planted: it comes again soon after the remedy was taken back, so that is kept; pushing meets the second."""
        second = range(220, 240)
        subject = recorded(bursts(BURST, second), label=label)
        found = compare_arms(subject, label=label)
        window = subject.window
        assert window.end < second.start < subject.short
        assert found.cure == ("lr*0.5", suspects(window).start, found.last)
        assert found.arms["push"].again in range(second.start, second.stop)
        assert found.arms["half"].again in range(second.start, second.stop)
        assert found.arms["never"].again is None

    def test_without_held_out_data(self, make: Callable[..., Workload]) -> None:
        """oracle: the last recorded batches, the same for all arms, with the weights of the end; dropout is off."""
        workload = make(dropout=0.1)
        workload.held_out = None
        subject = recorded(workload)
        found = compare_arms(subject)
        assert not found.held_out
        subject.restore()
        for _ in take_steps(subject.run(), subject.window.start, found.last):
            pass
        workload.model.eval()
        with torch.no_grad():
            last = range(found.last - READINGS, found.last)
            values = [workload.loss(workload.model, workload.batch(step)).item() for step in last]
        workload.model.train()
        assert found.arms["push"].loss == statistics.median(values)

    def test_batches_that_are_always_the_same(self, make: Callable[..., Workload]) -> None:
        """contract: no batch can be left out for another; the arms that would are left out, with the reason."""
        workload = bursts(BURST, before=0.002)
        workload.batch = lambda index: torch.tensor(10.0, dtype=torch.float64)
        found = compare_arms(recorded(workload))
        assert set(found.arms) == {"push", "half", "never"}
        assert "the same batch" in found.left_out["skip"]
        assert "the same batch" in found.left_out["sham_skip"]

    def test_a_lost_arm(self) -> None:
        """planted: the held-out loss is not a number once the spike was trained on."""
        workload = lessons(taught_in_the_spike)
        workload.held_out = lambda model: math.nan if model.get_parameter("weight").item() > 0 else 1.0
        found = compare_arms(recorded(workload))
        assert found.arms["push"].loss == math.inf
        assert found.arms["skip"].loss == 1.0

    def test_what_cannot_be_compared(self, subject: Subject) -> None:
        """contract: in words, and nothing is left behind."""
        with pytest.raises(ValueError, match="at least 1 spike length"):
            compare_arms(subject, later=0)
        struck = recorded_with_a_strike()
        with pytest.raises(ValueError, match="do not have the spike again"):
            compare_arms(struck)
        end = subject.window.end
        subject.stop = end + 5
        try:
            with pytest.raises(ValueError, match="steps must follow"):
                compare_arms(subject)
            subject.stop = end + 40
            short = compare_arms(subject)
        finally:
            subject.stop = None
        assert short.last == end + 40 - len(suspects(subject.window))
        assert {arm.steps for arm in short.arms.values()} == {short.last - subject.window.start}


class TestWithin:
    @pytest.mark.parametrize("name", ["rate", "eps", "clip"])
    def test_it_is_taken_back(self, subject: Subject, name: str) -> None:
        """oracle: a loop written out by hand with the change in the same steps."""
        start = subject.window.start
        first, end, stop = start + 3, start + 7, start + 12
        edits: dict[str, Edit] = {"rate": ScaledRate(factor=0.5), "eps": Eps(factor=1e6), "clip": Clip(norm=0.01)}
        cell = Cell(name="within", family="test", edit=Within(edits[name], first=first, end=end))
        found = run_cell(subject, cell, steps=stop - start, stop_early=False)
        assert found.error == ""
        assert found.losses == pytest.approx(by_hand(subject, name, first, end, stop), rel=1e-6)  # other float32 sums
        plain = [subject.recorded[step] for step in range(start, stop)]
        assert list(found.losses[: first - start + 1]) == plain[: first - start + 1]
        assert list(found.losses[first - start + 1 :]) != plain[first - start + 1 :]

    def test_nothing_of_it_is_left(self, subject: Subject) -> None:
        """contract: attributes of the run, settings and hooks are as before it, while the run goes on."""
        seen: list[tuple[object, ...]] = []

        class Look(Edit):
            def apply(self, run: Run) -> None:
                def look(step: int) -> None:
                    group = run.workload.optimizer.param_groups[0]
                    hooks = len(run.workload.optimizer._optimizer_step_pre_hooks)
                    seen.append((run.loss, run.clip_norm, group["eps"], hooks, len(run.undo), len(run.after_step)))

                run.before_step.append(look)
                for edit in (ScaledRate(factor=0.5), Eps(factor=10.0), Clip(norm=1.0)):
                    Within(edit, end=run.window.start + 2).apply(run)

        run_cell(subject, Cell(name="look", family="test", edit=Look()), steps=4, stop_early=False)
        assert seen[0] == seen[1]
        assert seen[2] == seen[3]
        assert seen[0] != seen[2]
        loss, clip, eps, hooks, undo, after = seen[2]
        assert (clip, eps, hooks, undo, after) == (None, 1e-8, 0, 0, 0)
        assert loss == subject.workload.loss

    def test_an_edit_with_steps_of_its_own(self, subject: Subject) -> None:
        """contract: it would begin somewhere else than is said."""
        with pytest.raises(ValueError, match="steps of its own"):
            Within(random_skip(subject.window, draw=1), end=subject.window.end)


def recorded_with_a_strike() -> Subject:
    """The weight is thrown far away once, by nobody who would do it again."""
    workload = bursts()

    def strike(step: int) -> None:
        if step == 150:
            workload.model.get_parameter("weight").data.fill_(30.0)

    found = record(workload, steps=400, before_step=strike)
    assert found is not None
    return found


def by_hand(subject: Subject, name: str, first: int, end: int, stop: int) -> list[float]:
    """Losses of plain steps from the snapshot, with one thing otherwise in steps `first` up to `end`."""
    subject.restore()
    work, losses = subject.workload, list[float]()
    assert work.scheduler is not None
    group = work.optimizer.param_groups[0]
    eps = group["eps"]
    for step in range(subject.window.start, stop):
        inside = first <= step < end
        losses.append(work.backward(step).item())
        if name == "clip" and inside:
            nn.utils.clip_grad_norm_(work.model.parameters(), 0.01)
        rate = group["lr"]
        group["lr"] = rate * 0.5 if name == "rate" and inside else rate
        group["eps"] = eps * 1e6 if name == "eps" and inside else eps
        work.optimizer.step()
        group["lr"], group["eps"] = rate, eps
        work.scheduler.step()
        work.optimizer.zero_grad()
    return losses
