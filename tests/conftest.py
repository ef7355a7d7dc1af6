"""What every test shares: one thread a process, unhurried hypothesis, and which marked tests can run here."""

from __future__ import annotations

import os
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"  # before torch and numpy load, and inherited by the processes that tests start

import hypothesis
import pytest
import torch

CHROMIUM = Path("/usr/bin/chromium")

torch.set_num_threads(1)
# Derandomised: the gate answers the same twice. No deadline: two workers share two cores with whatever else runs.
hypothesis.settings.register_profile("house", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("house")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what needs hardware or a browser that is absent; on CI a missing browser is a failure."""
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    no_browser = pytest.mark.skip(reason=f"needs {CHROMIUM} (Debian and Ubuntu: apt-get install chromium)")
    browser_may_miss = not CHROMIUM.exists() and not os.environ.get("CI")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if item.get_closest_marker("browser") and browser_may_miss:
            item.add_marker(no_browser)
