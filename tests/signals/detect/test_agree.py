"""Two ranks with different losses decide as one: real torchrun, two gloo processes, one thread each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aftershock.signals.detect.registry import DETECTORS, OURS

WORKER = Path(__file__).with_name("agree_worker.py")

Ranks = tuple[dict[str, Any], dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(torchrun: Callable[..., list[Any]], tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """A worker that waits for a rank that does not come is killed, and the test fails with it."""
    first, second = torchrun(WORKER, out=tmp_path_factory.mktemp("agree") / "rows", num_processes=2)
    return first, second


def test_pitfall_6_ranks_decide_as_one(ranks: Ranks) -> None:
    """contract: on the all-gathered loss every detector gives each rank the same verdict at each step."""
    first, second = ranks
    assert first["values"] == second["values"], "the same bits, so the same verdicts for ever"
    for name in DETECTORS:
        assert first["verdicts"][name]["together"] == second["verdicts"][name]["together"], name
    assert first["num_answers"] == second["num_answers"] > 0


def test_pitfall_6_what_one_rank_sees_alarms_both(ranks: Ranks) -> None:
    """planted: a NaN and a spike on rank 1 alone."""
    first, _ = ranks
    found = first["verdicts"][OURS]["together"]
    assert found[first["nan_at"]] == "nonfinite"
    assert found[first["spikes_at"][0]] == "spike"
    quiet = set(range(len(found))) - {first["nan_at"], *first["spikes_at"]}
    assert {found[step] for step in quiet} == {"ok"}


@pytest.mark.parametrize("name", [OURS, "kill-loss-spike", "lightning", "olmo-skip"])
def test_pitfall_6_ranks_that_decide_alone_part(ranks: Ranks, name: str) -> None:
    """planted: the defect itself; llm-foundry's rule is used so, and the others are no better when they are."""
    first, second = ranks
    spikes = first["spikes_at"]
    alone = [[rank["verdicts"][name]["alone"][step] for step in spikes] for rank in ranks]
    assert set(alone[0]) == {"ok"}
    assert "spike" in alone[1] or second["verdicts"][name]["alone"][first["nan_at"]] != "ok"
