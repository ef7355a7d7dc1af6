"""An explanation as JSON: what was found is there, nothing is NaN, curves keep their peaks."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aftershock.replay.explain import Explanation
from aftershock.replay.norms import KINDS
from aftershock.replay.response import Response, spike_of
from aftershock.replay.run import Window
from aftershock.replay.written import explanation_data, explanation_json, headline, plain, thinned


def _strict(text: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_all_that_was_found_is_written(explanation: Explanation) -> None:
    """planted: one wrong row at step 100; class, remedy, row and prediction of it are in the JSON, as JSON allows."""
    data = _strict(explanation_json(explanation))
    assert data == explanation_data(explanation)
    assert data["verdict"]["cause"] == explanation.verdict.cause == "C7"
    assert data["headline"].startswith("C7, degenerate data")
    assert data["window"] == explanation.window._asdict()
    assert data["guilty"]["rows"] == [{"step": 100, "part": 0, "row": 5}]
    assert data["controls"]["runs"] == data["controls"]["came_back"] == 3
    assert data["no_return"]["remedies"]["skip"]["last"] == 100
    assert data["thinking"]["points"][0]["name"] == "before"
    assert set(data["left_out"]) == {"qk-clip"}
    assert set(data["curves"]) == set(explanation.curves)
    cells = {cell["name"]: cell for cell in data["cells"]}
    assert cells["skip"]["spike"] == "gone"
    assert cells["lr*0.5"]["spike"] == "stays"
    assert cells["skip"]["cost"] == pytest.approx(explanation.remedies[0].cost, rel=1e-5)  # six digits
    assert cells["lr*0.5"]["cost"] is None
    assert data["shams"]["number"] == data["shams"]["spiking"] == 3


def test_evidence_is_on_the_side_that_the_verdict_has_it(explanation: Explanation) -> None:
    """equivalence: the matrix of answers by class, and the lists of each class."""
    data = explanation_data(explanation)
    for one in data["verdict"]["ranked"]:
        for side in ("for", "against"):
            told = [a["words"] for a in data["verdict"]["answers"] if a["sides"].get(one["cause"]) == side]
            assert told == one[side]


def test_curves_are_the_replays(explanation: Explanation) -> None:
    """round trip: to six digits."""
    curve = explanation_data(explanation)["curves"]["skip"]
    told = dict(zip(curve["steps"], curve["losses"], strict=True))
    assert told == pytest.approx(explanation.curves["skip"], rel=5e-6)  # half of the sixth digit


def test_what_is_not_finite_has_words(explanation: Explanation) -> None:
    """contract: null where nothing was measured, "inf" beyond all numbers; a loss that is no number is beyond them."""
    assert plain([math.nan, math.inf, -math.inf, 1 / 3, 5, True, None, "x"]) == [
        *(None, "inf", "-inf", 0.333333, 5, True, None, "x")
    ]
    assert plain(np.array([[1.005, math.nan]]), decimals=2) == [[1.0, None]]
    assert plain({3: range(2)}) == {"3": [0, 1]}
    broken = explanation._replace(curves={"skip": {1: 2.0, 2: math.nan, 3: math.inf}})
    assert explanation_data(broken)["curves"]["skip"] == {"steps": [1, 2, 3], "losses": [2.0, "inf", "inf"]}


def test_a_thin_one_is_the_same_with_fewer_points(explanation: Explanation) -> None:
    """contract: what a page carries; a peak is never lost, and every place keeps its first steps."""
    whole, thin = explanation_data(explanation), explanation_data(explanation, points=12, places=1)
    assert max(len(curve["steps"]) for curve in thin["curves"].values()) <= 12
    assert len(thin["recorded"]["steps"]) <= 48
    for name, curve in thin["curves"].items():
        assert max(curve["losses"]) == max(whole["curves"][name]["losses"])
    assert thin["places"]["moves"] == whole["places"]["moves"]
    for kind in KINDS:
        rows = list(zip(thin["places"]["z"][kind], whole["places"]["z"][kind], strict=True))
        assert sum(thin is not None for thin, _ in rows) == 3  # model, layer, tensor
        assert all(thin is None or thin == row for thin, row in rows)
    same = set(whole) - {"curves", "recorded", "places"}
    assert {name: thin[name] for name in same} == {name: whole[name] for name in same}


@given(losses=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=60), points=st.integers(4, 40))
def test_thinning_keeps_ends_and_extremes(losses: list[float], points: int) -> None:
    """property."""
    curve = dict(enumerate(losses, 7))
    kept = thinned(curve, points)
    assert len(kept) <= points
    assert kept.items() <= curve.items()
    assert {7, 6 + len(losses)} <= set(kept)
    assert max(kept.values()) == max(losses)
    assert min(kept.values()) == min(losses)
    assert thinned(curve, None) == curve


def test_what_became_of_the_spike(explanation: Explanation) -> None:
    """contract: gone, later only where it began after the recorded one was over and stayed finite, else stays."""
    response = next(one.response for one in explanation.cells if one.name == "lr*0.5")
    assert isinstance(response, Response)
    window = Window(80, 100, 101, 110)
    told = [
        spike_of(None, window),
        spike_of(response._replace(present=False), window),
        spike_of(response._replace(onset=110), window),
        spike_of(response._replace(onset=110, nonfinite_at=110), window),
        spike_of(response._replace(onset=109), window),
    ]
    assert told == [None, "gone", "later", "stays", "stays"]


def test_a_headline_is_the_verdict_without_its_reasons(explanation: Explanation) -> None:
    """contract: decided, undecided, not reproducible."""
    verdict = explanation.verdict
    heads = [
        headline(explanation._replace(verdict=verdict._replace(kind=kind, words=words)))
        for kind, words in (
            ("decided", verdict.words),
            ("undecided", "Undecided between A, 40%, and B, 30%; for the first: x. What would decide: --cells y."),
            ("not_reproducible", "Not reproducible: the spike does not come back."),
            ("no_spike", "Nothing came."),
        )
    ]
    assert heads[0] == f"{verdict.ranked[0].words}, {verdict.ranked[0].share:.0%}"
    assert verdict.words.startswith(heads[0])
    assert heads[1:] == ["Undecided between A, 40%, and B, 30%", "Not reproducible", "Nothing came"]
