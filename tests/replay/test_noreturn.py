"""The point of no return, on a fuse that is lit at a known step and burns for a known time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from aftershock.replay.cells import cell, cells
from aftershock.replay.edits.data import Skipped
from aftershock.replay.footprint import footprint
from aftershock.replay.noreturn import NoReturn, point_of_no_return
from aftershock.replay.recording import record
from aftershock.replay.run import CONTROL, Cell, Edit, Run
from aftershock.replay.subject import Subject
from aftershock.workload import Workload

LIT = 100
"""The step at which the fuse is lit, if the clock's weight is then exactly 1."""


class Fuse(nn.Module):
    """A clock that nothing trains, and a fuse that grows by 30 % a step once it is lit, until it reaches 2."""

    def __init__(self) -> None:
        super().__init__()
        self.clock, self.fuse = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))


def burn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Level + fuse^2, with a gradient that moves the fuse under SGD at rate 1 as the story says."""
    assert isinstance(model, Fuse)
    fuse = model.fuse.item()
    if batch["index"] == LIT and model.clock == 1:
        change = 0.02
    elif fuse >= 2:
        change = -fuse
    else:
        change = 0.3 * fuse if fuse > 0.01 else 0.0
    return batch["level"] + model.fuse.detach() ** 2 - change * (model.fuse - model.fuse.detach())


def calm(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    assert isinstance(model, Fuse)
    return batch["level"] + 0 * model.fuse


def batch_of(index: int) -> dict[str, Tensor]:
    return {"index": torch.tensor(index), "level": torch.tensor(1 + 0.01 * math.sin(index))}


def build() -> Workload:
    model = Fuse()
    return Workload(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), batch=batch_of, loss=burn)


@pytest.fixture(scope="module")
def lit() -> Subject:
    """Whoever uses it leaves the workload as it was."""
    subject = record(build(), steps=400)
    assert subject is not None
    assert subject.window.start < LIT < subject.window.onset - 5
    return subject


class When(Edit):
    """Calm from the step on at which it begins, if `works` says so of that step."""

    def __init__(self, works: Callable[[int], bool]) -> None:
        self._works = works

    def apply(self, run: Run) -> None:
        begun: list[int] = []
        run.before_step.append(begun.append)
        run.loss = lambda model, batch: (calm if self._works(begun[0]) else burn)(model, batch)


def remedy(name: str, edit: Edit) -> Cell:
    return Cell(name=name, family="test", edit=edit)


def remedies(subject: Subject) -> list[Cell]:
    without, always = Skipped(steps=(LIT,)), When(lambda step: True)
    return [*cells(["lr*0", "clip=1e9"], subject), remedy("without", without), remedy("always", always)]


@pytest.fixture(scope="module")
def found(lit: Subject) -> NoReturn:
    return point_of_no_return(lit, remedies(lit), processes=1)


def test_the_known_steps_are_found(lit: Subject, found: NoReturn) -> None:
    """planted: an ulp stops the clock up to the step that lights the fuse; leaving out that batch helps as long; no
    rate helps until the loss is at half of the height; a clip far above any gradient never does."""
    assert found.committed == LIT + 1
    assert (found.perturbed.finished, found.perturbed.last, found.perturbed.odd) == (True, LIT, ())
    high = [s for s, loss in lit.recorded.items() if lit.baseline.excess(loss) >= lit.baseline.threshold]
    last = {name: turn.last for name, turn in found.remedies.items()}
    # A rate of 0 holds the loss that the step before has made; another loss is another from its first step on.
    assert last == {"lr*0": min(high) - 1, "clip=1e9": None, "without": LIT, "always": min(high)}
    assert all(turn.finished and not turn.odd and not turn.error for turn in found.remedies.values())


def test_its_words(lit: Subject, found: NoReturn) -> None:
    """planted: the same numbers, said."""
    certain, rate, clip, *_ = found.words().split(". ")
    ahead = lit.window.onset - LIT - 1
    assert (
        certain == f"The spike is certain from step {LIT + 1} on ({ahead} steps before its onset), if nothing is done"
    )
    assert rate.startswith(f"lr*0 removes the spike if it begins by step {found.remedies['lr*0'].last} (")
    assert clip == f"clip=1e9 does not remove the spike, not even from the snapshot at step {lit.window.start}"


def test_workers_find_the_same_and_nothing_stays_changed(lit: Subject, found: NoReturn) -> None:
    """equivalence: in forked workers as in this process; states of the steps between are forgotten."""
    states, before = set(lit.states), footprint(lit)
    again = point_of_no_return(lit, remedies(lit)[:1], processes=2)
    assert again == found._replace(remedies={"lr*0": found.remedies["lr*0"]})
    assert (set(lit.states), footprint(lit)) == (states, before)
    assert all(torch.equal(now, lit.states[lit.window.start].tensors[name]) for name, now in weights(lit).items())


def weights(subject: Subject) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in subject.training.read().tensors.items() if name.startswith("model/")}


def test_an_answer_that_turns_twice_is_told(lit: Subject) -> None:
    """planted: what works early works again just before the peak, where the bisection did not ask."""
    early, late = lit.window.start + 16, lit.window.peak - 20
    twice = When(lambda step: step < early or step >= late)
    found = point_of_no_return(lit, [remedy("twice", twice)], processes=1)
    turn = found.remedies["twice"]
    assert (turn.finished, turn.last) == (True, early - 1)
    assert turn.odd
    assert all(turn.asked[step] and step >= late for step in turn.odd)
    assert f"removed from step {turn.odd[0]}: it does not turn once only" in found.words()


def test_batches_trained_on_are_not_left_out_again(lit: Subject) -> None:
    """contract: in the middle of what it leaves out, a skip leaves out the rest only: step s takes the batch after."""
    told: dict[int, int] = {}
    point_of_no_return(lit, [remedy("skip", Told(steps=tuple(range(62, LIT + 1)), told=told))], processes=1)
    assert len(told) > 3
    assert set(told.values()) == {LIT + 1}


@dataclass(frozen=True, kw_only=True)
class Told(Skipped):
    """Tells the batch of its first step."""

    told: dict[int, int] = field(default_factory=dict)

    def change(self, run: Run) -> None:
        Skipped.change(self, run)
        self.told[min(self.steps)] = run.index_of(min(self.steps))


class Slow(Edit):
    """Useless, and each time it is tried a second passes on the clock."""

    def __init__(self, clock: list[float]) -> None:
        self._clock = clock

    def apply(self, run: Run) -> None:
        self._clock[0] += 1


def test_what_was_not_finished_is_a_range(lit: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """planted: time for three questions, and for none."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    works = Both(When(lambda step: step < LIT), Slow(clock))
    found = point_of_no_return(lit, [remedy("slow", works)], processes=1, deadline=3.5)
    turn = found.remedies["slow"]
    assert len(turn.asked) == 3
    assert (turn.finished, turn.last, turn.error) == (False, None, "")
    assert turn.low is not None
    assert turn.low < LIT <= turn.high
    assert turn.high - turn.low > 1
    assert f"lies in [{turn.low}, {turn.high}) (the time was up)" in found.words()
    none = point_of_no_return(lit, [remedy("slow", works)], processes=1, deadline=clock[0])
    assert (none.committed, none.perturbed.asked, none.perturbed.finished) == (None, {}, False)
    assert (none.remedies["slow"].low, none.remedies["slow"].high) == (None, lit.window.peak + 1)
    assert f"[{lit.window.start}, {lit.window.peak + 1}), if there is one" in none.words()


