"""Which incidents keep what: a skip its batches, a rewind the state to replay from as well, each batch once."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from aftershock.guard.disk import load_snapshot
from aftershock.guard.guard import Guard
from aftershock.guard.incident import Incident, fingerprint, read_incidents


class Letters:
    """A tokenizer."""

    def decode(self, ids: Any) -> str:
        return "".join(chr(97 + token % 26) for token in ids)


def _incidents(folder: Path, *bad: int, **settings: Any) -> list[Incident]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(26, 4), nn.Flatten(), nn.Linear(20, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = [torch.randint(0, 26, (8, 5)) for _ in range(120)]
    with Guard(model, optimizer, folder=folder, snapshot_every=10, **settings) as guard:
        for ids in guard.batches(data):
            loss = model(ids).square().mean() * (math.nan if guard.batch_id - 1 in bad else 1.0)
            loss.backward()
            guard.step(loss)
    return read_incidents(folder)


def test_a_single_skip_costs_no_snapshot(tmp_path: Path) -> None:
    """contract: record, rows and the batch, as text too; the whole state only where it is asked for."""
    (one,) = _incidents(tmp_path / "a", 45, decoder=Letters(), code=fingerprint("x = 1"))
    assert one.snapshot is None
    assert one.start is None
    assert one.status == "recovered"
    assert one.fingerprint["code"]
    assert 45 in one.batch_ids
    texts = json.loads((one.folder / "batches.json").read_text())["batches"]["45"]["texts"]
    assert len(texts[0]["text"]) == 5
    (whole,) = _incidents(tmp_path / "b", 45, incident_state="all")
    assert whole.snapshot is not None


def test_a_skip_that_becomes_a_rewind_keeps_the_state(tmp_path: Path) -> None:
    """contract: the snapshot from before the onset, batches from there on, kept once; the page names the command."""
    (one,) = _incidents(tmp_path, 45, 46, 47)
    assert one.snapshot is not None
    assert one.start is not None
    assert one.start.step <= one.onset.step == 45
    kept = load_snapshot(one.snapshot)
    assert kept.at.step == one.start.step == 40
    assert kept.batches == {}
    assert set(range(40, 48)) <= set(one.batch_ids)
    assert [row.taken for row in one.rows if row.batch_id in (45, 46, 47)] == [False, False, False]
    assert f"aftershock replay {one.folder}" in (one.folder / "incident.md").read_text()
    taken = [row for row in one.rows if row.taken]
    assert taken
    assert all(math.isfinite(row.update_norm) for row in taken)


@pytest.mark.parametrize("scale", [1e4])
def test_the_onset_is_that_of_the_first_alarm(tmp_path: Path, scale: float) -> None:
    """planted: three spiking batches; what moved is dated from the first of them, not from the rewind."""
    torch.manual_seed(0)
    model = nn.Linear(8, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with Guard(model, optimizer, folder=tmp_path, snapshot_every=10) as guard:
        for x in guard.batches([torch.randn(16, 8) for _ in range(200)]):
            loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
            loss = loss * (scale if guard.batch_id - 1 in (150, 151, 152) else 1.0)
            loss.backward()
            guard.step(loss)
    (one,) = read_incidents(tmp_path)
    assert [action.kind for action in one.actions].count("rewind") == 1
    assert one.onset.step == 150
    assert {m.onset for m in one.moved} == {150}
