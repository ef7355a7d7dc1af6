"""From claim to record through real, tiny runs, which claims share."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from aftershock.claims import study
from aftershock.claims.catalog import CLAIMS, find_claim
from aftershock.claims.claim import Claim, Forecast, Judgement, RunResult, ScoreTrial, Trial
from aftershock.claims.emergence_criteria import CHECKPOINTS, MODELS
from aftershock.claims.foretold import COMMITTED
from aftershock.claims.records import read_records
from aftershock.cli import main
from aftershock.config import override
from aftershock.forecast.curves import sigmoid
from aftershock.lab.job import run_folders
from aftershock.lab.launch import Job, JobState
from aftershock.lab.sweep import OnProgress, SweepProgress, expand

SHORT = {
    "steps": 10,
    "optim.warmup_steps": 1,
    "measure_every": 5,
    "eval_sequences": 2,
    "batch_size": 2,
    "data.context": 16,
}


def tiny(claim_id: str) -> Claim:
    """The claim with a study of ten steps: width 16, two rates, two seeds."""
    claim = find_claim(claim_id)
    assert isinstance(claim.trial, Trial)
    sweep = claim.trial.sweep
    sweep = dataclasses.replace(
        sweep, base=override(sweep.base, SHORT), sizes=("16x1",), lrs=(1e-2, 3e-2), seeds=(0, 1)
    )
    return dataclasses.replace(claim, trial=dataclasses.replace(claim.trial, sweep=sweep))


def test_claims_are_judged_and_share_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """round trip: train, judge, write, read; a second claim on the same runs trains nothing."""
    monkeypatch.setattr(study, "choose_claims", lambda ids, **_: [tiny(claim_id) for claim_id in ids])
    seen: list[tuple[str, SweepProgress]] = []

    @contextlib.contextmanager
    def progress(title: str) -> Iterator[OnProgress]:
        yield lambda state: seen.append((title, state))

    out, folder = tmp_path / "out", tmp_path / "records"
    records = study.judge_all(["P2", "P14"], out, processes=1, on_progress=progress, records=folder)
    assert [record.id for record in records] == ["P2", "P14"]
    assert {title for title, _ in seen} == {"P2", "P14"}
    assert next(state for title, state in seen if title == "P14").note == "complete"
    found = read_records(folder)
    assert [found["P2"][-1], found["P14"][-1]] == records
    p2, p14 = records
    assert len(p2.run_ids) == 8
    assert set(p14.run_ids) < set(p2.run_ids)
    assert sorted(path.name for path in (out / "runs").iterdir()) == sorted(p2.run_ids)
    assert p2.effect is not None
    assert p2.interval is not None
    assert p2.num_seeds == 2
    assert p2.command == "aftershock claims --run P2"
    assert p2.torch is not None
    assert p2.core_s > 0
    assert (folder / "P2.json").stat().st_size < 5000
    assert "host" not in p2.machine
    # ten steps break nothing, so there is no growth to explain: said so, not guessed
    assert (p14.verdict, p14.effect, p14.interval) == ("inconclusive", None, None)


def test_one_claim_that_fails_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """planted: the first study cannot be judged, the second can, and the reason comes at the end."""
    record = object()

    def judge(claim: Claim, *_: object, **__: object) -> object:
        if claim.id == "P1":
            raise ValueError("no run trained")
        return record

    written: list[object] = []
    monkeypatch.setattr(study, "judge", judge)
    monkeypatch.setattr(study, "write_record", lambda folder, made: written.append(made))
    with pytest.raises(ValueError, match="P1 could not be judged: no run trained"):
        study.judge_all(["P1", "P2"], tmp_path, records=tmp_path)
    assert written == [record]


def test_a_mistake_trains_nothing(tmp_path: Path) -> None:
    """planted."""
    for ids, words in ((["P1", "P99"], "unknown claim 'P99'"), (["P1", "G1"], "G1 has no study yet")):
        with pytest.raises(ValueError, match=words):
            study.judge_all(ids, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------- a forecast comes first


class HereLauncher:
    """Trains each job in this process."""

    max_parallel = 1

    def __init__(self, *, num_processes: int) -> None:
        assert num_processes == 1

    def submit(self, job: Job) -> str:
        run_folders(job.folders)
        return job.name

    def poll(self, handle: str) -> JobState:
        return "done"

    def cancel(self, handle: str) -> None:
        raise AssertionError("a job that is done cannot be cancelled")


def foretelling(out: Path, seen: list[list[RunResult]]) -> Claim:
    """P5 with two sizes of ten steps, the second foretold; what it foretells is told, and checked to be still ahead."""
    claim = tiny("P5")
    assert isinstance(claim.trial, Trial)
    sweep = dataclasses.replace(claim.trial.sweep, sizes=("16x1", "16x2"), lrs=(1e-2,))
    ahead = [planned.ref.run_id for planned in expand(sweep) if planned.ref.size == "16x2"]

    def foretell(fitted: Sequence[RunResult]) -> dict[str, float | None]:
        if not seen:
            assert not any((out / "runs" / name).exists() for name in ahead)
        seen.append(list(fitted))
        return {f"seed {run.seed}": run.final_loss for run in fitted}

    def judged(runs: Sequence[RunResult]) -> Judgement:
        assert {run.size for run in runs} == {"16x1", "16x2"}
        return Judgement(verdict="inconclusive", effect=0.0, interval=(0.0, 0.0), meaning="nothing")

    forecast = Forecast(sweep=dataclasses.replace(sweep, sizes=("16x1",)), foretell=foretell)
    trial = dataclasses.replace(claim.trial, sweep=sweep, criterion=judged, forecast=forecast)
    return dataclasses.replace(claim, trial=trial)


def test_a_forecast_is_on_disk_before_what_it_is_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """planted: foretold from the first stage's runs alone, kept beside the record and when judged again; without the
    file, the runs that it was about are there too early."""
    out, folder = tmp_path / "out", tmp_path / "records"
    seen: list[list[RunResult]] = []
    monkeypatch.setattr(study, "choose_claims", lambda ids, **_: [foretelling(out, seen)])
    monkeypatch.setattr(study, "LocalLauncher", HereLauncher)
    study.judge_all(["P5"], out, processes=1, records=folder)
    assert {run.size for run in seen[0]} == {"16x1"}
    made = (out / "P5" / COMMITTED).read_bytes()
    assert (folder / "P5" / COMMITTED).read_bytes() == made
    assert set(json.loads(made)["run_ids"]) < set(read_records(folder)["P5"][-1].run_ids)
    study.judge_all(["P5"], out, processes=1, records=folder)
    assert seen[1] == seen[0]
    assert (out / "P5" / COMMITTED).read_bytes() == made
    shutil.rmtree(out / "P5")
    with pytest.raises(ValueError, match="P5 could not be judged: 2 runs .* a forecast must come first"):
        study.judge_all(["P5"], out, processes=1, records=folder)
    assert not (out / "P5").exists()


# ---------------------------------------------------------------------------------------------------- scores of others


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with four tasks of forty models in eight families: p^12 beside its Brier score."""
    folder = tmp_path_factory.mktemp("scores")
    rng = np.random.default_rng(0)
    x_N = np.linspace(20.5, 24.5, 40)
    rows = ["task,metric,model,model_family,train_flops,score\n"]
    for t in range(4):
        p_N = sigmoid(1.2 * (x_N - 21.5)) * (1 - 0.02 * rng.random(x_N.size))
        for i, (x, p) in enumerate(zip(x_N, p_N, strict=True)):
            for metric, score in (("acc", p**12), ("brier", 1 - p)):
                rows.append(f"t{t},{metric},m{i},f{i // 5},{10**x:.6g},{score:.6f}\n")
    for name in (MODELS, CHECKPOINTS):
        (folder / name).write_text("".join(rows))
    return folder


