"""Sharded numbers equal unsharded ones: real torchrun, two gloo processes, one thread each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from aftershock.signals.ranks import Sharding, is_sharded, local, meet, sharding

WORKER = Path(__file__).with_name("ranks_worker.py")
SOURCE = Path(__file__).parents[2] / "src"


def _run(way: str, out: Path) -> list[dict]:
    launch = [] if way == "alone" else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, *launch, str(WORKER), way, str(out)], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(1 if way == "alone" else 2)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return _run("alone", tmp_path_factory.mktemp("alone") / "rows")[0]


@pytest.mark.parametrize("way", ["ddp", "fsdp", "hsdp-fsdp2"])
def test_equivalence_with_one_process(alone: dict, tmp_path: Path, way: str) -> None:
    """DDP, FSDP2, and FSDP2 on a mesh that replicates: each statistic of each step; both ranks the same bits."""
    first, second = _run("fsdp_hybrid" if way.startswith("hsdp") else way, tmp_path / "rows")
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
