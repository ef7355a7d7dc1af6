"""Records on disk: round trip, versions, damage, and the committed ones against the catalogue."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aftershock.claims.catalog import find_claim
from aftershock.claims.claim import Record, Trial
from aftershock.claims.records import checkout_folder, read_records, record_name, write_record

RECORD = Record(
    id="P4",  # a claim without a study, so that no committed record is in the way
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
    command="aftershock claims --run P4",
)


def test_round_trip(tmp_path: Path) -> None:
    path = write_record(tmp_path / "records", RECORD)
    assert path.name == "P4.json"
    assert read_records(tmp_path / "records")["P4"] == [RECORD]
    nothing = RECORD._replace(effect=None, interval=None)
    write_record(tmp_path / "records", nothing)  # the same version is judged again
    assert read_records(tmp_path / "records")["P4"] == [nothing]
    assert [p.name for p in (tmp_path / "records").iterdir()] == ["P4.json"]


def test_both_versions_stay(tmp_path: Path) -> None:
    later = RECORD._replace(version=2, verdict="contradicted")
    write_record(tmp_path, later)
    write_record(tmp_path, RECORD)
    assert record_name("P4", 2) == "P4.v2.json"
    assert read_records(tmp_path)["P4"] == [RECORD, later]


def test_another_version_is_never_overwritten(tmp_path: Path) -> None:
    write_record(tmp_path, RECORD._replace(version=2)).rename(tmp_path / "P4.json")
    with pytest.raises(ValueError, match="holds P4 version 2, not P4 version 1"):
        write_record(tmp_path, RECORD)
    assert json.loads((tmp_path / "P4.json").read_text())["version"] == 2


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"id": "P4"}'])
def test_a_damaged_record_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "P4.json").write_text(text)
    with pytest.raises(ValueError, match=r"P4\.json: not a record"):
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
            assert record.run_ids
            if record.version == claim.version:
                assert (record.statement, record.criterion) == (claim.statement, claim.criterion)
                assert claim.trial is not None
                if isinstance(claim.trial, Trial):
                    assert record.num_seeds == len(claim.trial.sweep.seeds)
