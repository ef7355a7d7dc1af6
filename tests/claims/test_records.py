"""Records on disk: round trip, versions, damage, and the committed ones against the catalogue."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aftershock.claims.catalog import find_claim
from aftershock.claims.claim import Record, ScoreTrial, Trial
from aftershock.claims.records import checkout_folder, keep_beside, read_records, record_name, write_record
from aftershock.claims.study import PUBLIC, TINY

RECORD = Record(
    id="G1",  # a claim without a study, so that no committed record is in the way
    version=1,
    scale="tiny",
    verdict="supported",
    effect=-0.5,
    interval=(-0.7, -0.25),
    meaning="decades",
    detail={"slope": {"baseline": 0.0, "unmeasured": None}},
    statement="a statement",
    criterion="a criterion",
    num_seeds=3,
    run_ids=["0123456789ab"],
    config_digest="ba9876543210",
    core_s=12.5,
    aftershock="0.1.0",
    torch="2.13.0",
    machine={"cores": 2},
    date="2026-01-02",
    command="aftershock claims --run G1",
)


def test_round_trip(tmp_path: Path) -> None:
    path = write_record(tmp_path / "records", RECORD)
    assert path.name == "G1.json"
    assert read_records(tmp_path / "records")["G1"] == [RECORD]
    nothing = RECORD._replace(effect=None, interval=None)
    write_record(tmp_path / "records", nothing)  # the same version is judged again
    assert read_records(tmp_path / "records")["G1"] == [nothing]
    assert [p.name for p in (tmp_path / "records").iterdir()] == ["G1.json"]


def test_both_versions_stay(tmp_path: Path) -> None:
    later = RECORD._replace(version=2, verdict="contradicted")
    write_record(tmp_path, later)
    write_record(tmp_path, RECORD)
    assert record_name("G1", 2) == "G1.v2.json"
    assert read_records(tmp_path)["G1"] == [RECORD, later]


def test_what_lies_beside_a_record_is_not_read_as_one(tmp_path: Path) -> None:
    """round trip: the copy is in a folder of the record's name, a newer one takes its place, and no record is lost."""
    made = tmp_path / "forecast.json"
    for text, version in (("{}", 1), ("[]", 1), ("[1]", 2)):
        made.write_text(text)
        path = write_record(tmp_path / "records", RECORD._replace(version=version))
        assert keep_beside(path, made).read_text() == text
    names = {str(path.relative_to(tmp_path / "records")) for path in (tmp_path / "records").rglob("*.json")}
    assert names == {"G1.json", "G1/forecast.json", "G1.v2.json", "G1.v2/forecast.json"}
    assert [record.version for record in read_records(tmp_path / "records")["G1"]] == [1, 2]


def test_another_version_is_never_overwritten(tmp_path: Path) -> None:
    write_record(tmp_path, RECORD._replace(version=2)).rename(tmp_path / "G1.json")
    with pytest.raises(ValueError, match="holds G1 version 2, not G1 version 1"):
        write_record(tmp_path, RECORD)
    assert json.loads((tmp_path / "G1.json").read_text())["version"] == 2


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"id": "G1"}'])
def test_a_damaged_record_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "G1.json").write_text(text)
    with pytest.raises(ValueError, match=r"G1\.json: not a record"):
        read_records(tmp_path)


def test_a_folder_that_is_not_there_holds_none(tmp_path: Path) -> None:
    assert read_records(tmp_path / "none") == read_records()


def test_the_checkout_is_found() -> None:
    folder = checkout_folder()
    assert folder is None or folder.parent.name == "claims"


def test_committed_records_match_the_catalogue() -> None:
    """contract: known claims, known versions, the criterion as it stands, and a file name that says which."""
    for claim_id, records in read_records().items():
        claim = find_claim(claim_id)
        for record in records:
            assert 1 <= record.version <= claim.version
            assert record.verdict in ("supported", "contradicted", "inconclusive")
            asked = isinstance(claim.trial, ScoreTrial)
            assert record.scale == (PUBLIC if asked else TINY)
            assert bool(record.run_ids) == bool(record.num_seeds) == (not asked)
            if record.version == claim.version:
                assert (record.statement, record.criterion) == (claim.statement, claim.criterion)
                assert claim.trial is not None
                if isinstance(claim.trial, Trial):
                    assert record.num_seeds == len(claim.trial.sweep.seeds)
