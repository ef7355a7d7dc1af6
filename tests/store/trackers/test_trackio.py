"""trackio: the calls we make, and offline for real what its database holds after a rewind."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

STORY = """
import numpy as np, sys
from aftershock.store import RunWriter
from aftershock.store.sinks import sink_from_spec
for start in (5, 7):
    with RunWriter.open(sys.argv[1], config={"lr": 0.1}, sinks=[sink_from_spec("trackio:proj")]) as run:
        for step in range(start, 10):
            run.scalars(step, {"loss/train/ce": float("nan") if step == 8 else step + (start - 5) / 4})
"""


def test_contract_calls(fake: Callable[[str], Any], story: Callable[[str], None]) -> None:
    trackio = fake("trackio")
    story("trackio:proj")
    first, second = trackio.named("init")
    assert first[2] == second[2]
    assert first[2] == {
        "project": "proj",
        "name": "run-1",
        "config": {"optim": {"lr": 0.1}, "tag.arm": "x"},
        "resume": "allow",
        "embed": False,
    }
    logs = trackio.named("log")
    assert [kw["step"] for _, (row,), kw in logs if "aftershock/loss/train/ce" in row] == [5, 6, 7, 8, 9, 7, 8, 9]
    assert [row for _, (row,), _ in logs if "aftershock/status" in row] == [
        {"aftershock/status": "interrupted"},
        {"aftershock/status": "finished"},
    ]
    assert len(trackio.named("finish")) == 2


@pytest.mark.skipif(find_spec("trackio") is None, reason="needs trackio: pip install 'aftershock[trackio]'")
def test_round_trip_offline(tmp_path: Path) -> None:
    """In a process of its own: trackio reads its folder from the environment when it is imported."""
    src = Path(__file__).parents[3] / "src"
    env = {"PYTHONPATH": str(src), "TRACKIO_DIR": str(tmp_path / "t"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", STORY, str(tmp_path / "run-1")]
    subprocess.run(command, env=env | {"HOME": str(tmp_path)}, check=True, capture_output=True, timeout=120)
    with sqlite3.connect(tmp_path / "t" / "proj.db") as database:
        rows = database.execute("select step, metrics from metrics where run_name = 'run-1' order by id").fetchall()
    key = "aftershock/loss/train/ce"
    shown = [(step, json.loads(metrics)[key]) for step, metrics in rows if key in json.loads(metrics)]
    assert shown == [(5, 5.0), (6, 6.0), (7, 7.0), (8, "NaN"), (9, 9.0), (7, 7.5), (8, "NaN"), (9, 9.5)]
