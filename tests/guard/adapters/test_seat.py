"""The seat in a foreign loop: what the trainers' own tests cannot show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aftershock.guard.adapters.seat import Clock, Seat, check_settings

PER_EPOCH = 8


def _parts() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=100)


def _loop(parts: tuple[nn.Module, torch.optim.Optimizer, Any], seat: Seat, start: int, stop: int) -> None:
    model, optimizer, scheduler = parts
    for at in range(start, stop):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(at))
        seat.open(at)
        loss = model(x).square().mean()
        loss.backward()
        seat.begin(loss.detach(), x)
        optimizer.step()
        seat.end()
        scheduler.step()
        optimizer.zero_grad()
        seat.finish()


def _state(parts: tuple[nn.Module, torch.optim.Optimizer, Any]) -> list[Any]:
    model, optimizer, scheduler = parts
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    tensors += [state["momentum_buffer"] for state in optimizer.state.values()]
    rates = [(group["lr"], group["momentum"]) for group in optimizer.param_groups]
    return [*(t.tolist() for t in tensors), rates, scheduler.last_epoch]


def test_listed_batches_leave_no_trace(tmp_path: Path) -> None:
    """equivalence: weights, moments, batch norm's statistics, and a schedule of rate and momentum are as they were."""
    (tmp_path / "skip.yaml").write_text("skip:\n  - {start: 5, stop: 7}\n  - {start: 9, stop: 10}\n")
    parts = _parts()
    seat = Seat(*parts[:2], scheduler=parts[2], clock=Clock(0, PER_EPOCH, None), settings={"folder": tmp_path})
    _loop(parts, seat, 0, 5)
    before = _state(parts)
    _loop(parts, seat, 5, 7)
    assert _state(parts) == before
    assert seat.guard.step_count == 5
    _loop(parts, seat, 7, 12)
    assert seat.guard.step_count == 9
    assert seat.guard.recorder.rows[-1].batch_id == 11
    assert 5 not in seat.guard.recorder.batch_ids
    assert 11 in seat.guard.recorder.batch_ids


@pytest.mark.parametrize("at", [3, 8, 21])
def test_ids_follow_the_loop_after_a_resume(at: int) -> None:
    """contract: with kept state and without, whatever the guard had counted: only the loop knows its place."""
    parts = _parts()
    first = Seat(*parts[:2], scheduler=parts[2], clock=Clock(0, PER_EPOCH, 64), settings={})
    _loop(parts, first, 0, 6)
    for kept, steps in ((first.guard.state_dict(), 6), (None, at)):
        seat = Seat(*parts[:2], scheduler=parts[2], clock=Clock(at, PER_EPOCH, 64), settings={}, kept=kept)
        _loop(parts, seat, at, at + 2)
        assert seat.guard.step_count == steps + 2
        assert [row.batch_id for row in seat.guard.recorder.rows] == [at, at + 1]


def test_a_plateau_schedule_is_rewound_and_not_stepped() -> None:
    """contract: it goes with the guard as an extra part."""
    model, optimizer, _ = _parts()
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    seat = Seat(model, optimizer, scheduler=plateau, clock=Clock(0, PER_EPOCH, None), settings={})
    assert seat.guard.recorder.training.extra == {"scheduler": plateau}


def test_the_trainers_own_settings_are_refused() -> None:
    """planted."""
    with pytest.raises(ValueError, match="scheduler, accumulate: the guard takes this from the Trainer"):
        check_settings({"scheduler": None, "accumulate": 2, "slots": 3}, "Trainer")
