"""Worker processes of one thread each that end with the process that started them.

Must not import torch at the top: the parent may not need it.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait


def worker_pool(processes: int) -> ProcessPoolExecutor:
    """A pool of `processes` fresh interpreters. Raises ValueError when that is less than 1."""
    if processes < 1:
        raise ValueError(f"the number of processes must be at least 1, got {processes}")
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(processes, mp_context=context, initializer=_prepare)


def _prepare() -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"  # before a task loads torch
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    """A parent that is killed closes no pool: its workers would wait for it for ever."""
    wait([sentinel])
    os._exit(1)
