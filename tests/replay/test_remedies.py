"""Remedies: order, cost, and what to go on with."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from aftershock.guard import policies
from aftershock.replay.remedies import policy_for, remedies
from aftershock.replay.response import Baseline, Response

BASE = Baseline(0.0, 0.1, 2.0, 1.0, "log", 1.0)


def response(peak: float) -> Response:
    return Response(peak >= 1.0, peak, 142, 1.0, 3, 140, 150, None, None, 1.0, 1.0, False)


def test_the_mildest_that_costs_nothing_comes_first() -> None:
    """planted: three cells remove it; one of them makes healthy steps worse by a tenth; two do not remove it."""
    calm = dict.fromkeys(range(10), 1.0)
    curves = {name: dict(calm) for name in ("lr*0.1", "eps*1e3", "clip*2", "skip", "freeze:a")}
    curves["eps*1e3"] = dict.fromkeys(range(10), math.exp(0.1))
    answers = {"lr*0.1": 0.0, "eps*1e3": 0.0, "clip*2": 2.0, "skip": 0.05, "freeze:a": 0.0}
    found = remedies(
        {name: response(peak) for name, peak in answers.items()},
        curves,
        dict.fromkeys(answers, 0),
        shams=[response(2.0)] * 3,
        control=calm,
        base=BASE,
        eps=1e-8,
    )
    assert [one.cell for one in found] == ["skip", "lr*0.1", "eps*1e3"]
    assert [round(one.cost, 6) for one in found] == [0.0, 0.0, 0.1]
    assert found[0].effect.beyond
    assert "shams 100% still spike" in found[0].words


def test_without_a_sham_nothing_counts_as_a_remedy() -> None:
    """contract: a remedy counts only against its sham."""
    assert remedies({"skip": response(0.0)}, {"skip": {0: 1.0}}, {"skip": 0}, shams=[], control={}, base=BASE) == []


@pytest.mark.parametrize(
    "name", ["skip", "lr*0.5", "eps*1e3", "beta2=0.9:recompute", "clip*2", "wd*0", "wd*0:embeddings", "qk-clip"]
)
def test_policies_named_are_policies_there_are(name: str) -> None:
    """contract: what the suggestion calls is a policy, and takes these settings."""
    text = policy_for(name, 1e-8)
    called, _, settings = text.partition("(")
    kinds = {kind.__name__: kind for kind in policies.POLICIES.values()}
    kind: Any = kinds[called]
    fields = {field.name for field in dataclasses.fields(kind)}
    names = [part.partition("=")[0].strip() for part in settings.rstrip(")").split(", ") if "=" in part]
    assert set(names) <= fields
