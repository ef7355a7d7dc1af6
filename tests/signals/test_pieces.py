"""The cut: pieces cover every element once, combine as named, and leave out what is absent."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from aftershock.signals import pieces
from aftershock.signals.pieces import Cut

CPU = torch.device("cpu")


@pytest.mark.parametrize("piece", [1, 3, 100])
def test_oracle_sums_and_maxima(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    """Sizes 0, 1 and many; a transposed tensor; bf16; one place absent."""
    monkeypatch.setattr(pieces, "PIECE", {"cpu": piece})
    monkeypatch.setattr(pieces, "GROUP", {"cpu": 2 * piece})
    full = [torch.randn(0), torch.randn(1), torch.randn(5, 4).T, torch.randn(7).bfloat16(), torch.randn(3).double()]
    side: list[Tensor | None] = [*full[:1], None, *full[2:]]
    cut = Cut([x.numel() for x in full], CPU)

    def work(places: list[int], lists: list[list[Tensor]]) -> dict:
        assert len(places) == len(lists[0])
        assert all(x.dtype in (torch.float32, torch.float64) for x in lists[0])
        tops = [x.abs().amax() for x in lists[0]]
        return {"norm_x": [x.square().sum() for x in lists[0]], "max_x": tops, "sum_x": [x.sum() for x in lists[0]]}

    got = cut.columns([side], work, names=["norm_x", "max_x", "sum_x"])
    for place, x in enumerate(side):
        expected = (
            [np.nan] * 3 if x is None else [x.double().square().sum(), x.abs().max() if len(x) else 0, x.double().sum()]
        )
        for value, want in zip((got["norm_x"], got["max_x"], got["sum_x"]), expected, strict=True):
            assert float(value[place]) == pytest.approx(float(want), rel=1e-5, abs=1e-5, nan_ok=True)  # float32 sums


def test_a_process_without_an_element_gives_zeros() -> None:
    got = Cut([0, 0], CPU).columns([[torch.ones(0), None]], lambda *_: {}, names=["norm_x"])
    assert got["norm_x"][0] == 0
    assert got["norm_x"][1].isnan()
