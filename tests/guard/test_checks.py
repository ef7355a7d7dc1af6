"""Bad input: each works, or is refused with what to do, when the guard is made or at first sight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aftershock.guard.guard import Guard


def _parts(**settings: Any) -> tuple[nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    return model, torch.optim.AdamW(model.parameters(), **settings)


def _backward(model: nn.Module, scale: float = 1.0) -> Tensor:
    loss = scale * model(torch.randn(8, 4)).square().mean()
    loss.backward()
    return loss


def test_an_optimizer_with_foreign_parameters_is_refused() -> None:
    """planted: and once both modules are passed, it works."""
    one, two = nn.Linear(4, 1), nn.Linear(3, 1)
    optimizer = torch.optim.SGD([*one.parameters(), *two.parameters()], lr=0.1)
    with pytest.raises(ValueError, match=r"group 0, parameter 2, shape \(1, 3\) and 1 more.*nn.ModuleList"):
        Guard(one, optimizer)
    Guard(nn.ModuleList([one, two]), optimizer)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"optimizer": "adam"}, "needs a torch.optim.Optimizer, got str"),
        ({"model": "net"}, "an nn.Module, first; got str"),
        ({"clip_norm": 0.0}, "clip_norm must be"),
        ({"accumulate": 0}, "accumulate must be"),
        ({"mode": "rewind"}, "mode must be"),
        ({"scheduler": 3}, "scheduler is a int"),
        ({"extra": {"ema": 3}}, "without state_dict"),
    ],
)
def test_settings_that_cannot_be(change: dict[str, Any], said: str) -> None:
    """planted."""
    model, optimizer = _parts()
    given: dict[str, Any] = {"model": model, "optimizer": optimizer} | change
    with pytest.raises(ValueError, match=said):
        Guard(**given)


def test_lbfgs_and_closures_are_refused() -> None:
    """planted: at attach, and at the first step with hooks."""
    model, optimizer = _parts()
    with pytest.raises(ValueError, match="LBFGS evaluates its closure"):
        Guard(model, torch.optim.LBFGS(model.parameters()))
    with Guard.hooked(model, optimizer), pytest.raises(ValueError, match="step without a closure"):
        optimizer.step(lambda: float(_backward(model).detach()))


def test_step_without_backward_and_step_twice() -> None:
    """planted: the second call finds no gradients, since the first cleared them."""
    model, optimizer = _parts()
    guard = Guard(model, optimizer)
    with pytest.raises(ValueError, match=r"Call loss.backward\(\) before each"):
        guard.step(1.0)
    loss = _backward(model)
    assert guard.step(loss).taken
    with pytest.raises(ValueError, match="only once"):
        guard.step(loss)


@pytest.mark.parametrize(("loss", "said"), [(torch.ones(3), "loss.mean()"), ("3", "got str"), (None, "got NoneType")])
def test_a_loss_that_is_none(loss: Any, said: str) -> None:
    """planted."""
    model, optimizer = _parts()
    _backward(model)
    with pytest.raises(ValueError, match=said):
        Guard(model, optimizer).step(loss)


def test_a_scheduler_stepped_by_the_user_too() -> None:
    """planted: found at the next step; as an extra it is the user's, and rewound."""
    model, optimizer = _parts()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    guard = Guard(model, optimizer, scheduler=scheduler)
    guard.step(_backward(model))
    scheduler.step()
    with pytest.raises(ValueError, match="stepped outside of guard.step"):
        guard.step(_backward(model))
    model, optimizer = _parts()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    guard = Guard(model, optimizer, extra={"scheduler": scheduler})
    for _ in range(3):
        guard.step(_backward(model))
        scheduler.step()
    assert guard.step_count == scheduler.last_epoch == 3


def test_schedulers_that_the_guard_cannot_step() -> None:
    """planted."""
    model, optimizer = _parts()
    with pytest.raises(ValueError, match="ReduceLROnPlateau needs a metric"):
        Guard(model, optimizer, scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer))
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="belongs to another optimizer"):
        Guard(model, optimizer, scheduler=torch.optim.lr_scheduler.StepLR(other, 10))


