"""Studies: manifest, status of each run, a shared pool, SQL against what the readers say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from aftershock.store import RunRef, RunWriter, Study, write_manifest

STAT = "attn/blocks.0/max_logit"


def _refs(count: int) -> list[RunRef]:
    return [RunRef(run_id=f"r{i}", size="w16-d1", arm="base", lr=0.1 * (i + 1), seed=i) for i in range(count)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """r0 finished, r1 diverged after a rewind, r2 interrupted, r3 not started."""
    write_manifest(tmp_path / "s", name="demo", title="A demo", runs=_refs(4))
    runs = tmp_path / "s" / "runs"
    with RunWriter.open(runs / "r0", config={"a": 0}) as run:
        for step in range(3):
            run.scalars(step, {"loss/train/ce": 5.0 - step})
            run.stats(step, [STAT], np.array([float(step)]))
        run.close("finished", {"final_loss": 3.0, "steps": 3, "diverged_step": None})
    with RunWriter.open(runs / "r1", config={"a": 1}) as run:
        for step in range(4):
            run.scalars(step, {"loss/train/ce": float(step)})
            run.stats(step, [STAT], np.array([10.0 * step], dtype=np.float32))
        run.new_segment()
        run.scalars(2, {"loss/train/ce": float("nan")})
        run.stats(2, [STAT], np.array([np.inf]))
        run.close("diverged", {"final_loss": float("nan"), "steps": 3, "diverged_step": 2})
    with RunWriter.open(runs / "r2", config={"a": 2}) as run:
        run.scalars(0, {"loss/eval/ce": 7.0})
    return tmp_path / "s"


def test_round_trip_manifest_and_status(folder: Path) -> None:
    study = Study(folder)
    assert (study.name, study.title, list(study.refs)) == ("demo", "A demo", _refs(4))
    rows = study.rows()
    assert [row.status for row in rows] == ["finished", "diverged", "interrupted", "missing"]
    assert [row.summary.get("final_loss", "none") for row in rows] == [3.0, None, "none", "none"]
    assert study.reader("r1").config == {"a": 1}


def test_equivalence_sql_says_what_the_readers_say(folder: Path) -> None:
    study = Study(folder)
    found = study.sql("select run_id, segment, step, name, value from scalars order by run_id, step")
    want = [
        {"run_id": run_id, "segment": row.segment, "step": row.step, "name": row.name, "value": row.value}
        for run_id in ("r0", "r1", "r2")
        for row in study.reader(run_id).scalar_rows()
    ]
    assert len(found) == 3 + 3 + 1
    assert repr(found) == repr(want)  # by text: nan is not equal to itself
    stats = study.sql(
        "select run_id, step, kind || '/' || place || '/' || stat as name, value from stats order by run_id, step"
    )
    assert stats == [
        {"run_id": run_id, "step": int(step), "name": STAT, "value": float(value)}
        for run_id in ("r0", "r1")
        for step, value in zip(*study.reader(run_id).stats()[STAT], strict=True)
    ]
    joined = study.sql(
        "select lr, max(value) as peak from stats join runs using (run_id) where status = 'diverged' group by lr"
    )
    assert joined == [{"lr": 0.2, "peak": float("inf")}]
    runs = study.sql("select run_id, status, final_loss, diverged_step from runs order by run_id")
    assert runs[1] == {"run_id": "r1", "status": "diverged", "final_loss": None, "diverged_step": 2}
    assert runs[3] == {"run_id": "r3", "status": "missing", "final_loss": None, "diverged_step": None}


def test_contract_study_without_any_run(tmp_path: Path) -> None:
    write_manifest(tmp_path, name="n", title="t", runs=_refs(1))
    assert Study(tmp_path).sql("select (select count(*) from scalars) + (select count(*) from stats) as n") == [
        {"n": 0}
    ]
    write_manifest(tmp_path, name="n", title="t", runs=[])
    assert Study(tmp_path).rows() == []
    assert Study(tmp_path).sql("select count(*) as n from runs") == [{"n": 0}]


def test_contract_two_studies_share_a_pool(tmp_path: Path) -> None:
    RunWriter.open(tmp_path / "pool" / "r0", config={}).close("finished", {"final_loss": 1.0})
    for name in ("one", "two"):
        ref = RunRef(run_id="r0", size=name, arm="x", lr=0.1, seed=0)
        write_manifest(tmp_path / name, name=name, title=name, runs=[ref], runs_dir="../pool")
        for place in (tmp_path / name, f"file://{tmp_path / name}"):
            (row,) = Study(place).rows()
            assert (row.ref.size, row.status, row.summary) == (name, "finished", {"final_loss": 1.0})
    write_manifest(tmp_path / "three", name="3", title="3", runs=_refs(1), runs_dir=str(tmp_path / "pool"))
    assert Study(tmp_path / "three").rows()[0].status == "finished"


def test_contract_writing_again_keeps_the_time_of_creation(tmp_path: Path) -> None:
    path = write_manifest(tmp_path, name="n", title="t", runs=_refs(1))
    record = json.loads(path.read_text()) | {"created": "2020-01-01T00:00:00+00:00"}
    path.write_text(json.dumps(record))
    write_manifest(tmp_path, name="n", title="t", runs=_refs(2))
    assert Study(tmp_path).created == "2020-01-01T00:00:00+00:00"
    assert len(Study(tmp_path).refs) == 2


def test_planted_bad_manifests_and_queries(folder: Path) -> None:
    study = Study(folder)
    with pytest.raises(ValueError, match="no run 'r9'; did you mean 'r"):
        study.reader("r9")
    with pytest.raises(ValueError, match="no run here"):
        study.reader("r3")
    with pytest.raises(ValueError, match=r"query failed: .*scalers"):
        study.sql("select * from scalers")
    with pytest.raises(ValueError, match=r"no study here \(no study\.json\)"):
        Study(folder / "runs")
    path = folder / "study.json"
    record = json.loads(path.read_text())
    for change, words in (
        ({"schema": 2}, "newer aftershock"),
        ({"runs": [{"run_id": "a", "sice": "b"}]}, r"runs\[0\]: unknown key 'sice'; did you mean 'size'"),
    ):
        path.write_text(json.dumps(record | change))
        with pytest.raises(ValueError, match=words):
            Study(folder)
    path.write_text(json.dumps({"schema": 1, "name": "x"}))
    with pytest.raises(ValueError, match="missing created, runs, runs_dir, title"):
        Study(folder)
    path.write_text("[]")
    with pytest.raises(ValueError, match="not a JSON mapping"):
        Study(folder)
