"""MLflow through its client, batched: a call for each step costs some twenty times a batch's share."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aftershock.config import leaves
from aftershock.store.folder import plain
from aftershock.store.sinks import PREFIX, STEP, RunInfo, require

BATCH = 1000
"""Most metrics MLflow takes in one `log_batch`."""
PARAMS = 100
"""Most parameters MLflow takes in one `log_batch`."""
PARAM_CHARS = 500
"""Longest value of a parameter that every MLflow server takes."""
FLUSH_S = 10.0
"""A slow run still shows: metrics go out when this old."""
RUN_TAG = "aftershock.run_id"


class MlflowSink:
    """Logs to a tracking URI, experiment after `#` (`aftershock` without): `sqlite:///runs.db#qk-norm`."""

    def __init__(self, target: str) -> None:
        """Raises ValueError when mlflow is not installed."""
        self._mlflow = require("mlflow", "mlflow")
        self._uri, _, experiment = target.partition("#")
        self._experiment = experiment or "aftershock"
        self._client: Any = None
        self._id = ""
        self._metrics: list[Any] = []
        self._sent = time.monotonic()

    def open(self, run: RunInfo) -> None:
        """A run of the same id in the experiment is continued."""
        self._client = self._mlflow.MlflowClient(tracking_uri=self._uri)
        found = self._client.get_experiment_by_name(self._experiment)
        place = found.experiment_id if found else self._client.create_experiment(self._experiment)
        earlier = self._client.search_runs([place], f"tags.`{RUN_TAG}` = '{run.run_id}'")
        if earlier:
            self._id = earlier[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        tags = {RUN_TAG: run.run_id} | dict(run.tags)
        self._id = self._client.create_run(place, tags=tags, run_name=run.run_id).info.run_id
        entities = self._mlflow.entities
        flat = leaves(plain(run.config, "config"))
        params = [entities.Param(key, str(value)[:PARAM_CHARS]) for key, value in flat.items()]
        for start in range(0, len(params), PARAMS):
            self._client.log_batch(self._id, params=params[start : start + PARAMS])

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        metric = self._mlflow.entities.Metric
        self._metrics += [metric(name, value, now, step) for name, value in metrics.items()]
        if len(self._metrics) >= BATCH or time.monotonic() - self._sent > FLUSH_S:
            self._flush()

    def event(self, kind: str, step: int, data: Mapping[str, object]) -> None:
        """A metric at its step, and the latest data of its kind as a tag."""
        self.log({f"{PREFIX}event/{kind}": 1.0, STEP: float(step)}, step)
        self._client.set_tag(self._id, f"aftershock.event.{kind}", json.dumps({"step": step} | plain(data, kind)))

    def artifact(self, path: Path, name: str) -> None:
        self._client.log_artifact(self._id, str(path))

    def close(self, status: str) -> None:
        self._flush()
        self._client.set_tag(self._id, "aftershock.status", status)
        ends = {"finished": "FINISHED", "diverged": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
        self._client.set_terminated(self._id, status=ends[status])

    def _flush(self) -> None:
        self._sent = time.monotonic()
        while self._metrics:
            batch, self._metrics = self._metrics[:BATCH], self._metrics[BATCH:]
            self._client.log_batch(self._id, metrics=batch)  # it tries again by itself; what it gives up on is gone
