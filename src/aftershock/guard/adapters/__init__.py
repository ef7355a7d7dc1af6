"""The guard inside other people's trainers: one file each. Must not import a trainer: each file needs its own only."""

from __future__ import annotations

import importlib
from typing import Any


def needed(module: str, name: str, *, install: str) -> Any:
    """`name` of an optional package's `module`. Raises ImportError that says what to install."""
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ImportError(
            f"this adapter needs {module.partition('.')[0]}, which is not installed ({error}); pip install {install!r}"
        ) from error
