"""The guard in a loop on Lightning's Fabric."""

from __future__ import annotations

import argparse
import inspect
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("lightning")

from lightning.fabric import Fabric

from aftershock.guard.adapters.fabric import guard_fabric

STEPS = 40


class Bytes(nn.Module):
    """The loss of the next byte."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(256, 16), nn.Linear(16, 256)

    def forward(self, text: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.table(text[:, :-1])).flatten(0, 1), text[:, 1:].flatten())


def _batches() -> list[Tensor]:
    data = torch.tensor(list(inspect.getsource(argparse).encode()[: STEPS * 64]))
    return list(data.view(STEPS, 4, 16))


def _setup(precision: Any = "32-true") -> tuple[Any, ...]:
    torch.manual_seed(0)
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    plain = Bytes()
    inner = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(inner, 10)
    return fabric, *fabric.setup(plain, inner), scheduler


def _weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def _guarded(faults: dict[int, float], *, save: Path | None = None, **settings: Any) -> tuple[Any, Any, Any]:
    fabric, model, optimizer, scheduler = _setup()
    guard = guard_fabric(fabric, model, optimizer, scheduler=scheduler, snapshot_every=10, **settings)
    for i, batch in enumerate(guard.batches(_batches())):
        loss = model(batch) * faults.get(i, 1.0)
        fabric.backward(loss)
        guard.step(loss)
        if i == STEPS // 2 and save is not None:
            fabric.save(save, {"model": model, "optimizer": optimizer, "scheduler": scheduler, "guard": guard})
    return guard, model, scheduler


@pytest.mark.parametrize("limit", [None, 0.5])
def test_no_bit_changes(limit: float | None) -> None:
    """equivalence: with Fabric's own step and clipping."""
    fabric, model, optimizer, scheduler = _setup()
    for batch in _batches():
        fabric.backward(model(batch))
        if limit is not None:
            fabric.clip_gradients(model, optimizer, max_norm=limit)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    _, guarded, _ = _guarded({}, clip_norm=limit)
    assert all(torch.equal(a, b) for a, b in zip(_weights(model), _weights(guarded), strict=True))


def test_skip_and_rewind() -> None:
    """planted: three NaN in a row."""
    guard, model, scheduler = _guarded(dict.fromkeys((25, 26, 27), math.nan))
    assert guard.step_count == scheduler.last_epoch == 20 + STEPS - 28
    assert all(torch.isfinite(p).all() for p in _weights(model))


def test_a_restart_takes_the_data_back() -> None:
    """oracle: three NaN of the machine's; the run is then the one that left those batches out from the beginning."""
    guard, model, scheduler = _guarded(dict.fromkeys((25, 26, 27), math.nan), mode="restart")
    fabric, other, optimizer, schedule = _setup()
    for batch in [*_batches()[:25], *_batches()[28:]]:
        fabric.backward(other(batch))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert guard.step_count == scheduler.last_epoch == schedule.last_epoch == STEPS - 3
    assert all(torch.equal(a, b) for a, b in zip(_weights(model), _weights(other), strict=True))


def test_the_state_goes_through_fabrics_checkpoint(tmp_path: Path) -> None:
    """round trip: a new run from the checkpoint in the middle ends with the same bits."""
    _, model, _ = _guarded({}, save=tmp_path / "a.ckpt")
    fabric, other, optimizer, scheduler = _setup()
    guard = guard_fabric(fabric, other, optimizer, scheduler=scheduler, snapshot_every=10)
    state = {"model": other, "optimizer": optimizer, "scheduler": scheduler, "guard": guard}
    fabric.load(tmp_path / "a.ckpt", state)
    assert guard.step_count == STEPS // 2 + 1
    for batch in guard.batches(_batches()):
        loss = other(batch)
        fabric.backward(loss)
        guard.step(loss)
    assert guard.step_count == STEPS
    assert all(torch.equal(a, b) for a, b in zip(_weights(model), _weights(other), strict=True))


def test_what_is_not_set_up_is_refused() -> None:
    """planted."""
    fabric, model, optimizer, _ = _setup()
    with pytest.raises(ValueError, match="what fabric.setup"):
        guard_fabric(fabric, model.module, optimizer)
    with pytest.raises(ValueError, match="what fabric.setup"):
        guard_fabric(fabric, model, optimizer.optimizer)
    with pytest.raises(ValueError, match="takes this from Fabric"):
        guard_fabric(fabric, model, optimizer, scaler=None)


def test_the_page_runs_as_printed() -> None:
    """contract: the block for Fabric of docs/guard-adapters.md."""
    page = (Path(__file__).parents[3] / "docs" / "guard-adapters.md").read_text("utf-8")
    blocks = [
        block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "adapters.fabric import" in block
    ]
    assert len(blocks) == 1
    exec(compile(blocks[0], "guard-adapters.md", "exec"), {"__name__": "page"})
