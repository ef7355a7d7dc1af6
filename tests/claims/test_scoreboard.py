"""The scoreboard: a row a claim, evidence or how to get it, old versions beside new ones."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from aftershock.claims.catalog import CLAIMS
from aftershock.claims.claim import Record
from aftershock.claims.records import read_records, write_record
from aftershock.claims.scoreboard import NO_STUDY, NOT_RUN, print_scoreboard, scoreboard, scoreboard_json
from aftershock.claims.study import rerun_command

RECORD = Record(
    id="G1",
    version=1,
    scale="tiny",
    verdict="contradicted",
    effect=-0.51234,
    interval=(-0.7, -0.25),
    meaning="decades",
    detail={},
    statement="as it was stated",
    criterion="a criterion",
    num_seeds=3,
    run_ids=["0123456789ab"],
    config_digest="ba9876543210",
    core_s=12.5,
    aftershock="0.1.0",
    torch="2.13.0",
    machine={},
    date="2026-01-02",
    command="aftershock claims --run G1",
)


def printed(*folders: Path, width: int = 160) -> str:
    out = io.StringIO()
    print_scoreboard(*folders, console=Console(file=out, width=width))
    return out.getvalue()


def test_contract_every_claim_has_a_row() -> None:
    rows = json.loads(scoreboard_json())
    assert list(dict.fromkeys(row["id"] for row in rows)) == [claim.id for claim in CLAIMS]
    assert len({frozenset(row) for row in rows}) == 1
    recorded = read_records()
    for row, claim in zip(rows, CLAIMS, strict=True):
        if claim.id not in recorded:
            assert row["verdict"] == (NOT_RUN if claim.trial else NO_STUDY)
            assert row["command"] == (rerun_command(claim) if claim.trial else None)


def test_planted_evidence_shows(tmp_path: Path) -> None:
    write_record(tmp_path, RECORD)
    row = next(row for row in scoreboard(tmp_path) if row["id"] == "G1")
    assert (row["verdict"], row["statement"], row["interval"]) == ("contradicted", "as it was stated", (-0.7, -0.25))
    line = next(line for line in printed(tmp_path).splitlines() if line.startswith("G1"))
    for text in ("contradicted", "-0.512 [-0.7, -0.25]", "tiny", "2026-01-02", "aftershock claims --run G1"):
        assert text in line


def test_another_version_has_its_own_row(tmp_path: Path) -> None:
    write_record(tmp_path, RECORD._replace(version=2))
    rows = [row for row in scoreboard(tmp_path) if row["id"] == "G1"]
    assert [(row["version"], row["verdict"]) for row in rows] == [(2, "contradicted"), (1, NO_STUDY)]
    assert "G1 v2" in printed(tmp_path)


def test_narrow_terminal_keeps_one_line_a_claim() -> None:
    lines = printed(width=80).splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("P1 ") for line in lines) == 1
    assert "aftershock claims --run P1" in printed(width=80)


@pytest.mark.parametrize("width", [80, 100, 120, 140, 160, 200])
def test_property_nothing_but_statements_is_cut(tmp_path: Path, width: int) -> None:
    """property: verdict and effect are whole at every width, and the command wherever it is shown."""
    write_record(tmp_path, RECORD)
    text = printed(tmp_path, width=width)
    line = next(line for line in text.splitlines() if line.startswith("G1"))
    assert "contradicted" in line
    assert "-0.512 [-0.7, -0.25]" in line
    assert ("aftershock claims --run E1 --scores FOLDER" in text) == ("2026-01-02" in line)
    assert max(map(len, text.splitlines())) <= width
