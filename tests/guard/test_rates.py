"""Scaled rates: exact while they last, gone without a trace afterwards."""

from __future__ import annotations

import torch
from torch import nn

from aftershock.guard.rates import Scale, put_on, take_off


def test_factor_then_back_linearly() -> None:
    """oracle: the sequence by hand; then the plain scale, which is over."""
    scale, found = Scale(0.5, 2, 3), []
    for _ in range(7):
        found.append(scale.now())
        scale = scale.after_step()
    assert found == [0.5, 0.5, 0.625, 0.75, 0.875, 1.0, 1.0]
    assert scale == Scale()


def test_rates_are_the_same_objects_afterwards() -> None:
    """contract: a number and a tensor (capturable)."""
    p, q = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    rate = torch.tensor(0.2)
    optimizer = torch.optim.AdamW([{"params": [p], "lr": 0.1}, {"params": [q], "lr": rate}], foreach=False)
    own = put_on(optimizer, 0.5)
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.05, float(rate) * 0.5]
    take_off(optimizer, own)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert optimizer.param_groups[1]["lr"] is rate
    assert float(rate) == float(torch.tensor(0.2))
