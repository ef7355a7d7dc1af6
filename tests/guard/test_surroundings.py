"""What a recording depends on: each change of code, config or machine is named, and nothing besides."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aftershock.guard.surroundings import differences, fingerprint
from aftershock.workload import Workload


def batch_of(index: int) -> Tensor:
    return torch.full((2, 2), float(index))


def squared(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def other(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).abs().mean()


def workload(loss: Any = squared, *, lr: float = 0.1, width: int = 2) -> Workload:
    model = nn.Linear(width, 1)
    return Workload(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=lr), batch=batch_of, loss=loss)


def test_planted_changes_of_code_and_config_are_named() -> None:
    """planted: each change is named and nothing besides; the same workload built again gives none."""
    then = fingerprint(workload())
    assert differences(then, fingerprint(workload())) == ()
    assert differences(then, fingerprint(workload(lr=0.2))) == ("config.optimizer.lr: 0.1 recorded, 0.2 now",)
    (changed,) = differences(then, fingerprint(workload(other)))
    assert changed.startswith("code.loss: ")
    (changed,) = differences(then, fingerprint(workload(width=3)))
    assert changed.startswith("code.parameters: ")
    text = fingerprint({"train": "a = 1"}, config={"data": {"seed": 1}})
    now = fingerprint({"train": "a = 1"}, config={"data": {"seed": 2}, "new": math.nan})
    assert differences(text, now) == ("config.data.seed: 1 recorded, 2 now", "config.new: absent recorded, nan now")
    with pytest.raises(ValueError, match="no source can be read"):
        fingerprint(eval("lambda x: x"))