SCORED = [claim for claim in CLAIMS if isinstance(claim.trial, ScoreTrial)]


def test_claims_on_scores_are_judged(tmp_path: Path, scores: Path) -> None:
    """round trip: read, judge, write; nothing is trained, and the record says which tables it rests on."""
    records = study.judge_all([claim.id for claim in SCORED], tmp_path / "out", records=tmp_path / "r", scores=scores)
    assert [record.id for record in records] == [claim.id for claim in SCORED]
    assert not (tmp_path / "out").exists()
    for claim, record in zip(SCORED, records, strict=True):
        assert read_records(tmp_path / "r")[claim.id] == [record]
        assert isinstance(claim.trial, ScoreTrial)
        held = b"".join((scores / name).read_bytes() for name in claim.trial.files)
        assert record.config_digest == hashlib.sha256(held).hexdigest()
        assert (record.scale, record.num_seeds, record.run_ids) == ("public", 0, [])
        assert record.command == f"aftershock claims --run {claim.id} --scores FOLDER"
        assert str(scores) not in json.dumps(record)


def test_missing_scores_are_named_before_anything_is_trained(
    tmp_path: Path, scores: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """planted: no folder, one that is not there, one with half of the files; and a folder that nothing asks for."""

    def trained(*_: object, **__: object) -> None:
        raise AssertionError("something is trained")

    monkeypatch.setattr(study, "run_sweep", trained)
    out, half = tmp_path / "out", tmp_path / "half"
    half.mkdir()
    shutil.copy(scores / MODELS, half)
    for folder, words in (
        (None, rf"E1, E3 are judged .* holds {MODELS} and {CHECKPOINTS} as --scores FOLDER$"),
        (tmp_path / "none", rf"--scores FOLDER; .*none has no {MODELS} and no {CHECKPOINTS}$"),
        (half, rf"--scores FOLDER; .*half has no {CHECKPOINTS}$"),
    ):
        with pytest.raises(ValueError, match=words):
            study.judge_all(["P1", "E1", "E3"], out, scores=folder)
    with pytest.raises(ValueError, match="has no use here: of P1, P2 none is judged on benchmark scores"):
        study.judge_all(["P1", "P2"], out, scores=scores)
    with pytest.raises(ValueError, match="E2 is judged on benchmark scores"):
        study.judge(find_claim("E2"), out)
    assert not out.exists()


def test_the_command_takes_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """contract: one sentence and status 2 where the tables are not in the folder that the flag names."""
    assert main(["claims", "--run", "E2", "--scores", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert f"{tmp_path} has no {MODELS}" in capsys.readouterr().err
