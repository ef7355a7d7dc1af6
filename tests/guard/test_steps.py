"""One step: what the policy sees, what a late reading can still do, and that nothing waits for a GPU."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from aftershock.guard.events import read_events
from aftershock.guard.guard import Guard
from aftershock.guard.policy import Continue, Live, Policy, Rewind, Seen


class Run(NamedTuple):
    """A small run and its parts."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    data: list[Tensor]


def _run(kind: str = "adamw", **settings: Any) -> Run:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    make = torch.optim.AdamW if kind == "adamw" else torch.optim.SGD
    optimizer = make(model.parameters(), lr=1e-2, **settings)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.01 * step))
    return Run(model, optimizer, scheduler, [torch.randn(16, 8) for _ in range(200)])


def _loss(run: Run, x: Tensor, scale: float = 1.0) -> Tensor:
    return scale * (run.model(x) - x.sum(1, keepdim=True) - 0.3).square().mean()


def _guarded(run: Run, guard: Guard, *, faults: Mapping[int, float] | None = None) -> list[Any]:
    found = []
    for i, x in enumerate(guard.batches(run.data)):
        loss = _loss(run, x, (faults or {}).get(i, 1.0))
        loss.backward()
        found.append(guard.step(loss))
    return found


def _state(run: Run) -> list[Tensor]:
    tensors = [*run.model.parameters(), *(v for s in run.optimizer.state.values() for v in s.values())]
    return [t.detach().clone() for t in tensors if isinstance(t, Tensor)]


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class Scripted(Policy):
    """Takes every step, and remembers what it saw."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self.updates: list[float] = []

    def before_step(self, seen: Seen, live: Live) -> Continue:
        self.seen.append(seen)
        return Continue()

    def after_step(self, seen: Seen, live: Live) -> Continue:
        self.updates.append(seen.update_norm)
        return Continue()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        assert not state


def test_numbers_that_the_policy_sees() -> None:
    """oracle: loss, norm before clipping, and the norm of the update, taken by hand."""
    run, script = _run("sgd"), Scripted()
    guard = Guard(run.model, run.optimizer, policy=script, clip_norm=0.01)
    before = [p.detach().clone() for p in run.model.parameters()]
    loss = _loss(run, run.data[0])
    loss.backward()
    norm = nn.utils.get_total_norm([p.grad for p in run.model.parameters() if p.grad is not None])
    guard.step(loss)
    moved = [p.detach() - b for p, b in zip(run.model.parameters(), before, strict=True)]
    assert (script.seen[0].loss, script.seen[0].grad_norm) == (float(loss.detach()), float(norm))
    assert script.seen[0].healthy == (0,)
    assert script.updates == pytest.approx([float(nn.utils.get_total_norm(moved))], rel=1e-5)  # float32 differences
    assert script.updates == pytest.approx([0.01 * 1e-2], rel=1e-3)  # clipped norm times rate


def test_a_policy_that_would_take_a_broken_gradient_is_overruled() -> None:
    """planted."""
    run = _run()
    guard = Guard(run.model, run.optimizer, policy=Scripted())
    outcomes = _guarded(run._replace(data=run.data[:20]), guard, faults={10: math.nan})
    assert [one.batch_id for one in outcomes if not one.taken] == [10]
    assert all(torch.isfinite(p).all() for p in run.model.parameters())


def test_edited_gradients_are_clipped_by_what_they_are() -> None:
    """contract: a policy's edit is measured again before the global clip."""

    class Halves(Scripted):
        def before_step(self, seen: Seen, live: Live) -> Continue:
            for p in live.params.values():
                if p.grad is not None:
                    p.grad.mul_(0.5)
            return Continue()

    run = _run("sgd")
    guard = Guard(run.model, run.optimizer, policy=(script := Halves()), clip_norm=1e-3)
    _guarded(run._replace(data=run.data[:1]), guard)
    assert script.updates == pytest.approx([1e-3 * 1e-2], rel=1e-2)  # 1e-6 beside a norm of 1e-3, as torch clips


def test_an_unhealthy_state_is_never_kept(tmp_path: Path) -> None:
    """planted: a weight that becomes NaN behind the guard's back; refused and told when one is due."""
    run = _run()
    guard = Guard(run.model, run.optimizer, policy=Scripted(), snapshot_every=10, folder=tmp_path)
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    run.model.register_parameter("frozen", frozen)
    for i, x in enumerate(guard.batches(run.data[:60])):
        if i == 25:
            frozen[0] = math.nan
        loss = _loss(run, x)
        loss.backward()
        guard.step(loss)
    kinds = [event.kind for event in read_events(tmp_path)]
    assert kinds.count("snapshot_refused") == 4
    assert guard.recorder.healthy[-1] == 20


@pytest.mark.parametrize("clip", [None, 1.0])
def test_late_reading_takes_the_same_steps(clip: float | None) -> None:
    """equivalence: numbers one step late on a fused optimizer; the NaN step is held by the kernel, the schedule too."""
    found = []
    for late in (False, True):
        run = _run(fused=True)
        guard = Guard(run.model, run.optimizer, scheduler=run.scheduler, clip_norm=clip, late=late)
        _guarded(run, guard, faults={40: math.nan, 70: math.inf})
        guard.close()
        found.append((_state(run), guard.step_count, run.scheduler.last_epoch, guard.report()))
    assert _same(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]
    assert found[0][1] == 198


def test_late_reading_rewinds_one_step_later() -> None:
    """contract: three spikes are judged at the fourth batch, whose gradient is dropped."""
    run = _run(fused=True)
    guard = Guard(run.model, run.optimizer, scheduler=run.scheduler, late=True)
    outcomes = _guarded(run, guard, faults={120: 1e4, 121: 1e4, 122: 1e4})
    assert [i for i, one in enumerate(outcomes) if isinstance(one.action, Rewind)] == [123]
    assert guard.step_count == run.scheduler.last_epoch
    assert "1 rewind" in guard.report()


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"late": True, "policy": Scripted()}, "a policy that edits nothing"), ({"late": True}, "fused=True")],
)
def test_late_reading_is_refused_where_it_cannot_be(settings: dict[str, Any], said: str) -> None:
    """planted."""
    run = _run()
    with pytest.raises(ValueError, match=said):
        Guard(run.model, run.optimizer, **settings)


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    """contract: torch's own check finds no synchronisation within the steps between snapshots."""
    run = _run()
    model = run.model.cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    guard = Guard(model, optimizer, clip_norm=1.0, snapshot_every=1000)
    data = [x.cuda() for x in run.data]
    for i, x in enumerate(guard.batches(data)):
        if i == 10:
            torch.cuda.set_sync_debug_mode("error")
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        guard.step(loss)
    torch.cuda.set_sync_debug_mode("default")
    guard.close()
    assert guard.step_count == 200
