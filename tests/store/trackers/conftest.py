"""A stand-in for a tracker's package that records every call, and one story told to every tracker."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from aftershock.store import RunWriter
from aftershock.store.sinks import sink_from_spec

Calls = list[tuple[str, tuple[Any, ...], dict[str, Any]]]


class Fake(ModuleType):
    """Any attribute is a function that notes its call and returns the module itself."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: Calls = []
        self.id = "fake-id"
        self.summary: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            return self

        return call

    def named(self, name: str) -> Calls:
        return [call for call in self.calls if call[0] == name]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Fake]:
    def install(name: str) -> Fake:
        module = Fake(name)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return install


@pytest.fixture
def story(tmp_path: Path) -> Callable[[str], None]:
    """A run of steps 5..9, interrupted; then resumed at 7, with a NaN, a statistic and an event, and finished."""

    def tell(spec: str) -> None:
        for again in (False, True):
            sink = sink_from_spec(spec)
            with RunWriter.open(
                tmp_path / "run-1", config={"optim": {"lr": 0.1}}, tags={"arm": "x"}, sinks=[sink]
            ) as run:
                for step in range(7 if again else 5, 10):
                    run.scalars(step, {"loss/train/ce": math.nan if step == 8 else step + 0.5 * again})
                run.stats(9, ["grad/head/rms"], np.array([0.25]))
                if again:
                    run.event("spike", 9, size=3.0, why="x")
                    run.close("finished", {})

    return tell
