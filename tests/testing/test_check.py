"""Faults in a user's loop: what a good loop and several wrong ones get told."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from aftershock.guard.events import read_events
from aftershock.guard.policies.skip import Skip
from aftershock.testing import FAULTS, check_guard, loop_of
from aftershock.testing.faults import GARBAGE, Fault, Parts, Planter, garbage
from aftershock.workload import Workload

STEPS = 80
DOCS = Path(__file__).parents[2] / "docs" / "api" / "testing.md"


def _loss(model: nn.Module, x_ND: Tensor) -> Tensor:
    return (model(x_ND) - x_ND.sin().sum(1, keepdim=True)).square().mean()


def _build() -> Workload:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))

    def batch(index: int) -> Tensor:
        return torch.randn(32, 4, generator=torch.Generator().manual_seed(index))

    return Workload(model=model, optimizer=optimizer, scheduler=scheduler, batch=batch, loss=_loss, clip_norm=1.0)


def test_every_fault_is_survived_in_a_good_loop(capsys: pytest.CaptureFixture[str]) -> None:
    """contract: the default guard in the plain loop; the clean run has the same bits, and every fault a line."""
    checks = check_guard(loop_of(_build, steps=STEPS), tolerance=0.3)  # ten losses of 32 examples are as noisy as that
    assert checks.failures == []
    assert checks.untouched
    assert [one.fault for one in checks.faults] == list(FAULTS)
    found = {one.fault: one for one in checks.faults}
    assert found["nan_loss"].response == found["nan_gradient"].response == found["inf_gradient"].response == "skipped"
    assert found["nan_loss"].unguarded is None
    assert found["nan_loss"].lost == 1
    assert found["nonfinite_weight"].response == "rewound"
    assert capsys.readouterr().out == checks.table() + "\n"


def test_a_policy_that_cannot_rewind_fails(tmp_path: Path) -> None:
    """planted: weights that are not finite stay so under a policy that only skips; strict says which fault."""

    def train(guard_class: Any) -> None:
        work = _build()
        guard = guard_class(work.model, work.optimizer, policy=Skip(max_skips=1000))
        for index in guard.batches(range(STEPS)):
            work.backward(index)
            guard.step(_loss(work.model, work.batch(index)))

    with pytest.raises(AssertionError, match="nonfinite_weight: skipped, weights not finite, score not finite"):
        check_guard(train, faults=["nonfinite_weight", "nan_gradient"], strict=True, show=False, folder=tmp_path)
    kinds = [event.kind for event in read_events(tmp_path / "nan_gradient")]
    assert kinds.count("skip") == 1


def test_accumulation_and_a_loop_without_batches() -> None:
    """contract: faults hit whole steps of two micro-batches; data faults do not apply without `guard.batches`."""

    def train(guard_class: Any) -> None:
        work = _build()
        with guard_class(work.model, work.optimizer, accumulate=2) as guard:
            for index in range(2 * STEPS):
                loss = _loss(work.model, work.batch(index)) / 2
                loss.backward()
                guard.step(loss)

    checks = check_guard(train, faults=["gradient_spike", "garbage_batches", "nan_loss"], show=False)
    assert checks.steps == STEPS
    assert checks.failures == []
    assert [one.response for one in checks.faults] == ["skipped", "-", "skipped"]
    assert [one.lost for one in checks.faults] == [1, 0, 1]


def test_what_cannot_be_checked_is_refused() -> None:
    """contract: too short, no guard, two guards, not reproducible, an unknown fault."""
    kept = nn.Linear(4, 1)

    def two(guard_class: Any) -> None:
        for _ in range(2):
            guard_class(kept, torch.optim.SGD(kept.parameters()))

    def lasting(guard_class: Any) -> None:
        guard = guard_class(kept, torch.optim.SGD(kept.parameters(), lr=0.1))
        for x_ND in guard.batches([torch.randn(8, 4) for _ in range(STEPS)]):
            loss = _loss(kept, x_ND)
            loss.backward()
            guard.step(loss)

    with pytest.raises(ValueError, match="takes 20 steps; make it at least 60"):
        check_guard(loop_of(_build, steps=20))
    with pytest.raises(ValueError, match="makes no guard"):
        check_guard(lambda guard_class: None)
    with pytest.raises(ValueError, match="several guards"):
        check_guard(two)
    with pytest.raises(ValueError, match="do not end with the same bits"):
        check_guard(lasting)
    with pytest.raises(ValueError, match="no fault 'nan_los'; there are nan_loss"):
        check_guard(lasting, faults=["nan_los"])


def test_random_numbers_are_put_back() -> None:
    """contract: python's, numpy's and torch's go on as if nothing had been checked."""
    torch.manual_seed(3)
    random.seed(3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)  # noqa: NPY002
    check_guard(loop_of(_build, steps=60), faults=["nan_loss"], show=False)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert str(np.random.get_state(legacy=False)) == str(before[2])  # noqa: NPY002


class Pair(NamedTuple):
    """A batch as many loops have it."""

    x: Tensor
    ids: Tensor


def test_garbage_keeps_the_shape_of_a_batch() -> None:
    """property: types, shapes, whole numbers as a set; and the original is left alone."""
    pair = Pair(torch.full((2, 3), 5.0), torch.arange(12).view(3, 4))
    spoiled = garbage({"a": [pair], "n": 3})
    other = spoiled["a"][0]
    assert isinstance(other, Pair)
    assert spoiled["n"] == 3
    assert other.x.shape == (2, 3)
    assert other.x.abs().max() > 100
    assert not torch.equal(other.ids, pair.ids)
    assert sorted(other.ids.flatten().tolist()) == list(range(12))
    assert torch.equal(pair.x, torch.full((2, 3), 5.0))


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if fault.gradients or fault.state])
def test_a_fault_strikes_at_its_step_only(name: str) -> None:
    """contract: one call before and one after it nothing is touched."""
    work = _build()
    for index in range(3):
        work.backward(index)
        work.optimizer.step()
    planter = Planter(Parts(work.model, work.optimizer), FAULTS[name], at=7)

    def state() -> Iterator[Any]:
        for p in work.model.parameters():
            assert p.grad is not None
            yield from (p.detach().clone(), p.grad.clone())
        yield from (one["exp_avg_sq"].clone() for one in work.optimizer.state.values())
        yield torch.tensor(work.optimizer.param_groups[0]["lr"])

    changed = []
    for call in (6, 7, 8):
        before = list(state())
        planter.before_forward(call)
        told = planter.after_backward(call, 1.0)
        same = all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(before, state(), strict=True))
        changed.append(not same or not math.isfinite(told))
    assert changed == [False, True, False]
    assert planter.planted


def test_only_the_batches_of_a_data_fault_are_garbage() -> None:
    planter = Planter(Parts(nn.Linear(1, 1), torch.optim.SGD(nn.Linear(1, 1).parameters())), Fault(batches=GARBAGE), 5)
    kept = [torch.equal(planter.batch(call, torch.ones(4)), torch.ones(4)) for call in range(12)]
    assert kept == [True] * 5 + [False] * GARBAGE + [True] * 4


def test_the_example_of_the_docs_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """contract: as printed, but for three faults only, to be quick."""
    code = re.findall(r"```python\n(.*?)```", DOCS.read_text("utf-8"), re.DOTALL)[0]
    names: dict[str, Any] = {}
    exec(code.replace("check_guard(train)", "check_guard(train, faults=['nan_loss', 'flipped_bit'])"), names)
    assert names["checks"].failures == []
    assert "untouched, bit for bit" in capsys.readouterr().out
