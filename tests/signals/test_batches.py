"""Token and loss measures of a batch, against counting by hand."""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aftershock.signals.batches import (
    BatchStats,
    batch_stats,
    compression_ratio,
    repeats,
    sample_losses,
    top_losses,
)


def _slow_repeats(row: list[int], max_span: int) -> int:
    """Every start, every span: how often does the n-gram there follow itself?"""
    best = 1
    for span in range(1, max_span + 1):
        for start in range(len(row)):
            count = 1
            while row[start : start + span] == row[start + count * span : start + (count + 1) * span] != []:
                count += 1
            if start + span <= len(row):
                best = max(best, count)
    return best


@given(st.lists(st.integers(0, 2), min_size=1, max_size=30), st.integers(1, 5))
def test_oracle_repeats(row: list[int], max_span: int) -> None:
    assert repeats([row], max_span=max_span).tolist() == [_slow_repeats(row, max_span)]


def test_oracle_batch_stats() -> None:
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 300, (3, 200))
    tokens[1, :160] = np.tile([7, 8, 9, 10], 40)
    stats = batch_stats(torch.from_numpy(tokens))
    raw = b"".join(int(one).to_bytes(2, "little") for one in tokens.ravel())
    assert stats == BatchStats(
        40, 1 / 3, len(raw) / len(zlib.compress(raw, 6)), len(set(tokens.ravel().tolist())) / 600
    )
    assert stats.signals()["batch/tokens/repeat_count"] == 40.0
    assert list(stats.signals())[2] == "batch/tokens/compression_ratio"


def test_a_degenerate_batch_stands_out() -> None:
    """planted: one line over and over, beside random tokens."""
    generator = np.random.default_rng(0)
    healthy = batch_stats(generator.integers(0, 256, (4, 512)))
    broken = batch_stats(np.tile(generator.integers(0, 256, 8), (4, 64)))
    assert healthy.repeat_frac == 0 < broken.repeat_frac == 1
    assert healthy.compression_ratio < 1.01
    assert broken.compression_ratio > 20


@pytest.mark.parametrize(("top", "num_bytes"), [(255, 1), (256, 2), (65535, 2), (65536, 4)])
def test_bytes_per_token_follow_the_largest_id(top: int, num_bytes: int) -> None:
    assert compression_ratio([[top]]) == num_bytes / len(zlib.compress(top.to_bytes(num_bytes, "little"), 6))


@pytest.mark.parametrize(
    ("tokens", "sentence"),
    [
        ([[0.5]], "integers of shape"),
        ([1, 2], "integers of shape"),
        (np.zeros((0, 3), dtype=int), "integers of shape"),
        ([[1, -100]], "must not be negative, got -100"),
        (torch.zeros(1, 2, dtype=torch.int64, device="meta"), "lie on meta; measure the batch on the host"),
    ],
)
def test_mistakes_are_errors(tokens: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        batch_stats(tokens)


def test_oracle_sample_losses() -> None:
    logits = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    targets = torch.tensor([[0, 1, -100, 2], [4, 4, 4, 4], [-100] * 4])
    got = sample_losses(logits, targets)
    assert not got.requires_grad
    for row in range(2):
        parts = [
            float((logits[row, t].logsumexp(0) - logits[row, t, int(target)]).detach())
            for t, target in enumerate(targets[row])
            if target >= 0
        ]
        assert float(got[row]) == pytest.approx(sum(parts) / len(parts), rel=1e-5)
    assert got[2].isnan()


def test_top_losses_put_what_is_not_finite_first() -> None:
    top = top_losses(torch.tensor([1.0, 3.0, math.nan, 2.0]), k=3)
    assert top.row_K.tolist() == [2, 1, 3]
    assert top.loss_K[1:].tolist() == [3.0, 2.0]
    assert top_losses(torch.tensor([4.0]), k=9).row_K.tolist() == [0]
    with pytest.raises(ValueError, match="got k=0"):
        top_losses(torch.ones(2), k=0)
