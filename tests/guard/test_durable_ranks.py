"""Several processes: one sees a NaN and all decide alike; one is killed in the middle of a rewind and all go on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from aftershock.guard.events import read_events
from aftershock.guard.shelf import listed, verify

WORKER = Path(__file__).with_name("durable_worker.py")
SOURCE = Path(__file__).parents[2] / "src"


KILLS = ["ddp:commit", "fsdp:rewind"]
"""In the snapshot behind the rewind, and in the rewind itself, half of the weights written."""


@pytest.mark.parametrize(
    ("number", "kills"), [(2, KILLS), pytest.param(4, ["ddp:rewind", *KILLS, "fsdp:commit"], marks=pytest.mark.study)]
)
def test_killed_in_the_middle_of_a_rewind(tmp_path: Path, number: int, kills: list[str]) -> None:
    """planted: -9 on one rank; the others end too, and what is started anew ends with the same bits."""
    env = os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number)]
    for start in range(len(kills) + 1):
        done = subprocess.run(
            [sys.executable, *launch, str(WORKER), str(tmp_path), *kills],
            env=env,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert (done.returncode == 0) == (start == len(kills)), done.stderr[-3000:]
    ranks: list[dict[str, Any]] = [json.loads((tmp_path / f"result.{rank}").read_text()) for rank in range(number)]
    for way in ("ddp", "fsdp"):
        places = [kill.partition(":")[2] for kill in kills if kill.startswith(f"{way}:")]
        whole, cut = (ranks[0][f"{way}-{kind}"] for kind in ("whole", "cut"))
        assert [one for one in whole["done"] if one[1] == "Rewind"] == [[False, "Rewind", 20, 22]]
        assert whole["skips"] == cut["skips"] == [[20, 23]]
        assert cut["weights"] == whole["weights"]
        for other in ranks[1:]:
            assert other[f"{way}-whole"] == whole
            assert other[f"{way}-cut"] == cut
        kinds = [event.kind for event in read_events(tmp_path / f"{way}-cut")]
        assert kinds.count("resumed") == len(places)
        assert "audit" not in kinds
        for snapshot in listed(tmp_path / f"{way}-cut" / "snapshots"):
            verify(snapshot)
