"""From claim to record through real, tiny runs, which claims share."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from aftershock.claims import study
from aftershock.claims.catalog import find_claim
from aftershock.claims.claim import Claim, Trial
from aftershock.claims.records import read_records
from aftershock.config import override
from aftershock.lab.sweep import OnProgress, SweepProgress

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
    monkeypatch.setattr(study, "choose_claims", lambda ids: [tiny(claim_id) for claim_id in ids])
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
    for ids, words in ((["P1", "P99"], "unknown claim 'P99'"), (["P1", "P4"], "P4 has no study yet")):
        with pytest.raises(ValueError, match=words):
            study.judge_all(ids, tmp_path / "out")
    assert not (tmp_path / "out").exists()
