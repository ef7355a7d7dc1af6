"""Random kill -9: a few of the trials of benchmarks/kill_trials.py, which counts a thousand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_nothing_is_lost_to_random_kills() -> None:
    """planted: five runs killed up to four times each: every event once, every folder readable, the same weights."""
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.kill_trials", "--trials", "5", "--seed", "1"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "5 trials" in done.stdout
    assert ": 0 wrong" in done.stdout
