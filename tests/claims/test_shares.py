"""Shares of incidents: their intervals, and one judgement out of those of several classes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aftershock.claims.claim import Verdict
from aftershock.claims.grid import Interval
from aftershock.claims.shares import HALF, NOTHING, Share, difference, judged_by_class, least, mostly, together

VERDICTS: tuple[Verdict, ...] = ("supported", "contradicted", "inconclusive")


def test_oracle_newcombe() -> None:
    """oracle: Newcombe 1998 (Statistics in Medicine 17, 873), table II, 56/70 less 48/80 by method 10."""
    measured = difference(Share(56, 70), Share(48, 80))
    assert measured.value == pytest.approx(0.2)
    assert (round(measured.low, 4), round(measured.high, 4)) == (0.0524, 0.3339)


shares = st.integers(1, 30).flatmap(lambda n: st.builds(Share, st.integers(0, n), st.just(n)))


@given(shares, shares)
def test_property_of_a_difference(a: Share, b: Share) -> None:
    """property: antisymmetric; holds its value; within -1 and 1."""
    ab, ba = difference(a, b), difference(b, a)
    assert ab.low == pytest.approx(-ba.high, abs=1e-12)  # rounding
    assert -1 - 1e-12 <= ab.low <= ab.value <= ab.high <= 1 + 1e-12


@given(st.lists(st.sampled_from(VERDICTS)), st.sampled_from(VERDICTS))
def test_property_of_classes_together(verdicts: list[Verdict], more: Verdict) -> None:
    """property: order means nothing; all must support; one that supports and one that contradicts settle nothing."""
    by_class: dict[str, Verdict] = {str(i): verdict for i, verdict in enumerate(verdicts)}
    found = together(by_class)
    assert found == together(dict(reversed(by_class.items())))
    assert (found == "supported") == (set(verdicts) == {"supported"})
    if {"supported", "contradicted"} <= {*verdicts, more}:
        assert together({**by_class, "more": more}) == "inconclusive"


@given(st.lists(st.tuples(st.sampled_from(VERDICTS), st.floats(-1, 1)), max_size=4))
def test_property_of_a_judgement_by_class(classes: list[tuple[Verdict, float]]) -> None:
    """property: the verdict is that of all together, the effect that of the least, and the tables have each class."""
    verdicts: dict[str, Verdict] = {str(i): verdict for i, (verdict, _) in enumerate(classes)}
    found = {str(i): Interval(value, value - 1, value + 1) for i, (_, value) in enumerate(classes)}
    judged = judged_by_class(verdicts, found, worst=least(found), meaning="m", tables={"spikes": {"0": 1.0}})
    assert judged.verdict == together(verdicts)
    if classes:
        assert judged.effect == min(value for _, value in classes)
        assert judged.interval == (judged.effect - 1, judged.effect + 1)
    else:
        assert least(found) is NOTHING
    assert list(judged.detail) == ["spikes", "value", "low", "high", "verdict by class"]
    assert set(judged.detail["value"]) == set(judged.detail["verdict by class"]) == set(verdicts)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.51, 0.9, "supported"),
        (0.1, 0.49, "contradicted"),
        (HALF, 0.9, "inconclusive"),
        (0.1, HALF, "inconclusive"),
        (math.nan, math.nan, "inconclusive"),
    ],
)
def test_most_is_more_than_a_half(low: float, high: float, verdict: str) -> None:
    """planted: the whole interval, and the half itself is on neither side."""
    assert mostly(Interval((low + high) / 2, low, high)) == verdict
