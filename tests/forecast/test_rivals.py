"""rivals: the better one in hindsight, what the runs can tell, resamples that keep a model's checkpoints together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aftershock.forecast.rivals import against_rivals, model_counts

NUM = 40


def _names(number: int = NUM) -> np.ndarray:
    return np.array([f"m{i}" for i in range(number)])


def test_a_better_and_a_worse_forecast_are_told() -> None:
    """planted: errors of a tenth and of twice the rival's, with noise; one of equal size is not told apart."""
    rng = np.random.default_rng(0)
    truth_M = rng.uniform(0.3, 0.7, NUM)
    line_M = truth_M + 0.1 * rng.standard_normal(NUM)
    for size, words in ((0.01, "better"), (0.2, "worse"), (0.1, "not told apart")):
        ours_M = truth_M + size * rng.standard_normal(NUM)
        found = against_rivals(ours_M, {"line": line_M}, truth_M, _names())
        assert found is not None
        assert found.told == words
        assert found.low <= found.difference <= found.high


def test_the_rival_is_the_better_one_in_hindsight() -> None:
    """oracle: root mean square errors by hand."""
    truth_M = np.zeros(4)
    rivals = {"line": np.full(4, 0.3), "sigmoid": np.full(4, 0.2)}
    found = against_rivals(np.full(4, 0.5), rivals, truth_M, _names(4))
    assert found is not None
    assert found.rival == "sigmoid"
    assert [found.difference, found.low, found.high] == pytest.approx([0.3] * 3)
    assert found.scaled(100).difference == pytest.approx(30)
    assert against_rivals(np.array([]), {"line": np.array([])}, np.array([]), np.array([])) is None


@given(st.lists(st.sampled_from(["a", "b", "c", ""]), min_size=1, max_size=20), st.integers(0, 5))
def test_checkpoints_of_a_model_are_drawn_together(names: list[str], seed: int) -> None:
    """contract: as many draws as models, each with all its checkpoints; runs without a name are models."""
    counts_BN = model_counts(np.array(names), 7, np.random.default_rng(seed))
    for name in set(names) - {""}:
        same = counts_BN[:, [own == name for own in names]]
        assert (same == same[:, :1]).all()
    first = [names.index(name) if name else i for i, name in enumerate(names)]
    once = [i for i, at in enumerate(first) if at == i]
    assert (counts_BN[:, once].sum(1) == len(once)).all()


def test_many_checkpoints_of_one_model_tell_nothing() -> None:
    """planted: forty checkpoints of two models that disagree are two runs, not forty."""
    truth_M = np.zeros(NUM)
    ours_M = np.r_[np.full(NUM // 2, 0.1), np.full(NUM // 2, 0.3)]
    rival = {"line": np.full(NUM, 0.25)}
    two = against_rivals(ours_M, rival, truth_M, np.repeat(["a", "b"], NUM // 2))
    forty = against_rivals(ours_M, rival, truth_M, _names())
    assert two is not None
    assert forty is not None
    assert two.told == "not told apart"
    assert forty.high - forty.low < two.high - two.low
