"""MLflow: batched calls only, and offline for real what its own client reads back after a rewind."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


def test_contract_batches_only(fake: Callable[[str], Any], story: Callable[[str], None]) -> None:
    mlflow, client = fake("mlflow"), fake("mlflow_client")
    mlflow.MlflowClient = lambda tracking_uri: client
    mlflow.entities = SimpleNamespace(Metric=lambda *a: a, Param=lambda *a: a)
    client.get_experiment_by_name = lambda name: SimpleNamespace(experiment_id=f"id of {name}")
    client.search_runs = lambda places, query: []
    client.info = SimpleNamespace(run_id="theirs")
    story("mlflow:sqlite:///x.db#exp")
    assert client.named("create_run")[0][1:] == (
        ("id of exp",),
        {"tags": {"aftershock.run_id": "run-1", "arm": "x"}, "run_name": "run-1"},
    )
    assert client.named("log_metric") == client.named("log_metrics") == []
    params, *metrics = (kwargs for _, _, kwargs in client.named("log_batch"))
    assert params == {"params": [("optim.lr", "0.1")]}
    sent = [(name, step) for kwargs in metrics for name, _, _, step in kwargs.get("metrics", ())]
    assert [step for name, step in sent if name == "aftershock/loss/train/ce"] == [5, 6, 7, 8, 9, 7, 8, 9]
    assert sent.count(("aftershock/event/spike", 9)) == 1
    assert [kwargs["status"] for _, _, kwargs in client.named("set_terminated")] == ["KILLED", "FINISHED"]


@pytest.mark.filterwarnings("ignore")  # mlflow and sqlalchemy warn of their own future under our warnings-as-errors
def test_round_trip_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, story: Callable[[str], None]) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow: pip install 'aftershock[mlflow]'")
    pytest.importorskip("sqlalchemy", reason="needs mlflow with its database, not mlflow-skinny")
    monkeypatch.chdir(tmp_path)  # artifacts of a local database go below the working directory
    uri = f"sqlite:///{tmp_path / 'm.db'}"
    story(f"mlflow:{uri}#exp")
    client = mlflow.MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("exp").experiment_id])
    assert run.data.params == {"optim.lr": "0.1"}
    assert run.data.tags["aftershock.status"] == "finished"
    history = client.get_metric_history(run.info.run_id, "aftershock/loss/train/ce")
    shown = sorted((m.step, m.value) for m in history if not math.isnan(m.value))
    assert shown == [(5, 5.0), (6, 6.0), (7, 7.0), (7, 7.5), (9, 9.0), (9, 9.5)], "both branches are kept"
    assert {a.path for a in client.list_artifacts(run.info.run_id)} == {"config.yaml", "events.jsonl"}
