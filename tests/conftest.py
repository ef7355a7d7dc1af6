"""What every test shares: one thread a process, unhurried hypothesis, and which marked tests can run here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"  # before torch and numpy load, and inherited by the processes that tests start

import hypothesis
import pytest
import torch

if TYPE_CHECKING:
    from aftershock.replay.explain import Explanation
    from aftershock.workload import Workload

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


BAD_STEP, BAD_ROW = 100, 5
"""Where `classes` has its one wrong row."""


def classes() -> Workload:
    """A classifier of 3 classes on batches of 8, one row of which is once 60 times too large and of the wrong class."""
    from torch import Tensor, nn

    from aftershock.workload import Workload

    def batch(index: int) -> tuple[Tensor, Tensor]:
        random = torch.Generator().manual_seed(index)
        x_B6 = torch.randn(8, 6, generator=random)
        label_B = (x_B6[:, :3] + 0.3 * torch.randn(8, 3, generator=random)).argmax(1)
        if index == BAD_STEP:
            x_B6[BAD_ROW] *= 60
            label_B[BAD_ROW] = x_B6[BAD_ROW, :3].argmin()
        return x_B6, label_B

    def loss(model: nn.Module, pair: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(pair[0]), pair[1])

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, betas=(0.9, 0.95), fused=True)
    return Workload(model=model, optimizer=optimizer, batch=batch, loss=loss)


@pytest.fixture(scope="session")
def explanation() -> Explanation:
    """The spike of `classes`, explained with a few cells and all parts."""
    from aftershock.replay.explain import replay
    from aftershock.replay.recording import record

    subject = record(classes(), steps=300, margin=20)
    assert subject is not None
    cells = ("sham:ulp#1", "sham:skip#1", "sham:permute#1", "skip", "lr*0.5", "clip*2", "earlier", "qk-clip")
    return replay(subject, cells=cells, processes=1)
