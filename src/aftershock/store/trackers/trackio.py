"""trackio, the local-first tracker of Hugging Face. Its store is SQLite: keep TRACKIO_DIR off network file systems."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aftershock.store.folder import plain
from aftershock.store.sinks import PREFIX, STEP, RunInfo, require


class TrackioSink:
    """Logs to `project` under our run id. trackio keeps both values of a step that comes twice."""

    def __init__(self, project: str) -> None:
        """Raises ValueError when trackio is not installed."""
        self._trackio = require("trackio", "trackio")
        self._project = project
        self._run: Any = None

    def open(self, run: RunInfo) -> None:
        self._run = self._trackio.init(
            project=self._project,
            name=run.run_id,
            config=plain(run.config, "config") | {f"tag.{key}": value for key, value in run.tags.items()},
            resume="allow",
            embed=False,
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def event(self, kind: str, step: int, data: Mapping[str, object]) -> None:
        details = {f"{PREFIX}event/{kind}/{key}": value for key, value in data.items()}
        self._run.log({STEP: float(step), f"{PREFIX}event/{kind}": 1.0} | plain(details, kind), step=step)

    def artifact(self, path: Path, name: str) -> None:
        """trackio has no files of a run; they stay in the run folder."""

    def close(self, status: str) -> None:
        self._run.log({f"{PREFIX}status": status})
        self._run.finish()
