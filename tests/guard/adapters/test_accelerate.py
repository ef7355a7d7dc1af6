"""The guard in an Accelerate loop, two examples, and what happens without the trainers."""

from __future__ import annotations

import argparse
import inspect
import math
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("accelerate")

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import GradientAccumulationPlugin

from aftershock.guard.adapters import needed
from aftershock.guard.adapters.accelerate import guard_accelerate, plain_loader

ROOT = Path(__file__).parents[3]
BATCHES = 41
"""Not a multiple of the accumulation below: the last micro-batch of an epoch belongs to the next one's first step."""


class Bytes(nn.Module):
    """The loss of the next byte, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.drop, self.head = nn.Embedding(256, 16), nn.Dropout(0.1), nn.Linear(16, 256)

    def forward(self, text: Tensor) -> Tensor:
        logits = self.head(self.drop(self.table(text[:, :-1])))
        return nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Accelerate keeps its state in the process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def _setup(accumulate: int = 1) -> tuple[Any, ...]:
    torch.manual_seed(0)
    plugin = GradientAccumulationPlugin(num_steps=accumulate, sync_with_dataloader=False)
    accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
    model = Bytes()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    data = torch.tensor(list(inspect.getsource(argparse).encode()[: BATCHES * 64])).view(-1, 16)
    loader = DataLoader(TensorDataset(data), batch_size=4, shuffle=True)
    return accelerator, *accelerator.prepare(model, optimizer, scheduler, loader)


def _weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def _guarded(faults: dict[int, float], accumulate: int = 1, **settings: Any) -> tuple[Any, Any, Any]:
    accelerator, model, optimizer, scheduler, loader = _setup(accumulate)
    guard = guard_accelerate(accelerator, model, optimizer, scheduler=scheduler, snapshot_every=10, **settings)
    for i, (text,) in enumerate(guard.batches(plain_loader(loader), epochs=2)):
        with accelerator.accumulate(model):
            loss = model(text) * faults.get(i, 1.0)
            accelerator.backward(loss)
            guard.step(loss / accumulate)
    return guard, model, scheduler.scheduler


@pytest.mark.parametrize("accumulate", [1, 2])
def test_no_bit_changes(accumulate: int) -> None:
    """equivalence: with Accelerate's own loop, clipping included; two epochs of 41 batches."""
    accelerator, model, optimizer, scheduler, loader = _setup(accumulate)
    for _ in range(2):
        for (text,) in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(text))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    guard, other, steps = _guarded({}, accumulate, clip_norm=0.5)
    assert guard.step_count == steps.last_epoch == 2 * BATCHES // accumulate
    assert all(torch.equal(a, b) for a, b in zip(_weights(model), _weights(other), strict=True))


def test_skip_and_rewind() -> None:
    """planted: three NaN in a row; the prepared scheduler goes back too."""
    guard, model, scheduler = _guarded(dict.fromkeys((25, 26, 27), math.nan))
    assert guard.step_count == scheduler.last_epoch == 20 + 2 * BATCHES - 28
    assert all(torch.isfinite(p).all() for p in _weights(model))


def test_a_restart_takes_the_data_back() -> None:
    """oracle: three NaN of the machine's in the second epoch; the run is the one that left those batches out, with its
    dropout and its shuffling."""
    first = BATCHES + 8
    faults = dict.fromkeys(range(first, first + 3), math.nan)
    guard, model, schedule = _guarded(faults, mode="restart")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator, other, optimizer, scheduler, loader = _setup()
    for i, (text,) in enumerate(batch for _ in range(2) for batch in loader):
        if i in faults:
            continue
        accelerator.backward(other(text))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert guard.step_count == schedule.last_epoch == 2 * BATCHES - 3
    assert all(torch.equal(a, b) for a, b in zip(_weights(model), _weights(other), strict=True))


def test_the_state_goes_through_accelerates_checkpoint(tmp_path: Path) -> None:
    """round trip: save_state and load_state carry the guard's clock and place."""
    accelerator, model, optimizer, scheduler, loader = _setup()
    guard = guard_accelerate(accelerator, model, optimizer, scheduler=scheduler)
    accelerator.register_for_checkpointing(guard)
    for i, (text,) in enumerate(guard.batches(plain_loader(loader))):
        loss = model(text)
        accelerator.backward(loss)
        guard.step(loss)
        if i == 9:
            accelerator.save_state(str(tmp_path / "a"))
    accelerator.load_state(str(tmp_path / "a"))
    assert guard.step_count == guard.batch_id == 10
    assert scheduler.scheduler.last_epoch == 10
    assert sum(1 for _ in guard.batches(plain_loader(loader))) == BATCHES - 10


def test_what_does_not_fit_is_refused() -> None:
    """planted."""
    accelerator, model, optimizer, _, _ = _setup()
    with pytest.raises(ValueError, match="accelerator.prepare gave"):
        guard_accelerate(accelerator, model, optimizer.optimizer)
    with pytest.raises(ValueError, match="takes this from the Accelerator"):
        guard_accelerate(accelerator, model, optimizer, accumulate=2)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    with pytest.raises(ValueError, match="sync_with_dataloader=False"):
        guard_accelerate(Accelerator(cpu=True, gradient_accumulation_steps=2), model, optimizer)


def test_an_absent_package_is_named() -> None:
    """contract: the sentence says what to install."""
    with pytest.raises(
        ImportError, match=r"needs nosuchtrainer, which is not installed .* pip install 'nosuchtrainer'"
    ):
        needed("nosuchtrainer.callbacks", "Callback", install="nosuchtrainer")


@pytest.mark.parametrize(("name", "steps"), [("plain_loop", 99), ("accelerate_loop", 49)])
def test_an_example_runs(name: str, steps: int, capsys: pytest.CaptureFixture[str]) -> None:
    """contract: it plants a NaN and ends with the guard's report."""
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert f"{steps} steps, 1 nonfinite, 1 skip" in capsys.readouterr().out


def test_the_page_runs_as_printed() -> None:
    """contract: the block for Accelerate of docs/guard-adapters.md."""
    page = (Path(__file__).parents[3] / "docs" / "guard-adapters.md").read_text("utf-8")
    blocks = [
        block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "adapters.accelerate import" in block
    ]
    assert len(blocks) == 1
    exec(compile(blocks[0], "guard-adapters.md", "exec"), {"__name__": "page"})
