"""Rank agreement: real torchrun, two gloo processes: trouble on one rank, one decision on all, nobody hangs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from aftershock.guard.agree import Ranks

WORKER = Path(__file__).with_name("agree_worker.py")
SOURCE = Path(__file__).parents[2] / "src"


def _run(way: str, out: Path, *troubles: str, number: int = 2) -> list[dict[str, dict[str, Any]]]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number)]
    env = os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, *launch, str(WORKER), way, str(out), *troubles],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(number)]


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    return _run("ddp", tmp_path_factory.mktemp("ddp") / "out", "loss", "number", "cleared")


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    return _run("fsdp", tmp_path_factory.mktemp("fsdp") / "out", "loss")


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_a_nan_on_one_rank_is_everybodys(request: pytest.FixtureRequest, way: str) -> None:
    """planted: two skips, then a rewind, on both ranks at once; the same bits afterwards."""
    first, second = (rank["loss"] for rank in request.getfixturevalue(way))
    assert repr(first["done"]) == repr(second["done"])
    assert first["weights"] == second["weights"]
    assert [i for i, one in enumerate(first["done"]) if not one[0]] == [20, 21, 22]
    assert [one[1] for one in first["done"][20:23]] == ["SkipStep", "SkipStep", "Rewind"]
    assert first["steps"] == second["steps"] == 20 + 17


@pytest.mark.study
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_four_processes_decide_alike(tmp_path: Path, way: str) -> None:
    """planted: a NaN on one of four: the same skips, the same rewind, the same bits on all."""
    first, *others = (rank["loss"] for rank in _run(way, tmp_path / "out", "loss", number=4))
    assert [one[1] for one in first["done"][20:23]] == ["SkipStep", "SkipStep", "Rewind"]
    for other in others:
        assert repr(other) == repr(first)


def test_both_ways_see_the_same_norms(ddp: list[dict[str, Any]], fsdp: list[dict[str, Any]]) -> None:
    """equivalence: the norm of sharded gradients is that of whole ones, clipping included."""
    for one, other in zip(ddp[0]["loss"]["done"], fsdp[0]["loss"]["done"], strict=True):
        assert one[:4] == other[:4]
        # float32 gradients are reduced in another order, and 37 steps of Adam carry it on
        assert one[4] == pytest.approx(other[4], rel=1e-3, nan_ok=True)


def test_a_number_that_one_rank_alone_has(ddp: list[dict[str, Any]]) -> None:
    """planted: the loss handed in is NaN on one rank, its gradients are fine: both skip."""
    first, second = (rank["number"] for rank in ddp)
    assert first["steps"] == second["steps"] == 39
    assert not first["done"][20][0]
    assert first["weights"] == second["weights"]


def test_a_mistake_on_one_rank_ends_all(ddp: list[dict[str, Any]]) -> None:
    """planted: one rank cleared its gradients: both say so, none waits for the other."""
    first, second = (rank["cleared"]["error"] for rank in ddp)
    assert first.startswith("on another rank: guard.step without gradients")
    assert second.startswith("guard.step without gradients")


def test_alone_there_is_nothing_to_agree_on() -> None:
    """contract: numbers come back as they are; nan is carried on; what is asked of nobody is true."""
    ranks = Ranks(None)
    row = ranks.agree({"a": (2.5, "mean"), "b": (torch.tensor(float("nan")), "max"), "c": (7.0, "same")})
    assert row.tolist()[::2] == [2.5, 7.0]
    assert row.isnan().tolist() == [False, True, False]
    assert (ranks.rank, ranks.size, ranks.all_true(True), ranks.all_true(False)) == (0, 1, True, False)