class Both(Edit):
    def __init__(self, *edits: Edit) -> None:
        self._edits = edits

    def apply(self, run: Run) -> None:
        for edit in self._edits:
            edit.apply(run)


def test_certain_already_and_certain_never(make: Callable[..., Workload]) -> None:
    """planted: bad batches bring the spike whatever an ulp does; where the loss turns on the last bit of a weight up to
    the onset, nothing is certain before."""
    bad = record(make(), steps=260, tail=5)
    assert bad is not None
    found = point_of_no_return(bad, [cell("skip", bad)], processes=1)
    assert found.committed == bad.window.start
    assert found.perturbed.last is None
    # A loss is measured before the update of its own batch: leaving out the bad ones helps until the first of them.
    assert found.remedies["skip"].last == bad.window.onset
    assert "certain from the snapshot" in found.words()

    workload = build()
    workload.loss = fragile_loss
    fragile = record(workload, steps=260, tail=5)
    assert fragile is not None
    found = point_of_no_return(fragile, [], processes=1)
    assert found.committed is None
    assert (found.perturbed.finished, found.perturbed.last) == (True, fragile.window.onset)
    assert "Up to its onset" in found.words()


def fragile_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Of the three draws of an ulp the second moves the fuse below 0, the others above."""
    assert isinstance(model, Fuse)
    return calm(model, batch) * (9 if 100 <= batch["index"] < 103 and model.fuse >= 0 else 1)


def test_an_edit_that_cannot_act_says_why(lit: Subject) -> None:
    """contract: its error is kept, and the others are asked."""
    found = point_of_no_return(lit, [cell("eps*1e3", lit), cell("lr*0", lit)], processes=1)
    assert found.remedies["eps*1e3"].error == "ValueError: SGD has no eps"
    assert not found.remedies["eps*1e3"].finished
    assert "SGD has no eps" in found.words()
    assert found.remedies["lr*0"].finished


def test_wrong_calls(lit: Subject) -> None:
    """contract."""
    with pytest.raises(ValueError, match="named twice"):
        point_of_no_return(lit, [CONTROL, CONTROL])
    with pytest.raises(ValueError, match="end at the peak"):
        point_of_no_return(lit, [], steps_each=10)
    once = build()
    loss = once.loss
    subject = record(once, steps=260, tail=5)
    assert subject is not None
    once.loss = lambda model, batch: loss(model, batch | {"index": torch.tensor(0)})
    with pytest.raises(ValueError, match="does not come back in the unchanged replay"):
        point_of_no_return(subject, [], processes=1)
