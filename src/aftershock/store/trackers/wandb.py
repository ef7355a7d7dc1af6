"""Weights & Biases. Its own step must only grow, and rows that go back are dropped: ours is sent as a metric instead,
and every chart is told to use it. Works without network under WANDB_MODE=offline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aftershock.store.folder import plain
from aftershock.store.sinks import PREFIX, STEP, RunInfo, require


class WandbSink:
    """Logs to `project`, or `entity/project`; the run's id there is our run id, so a resumed run goes on."""

    def __init__(self, project: str) -> None:
        """Raises ValueError when wandb is not installed."""
        self._wandb = require("wandb", "wandb")
        entity, slash, name = project.rpartition("/")
        self._entity = entity if slash else None
        self._project = name
        self._run: Any = None

    def open(self, run: RunInfo) -> None:
        self._run = self._wandb.init(
            entity=self._entity,
            project=self._project,
            id=run.run_id,
            name=run.run_id,
            config=plain(run.config, "config"),
            tags=[f"{key}:{value}" for key, value in run.tags.items()],
            resume="allow",
            reinit="create_new",  # a fleet has several runs open in one process
        )
        self._run.define_metric(f"{PREFIX}*", step_metric=STEP)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics))

    def event(self, kind: str, step: int, data: Mapping[str, object]) -> None:
        details = {f"{PREFIX}event/{kind}/{key}": value for key, value in data.items()}
        self._run.log({STEP: float(step), f"{PREFIX}event/{kind}": 1.0} | plain(details, kind))

    def artifact(self, path: Path, name: str) -> None:
        artifact = self._wandb.Artifact(f"{self._run.id}-{name}", type="aftershock")
        artifact.add_file(str(path), name=name)
        self._run.log_artifact(artifact)

    def close(self, status: str) -> None:
        self._run.summary[f"{PREFIX}status"] = status
        self._run.finish(exit_code=0 if status in ("finished", "diverged") else 1)
