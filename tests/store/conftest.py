"""A run written by another process, for the tests that kill it, block it or starve it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Start = Callable[..., "subprocess.Popen[str]"]

_PRELUDE = """
import resource, sys, time
import numpy as np
from aftershock.store import RunWriter
folder = sys.argv[1]
"""


@pytest.fixture
def start() -> Iterator[Start]:
    """Start `code` in a new interpreter; `folder` is its first argument. Whatever still runs at the end is killed."""
    children: list[subprocess.Popen[str]] = []

    def begin(code: str, folder: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-u", "-c", _PRELUDE + code, str(folder)]
        env = {"PYTHONPATH": str(Path(__file__).parents[2] / "src"), "PATH": "/usr/bin:/bin"}
        pipe = subprocess.PIPE
        child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=env)
        children.append(child)
        return child

    yield begin
    for child in children:
        child.kill()
        child.communicate()
