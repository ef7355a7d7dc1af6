"""The catalogue: every entry, how claims are chosen, and the studies' cost as the documents state it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from aftershock.claims.catalog import CLAIMS, choose_claims, find_claim
from aftershock.claims.claim import Claim, LineTrial, ScoreTrial, Trial
from aftershock.claims.study import STUDIES, rerun_command
from aftershock.lab.sweep import expand

DOCS = Path(__file__).parents[2] / "docs" / "claims.md"
STUDIED = [claim for claim in CLAIMS if claim.trial]
SWEPT = [claim for claim in STUDIED if isinstance(claim.trial, Trial)]
MS = {"16x2": 1.5, "32x2": 5, "48x2": 7, "64x2": 9.5, "96x2": 20, "192x2": 75, "32x4": 10, "32x8": 20}
"""Milliseconds a step of one run of 8 x 64 tokens on one core, roughly, by size."""


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.id)
def test_contract_of_an_entry(claim: Claim) -> None:
    assert re.fullmatch(r"[A-Z]\d{1,2}", claim.id)
    assert claim.version >= 1
    for text in (claim.source, claim.statement, claim.criterion):
        assert text == text.strip()
        assert text
        assert text.isascii()
        assert "|" not in text
    assert not claim.statement.endswith(".")


@pytest.mark.parametrize("claim", STUDIED, ids=lambda claim: claim.id)
def test_contract_of_a_criterion(claim: Claim) -> None:
    """Its docstring begins with the claim's id; lines come from a study that there is, scores from named tables, and
    the command that judges it again says where those are."""
    assert claim.trial is not None
    assert (claim.trial.criterion.__doc__ or "").startswith(f"{claim.id}: ")
    if isinstance(claim.trial, LineTrial):
        assert claim.trial.study in STUDIES
    elif isinstance(claim.trial, ScoreTrial):
        assert claim.trial.files
        assert all(name.endswith(".csv") and "/" not in name for name in claim.trial.files)
    command = f"aftershock claims --run {claim.id}"
    asks = isinstance(claim.trial, ScoreTrial)
    assert rerun_command(claim) == (f"{command} --scores FOLDER" if asks else command)


@pytest.mark.parametrize("claim", SWEPT, ids=lambda claim: claim.id)
def test_contract_of_a_study(claim: Claim) -> None:
    """Every run of the grid is possible; three seeds or more; three sizes unless the claim is about one network."""
    assert isinstance(claim.trial, Trial)
    sweep = claim.trial.sweep
    assert sweep.name == claim.id
    assert len(sweep.seeds) >= 3
    assert len(sweep.sizes) >= (1 if claim.id == "P12" else 3)  # P12 forces the logits of one and the same network
    planned = expand(sweep)
    assert {item.ref.size for item in planned} == set(sweep.sizes)  # labels are names: criteria go by them
    assert {item.config.data for item in planned} == {planned[0].config.data}


def test_ids_are_unique_and_all_there() -> None:
    ids = [claim.id for claim in CLAIMS]
    assert len(set(ids)) == len(ids) == 51
    counts = {"P": 17, "S": 5, "H": 8, "G": 5, "L": 3, "D": 3, "E": 4, "R": 3, "T": 1, "M": 1, "I": 1}
    assert {letter: sum(i[0] == letter for i in ids) for letter in counts} == counts
    assert [c.id for c in SWEPT] == [f"P{n}" for n in range(1, 18)]
    others = [c.id for c in STUDIED if c not in SWEPT]
    scored = [f"E{n}" for n in range(1, 5)]
    assert others == [*(f"S{n}" for n in range(5)), *(f"H{n}" for n in range(1, 9)), *scored]


def test_choosing() -> None:
    assert [c.id for c in choose_claims(["P7", "p1", "P7"])] == ["P7", "P1"]
    assert choose_claims("all") == choose_claims(["all"]) == STUDIED
    trained = [claim for claim in STUDIED if not isinstance(claim.trial, ScoreTrial)]
    assert choose_claims("all", with_scores=False) == trained
    assert [c.id for c in choose_claims(["E1"], with_scores=False)] == ["E1"]
    with pytest.raises(ValueError, match=r"unknown claim 'P171'; did you mean 'P17'\?"):
        find_claim("P171")
    with pytest.raises(ValueError, match="G1 has no study yet; those with one: P1, P2"):
        choose_claims(["P1", "G1"])
    with pytest.raises(ValueError, match="name the claims"):
        choose_claims([])


def test_studies_share_runs_and_cost_what_the_documents_say() -> None:
    """contract: docs/claims.md has a row a study; all of them together stay within 50 core-minutes."""
    seen: set[str] = set()
    rows: dict[str, tuple[int, int, int]] = {}
    for claim in SWEPT:
        assert isinstance(claim.trial, Trial)
        planned = expand(claim.trial.sweep)
        new = [item for item in planned if item.ref.run_id not in seen]
        seen |= {item.ref.run_id for item in planned}
        ms = sum(MS[item.ref.size] * item.config.steps * item.config.batch_size / 8 for item in new)
        rows[claim.id] = (len(planned), len(new), round(ms / 1000))
    assert sum(row[2] for row in rows.values()) <= 50 * 60
    text = DOCS.read_text("utf-8")
    written = {
        m[1]: (int(m[2]), int(m[3]), int(m[4]))
        for m in re.finditer(r"^\| (P\d+) \|.*\| (\d+) \| (\d+) \| (\d+) \|$", text, re.MULTILINE)
    }
    assert written == rows
