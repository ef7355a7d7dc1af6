"""The zero-change mode: somebody else's loop, judged through the optimizer's hooks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from aftershock.guard.guard import Guard
from aftershock.guard.hooks import Hooked, loss_of


class Output(NamedTuple):
    """As trainers' models return it."""

    loss: Tensor
    logits: Tensor


class Net(nn.Module):
    def __init__(self, *, gives: str = "loss") -> None:
        super().__init__()
        self.layer, self.gives = nn.Linear(4, 1), gives

    def forward(self, x: Tensor, y: Tensor) -> Any:
        logits = self.layer(x)
        loss = (logits - y).square().mean()
        return {"output": Output(loss, logits), "mapping": {"loss": loss}, "logits": logits}.get(self.gives, loss)


def _parts(gives: str = "loss", **settings: Any) -> tuple[Net, torch.optim.Optimizer, Any]:
    torch.manual_seed(0)
    model = Net(gives=gives)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **settings)
    return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 10)


def _train(parts: tuple[Net, torch.optim.Optimizer, Any], faults: Mapping[int, float] | None = None) -> list[Tensor]:
    """A loop that knows nothing of a guard."""
    model, optimizer, scheduler = parts
    torch.manual_seed(1)
    for i in range(100):
        x = torch.randn(16, 4)
        y = x.sum(1, keepdim=True) * (faults or {}).get(i, 1.0)
        out = model(x, y)
        loss = out if model.gives == "loss" else (out - y).square().mean() if model.gives == "logits" else loss_of(out)
        assert loss is not None
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("gives", ["loss", "output", "mapping", "logits"])
def test_no_bit_changes_and_nothing_is_left_behind(gives: str) -> None:
    """equivalence: with and without hooks; afterwards model and optimizer have none."""
    plain, parts = _train(_parts(gives)), _parts(gives)
    with Guard.hooked(parts[0], parts[1], snapshot_every=10) as guard:
        assert _same(_train(parts), plain)
    assert guard.step_count == 100
    assert guard.recorder.healthy[-1] == 100
    assert not parts[0]._forward_hooks
    assert not parts[1]._optimizer_step_pre_hooks
    assert not parts[1]._optimizer_step_post_hooks


@pytest.mark.parametrize("settings", [{}, {"fused": True}, {"foreach": True}])
@pytest.mark.parametrize("gives", ["loss", "logits"])
def test_a_bad_step_is_vetoed(settings: dict[str, Any], gives: str) -> None:
    """planted: NaN and a spike, with the loss and by the gradient alone."""
    parts = _parts(gives, **settings)
    with Guard.hooked(parts[0], parts[1]) as guard:
        after = _train(parts, {50: math.nan, 70: 1e4})
    assert guard.step_count == 98
    assert all(torch.isfinite(p).all() for p in after)
    assert [float(state["step"]) for state in parts[1].state.values()] == [98.0, 98.0]


def test_a_rewind_takes_the_scheduler_back_too() -> None:
    """contract: three bad batches; weights, moments and schedule are those of the snapshot, and go on from there."""
    parts = _parts()
    with Guard.hooked(parts[0], parts[1], scheduler=parts[2], snapshot_every=10) as guard:
        _train(parts, {60: 1e4, 61: 1e4, 62: 1e4})
    assert guard.step_count == 50 + 37
    # The caller's own step() after the vetoed batch is one; the snapshot was taken before that of its step.
    assert parts[2].last_epoch == guard.step_count
    assert float(next(iter(parts[1].state.values()))["step"]) == guard.step_count


@pytest.mark.parametrize("fused", [False, True])
def test_somebody_elses_grad_scaler(fused: bool) -> None:
    """equivalence: norms are judged without its scale, which a fused optimizer leaves on; its overflow is its own."""
    norms, found = [], []
    for guarded in (False, True):
        model, optimizer, _ = _parts(fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=7)
        hooks = Hooked(model, optimizer, clip_norm=1e9)
        if guarded:
            hooks.attach()
        torch.manual_seed(1)
        for i in range(40):
            x = torch.randn(16, 4)
            scaler.scale(model(x, x.sum(1, keepdim=True))).backward()
            assert model.layer.weight.grad is not None
            if i == 20:
                model.layer.weight.grad[0, 0] = math.inf
            elif not guarded:
                norms.append(float(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        if guarded:
            assert hooks.guard.step_count == 39
            assert hooks.guard.recorder.rows[0].grad_norm == pytest.approx(norms[0] / 1024, rel=1e-6)
            assert "rewind" not in hooks.guard.report()
            hooks.detach()
        found.append([p.detach().clone() for p in model.parameters()])
    assert _same(*found)


def test_losses_of_several_backward_passes_are_averaged() -> None:
    """contract: accumulation is the loop's own; evaluation is not listened to."""
    model, optimizer, _ = _parts()
    x, y = torch.randn(16, 4), torch.ones(16, 1)
    with Guard.hooked(model, optimizer) as guard:
        losses = [float(model(x[:8], y[:8]).detach()), float(model(x[8:], y[8:]).detach())]
        with torch.no_grad():
            model(x, 100 * y)
        model(x, y).backward()
        optimizer.step()
        assert guard.recorder.rows[-1].loss == pytest.approx((sum(losses) + sum(losses) / 2) / 3)  # float32 means


def test_what_does_not_fit_is_refused() -> None:
    """planted."""
    model, optimizer, _ = _parts()
    with pytest.raises(ValueError, match="accumulate is not needed"):
        Guard.hooked(model, optimizer, accumulate=2)
    hooks = Guard.hooked(model, optimizer)
    guard = hooks.attach()
    with pytest.raises(ValueError, match="attached already"):
        hooks.attach()
    with pytest.raises(ValueError, match="call optimizer.step"):
        guard.step(1.0)


@pytest.mark.parametrize("output", [torch.ones(3), (torch.ones(2), torch.ones(())), None, "text", {"loss": 1.0}])
def test_no_loss_is_no_loss(output: Any) -> None:
    """contract: nothing without a gradient, and no text."""
    assert loss_of(output) is None
