"""Small workloads that spike on demand: a regression with three bad batches, plain or with everything that draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aftershock.replay.recording import record
from aftershock.replay.subject import Subject
from aftershock.workload import Workload

BAD = range(150, 153)
"""Batches whose targets are wrong by 30."""

Build = Callable[..., Workload]


class Net(nn.Module):
    """8-32-1, dropout between."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.inner, self.drop, self.outer = nn.Linear(8, 32), nn.Dropout(dropout), nn.Linear(32, 1)

    def forward(self, x_B8: Tensor) -> Tensor:
        return self.outer(self.drop(torch.tanh(self.inner(x_B8))))


def regression(index: int, *, bad: range = BAD) -> tuple[Tensor, Tensor]:
    """16 points of y = sum of tanh x, with noise; a pure function of the index."""
    random = torch.Generator().manual_seed(1000 + index)
    x_B8 = torch.randn(16, 8, generator=random)
    y_B1 = x_B8.tanh().sum(1, keepdim=True) + 0.3 * torch.randn(16, 1, generator=random)
    return x_B8, y_B1 + (30.0 if index in bad else 0.0)


def squared(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0].to(next(model.parameters()).dtype)).float() - batch[1]).square().mean()


def squared_bf16(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return (model(batch[0]).float() - batch[1]).square().mean()


def build(
    *, dropout: float = 0.0, accumulate: int = 1, bf16: bool = False, clip_norm: float | None = None, **other: Any
) -> Workload:
    torch.manual_seed(0)
    model = Net(dropout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), fused=True)
    many = [regression(i) for i in range(2000, 2008)]

    def micro(index: int) -> list[tuple[Tensor, Tensor]]:
        bad = range(index * accumulate, (index + 1) * accumulate) if index in BAD else range(0)
        return [regression(index * accumulate + i, bad=bad) for i in range(accumulate)]

    @torch.no_grad()
    def held_out(model: nn.Module) -> float:
        return sum(squared(model, batch).item() for batch in many) / len(many)

    return Workload(
        model=model,
        optimizer=optimizer,
        batch=regression if accumulate == 1 else micro,
        loss=squared_bf16 if bf16 else squared,
        scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.001 * step)),
        clip_norm=clip_norm,
        accumulate=accumulate,
        held_out=held_out,
        **other,
    )


@pytest.fixture(scope="session")
def make() -> Build:
    """`build`: a fresh workload of the same weights each time."""
    return build


@pytest.fixture(scope="session")
def subject() -> Subject:
    """Three bad batches, recorded once. Whoever uses it leaves the workload as it was, which is what is tested."""
    found = record(build(), steps=400)
    assert found is not None
    return found