def test_a_model_changed_after_attaching_is_found_at_the_next_snapshot() -> None:
    """planted: a head replaced; the optimizer still trains the old one."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    guard = Guard(model, torch.optim.AdamW(model.parameters()), snapshot_every=2)
    guard.step(_backward(model))
    model[1] = nn.Linear(4, 1)
    loss = _backward(model)
    with pytest.raises(ValueError, match="make a new Guard after changing the model"):
        guard.step(loss)


def test_frozen_and_late_unfrozen_parameters_work() -> None:
    """contract: a flag turned on, and a group added later; both are clipped, rewound and kept."""
    first, second, last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1)
    model = nn.Sequential(first, second, last)
    for layer in (first, second):
        layer.requires_grad_(False)
    optimizer = torch.optim.AdamW([*second.parameters(), *last.parameters()])
    guard = Guard(model, optimizer, clip_norm=1.0, snapshot_every=2)
    guard.step(_backward(model))
    second.requires_grad_(True)
    guard.step(_backward(model))
    first.requires_grad_(True)
    optimizer.add_param_group({"params": list(first.parameters())})
    before = first.weight.detach().clone()
    assert guard.step(_backward(model, 1e3)).grad_norm > 1.0
    assert not torch.equal(before, first.weight)
    for _ in range(4):
        guard.step(_backward(model))
    assert guard.recorder.healthy[-1] == 6
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    loss = _backward(model)
    with pytest.raises(ValueError, match="parameter that the model does not"):
        guard.step(loss)


def test_sparse_gradients_work() -> None:
    """equivalence: SparseAdam without a guard; then a NaN row is skipped."""
    found = []
    for guarded in (False, True):
        torch.manual_seed(0)
        table = nn.Embedding(10, 4, sparse=True)
        optimizer = torch.optim.SparseAdam(table.parameters())
        guard = Guard(table, optimizer, clip_norm=1e9) if guarded else None
        for i in range(6):
            loss = table(torch.tensor([i, 1, 1])).square().sum() * (float("nan") if guard and i == 5 else 1.0)
            if not guarded and i == 5:
                break
            loss.backward()
            if guard:
                guard.step(loss)
            else:
                optimizer.step()
                optimizer.zero_grad()
        found.append(table.weight.detach().clone())
    assert torch.equal(*found)


def _scaled(
    guarded: bool, *, inf_at: tuple[int, ...] = (), spike_at: tuple[int, ...] = ()
) -> tuple[list[Any], Any, Any]:
    """A loop with a GradScaler on the CPU, by hand or guarded."""
    model, optimizer = _parts()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=5)
    guard = Guard(model, optimizer, scaler=scaler, clip_norm=1.0) if guarded else None
    torch.manual_seed(1)
    for i in range(60):
        loss = model(torch.randn(8, 4)).square().mean() * (1e4 if i in spike_at else 1.0)
        scaler.scale(loss).backward()
        if i in inf_at:
            assert model.weight.grad is not None
            model.weight.grad[0, 0] = float("inf")
        if guard is not None:
            guard.step(loss)
            continue
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return [p.detach().tolist() for p in model.parameters()], scaler.state_dict(), guard


def test_a_grad_scaler_works_as_by_hand() -> None:
    """equivalence: weights and scale, with overflows, which are its own business but told; the policy hears nothing."""
    by_hand, guarded = _scaled(False, inf_at=(3, 4, 5, 6)), _scaled(True, inf_at=(3, 4, 5, 6))
    assert guarded[:2] == by_hand[:2]
    assert guarded[2].step_count == 56
    assert guarded[2].report() == "guard: 56 steps, 4 nonfinite, 4 skip"


def test_a_skipped_spike_teaches_the_scaler_nothing() -> None:
    """contract: its growth counts taken steps only."""
    found = _scaled(True, spike_at=(50,))
    assert found[2].step_count == 59
    assert found[1]["_growth_tracker"] == 59 % 5


def test_restart_needs_the_guards_batches() -> None:
    """planted: data that the guard does not fetch cannot go back."""
    model, optimizer = _parts()
    loss = _backward(model)
    with pytest.raises(ValueError, match=r"fetch it through guard.batches"):
        Guard(model, optimizer, mode="restart").step(loss)
    with pytest.raises(ValueError, match="cannot be positioned"):
        Guard(model, optimizer, mode="restart").batches(iter([1, 2]))
