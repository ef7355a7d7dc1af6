"""Sharded numbers equal unsharded ones: real torchrun, two gloo processes, one thread each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from aftershock.signals.ranks import Sharding, is_sharded, local, meet, sharding

WORKER = Path(__file__).with_name("ranks_worker.py")

Torchrun = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def alone(torchrun: Torchrun, tmp_path_factory: pytest.TempPathFactory) -> dict:
    return torchrun(WORKER, "alone", out=tmp_path_factory.mktemp("alone") / "rows", num_processes=1)[0]


@pytest.mark.parametrize("way", ["ddp", "fsdp", "hsdp-fsdp2"])
def test_equivalence_with_one_process(torchrun: Torchrun, alone: dict, tmp_path: Path, way: str) -> None:
    """DDP, FSDP2, and FSDP2 on a mesh that replicates: each statistic of each step; both ranks the same bits."""
    name = "fsdp_hybrid" if way.startswith("hsdp") else way
    first, second = torchrun(WORKER, name, out=tmp_path / "rows", num_processes=2)
    assert first == second
    assert first["notes"] == alone["notes"] == []
    for many, one in zip(first["rows"], alone["rows"], strict=True):
        for part, whole in zip(many, one, strict=True):
            assert part.keys() == whole.keys()
            for key, value in part.items():
                if key.endswith("kurtosis"):  # a mean of the ranks' own, by definition
                    continue
                # float32 gradients are averaged in another order; three steps of Adam carry it on.
                assert value == pytest.approx(whole[key], rel=2e-4, abs=1e-5), key


def test_a_plain_model_needs_no_talk() -> None:
    model = nn.Linear(2, 2)
    spread = sharding(dict(model.named_parameters()))
    columns = torch.ones(2, 3, dtype=torch.float64)
    assert spread == Sharding(None, None)
    assert meet(columns, ["sum"] * 3, spread) is columns
    assert not is_sharded(model.weight)
    assert local(model.weight).data_ptr() == model.weight.data_ptr()
