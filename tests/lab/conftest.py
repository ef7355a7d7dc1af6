"""What the lab's tests share: language batches of random tokens, which no seed can skew."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import pytest

from aftershock.lab.data import Corpus, LanguageBatches
from aftershock.lab.recipe import LanguageData


class RandomBatches(Protocol):
    def __call__(self, *, context: int = 8, vocab_size: int = 16, num_tokens: int = 4_000) -> LanguageBatches: ...


@pytest.fixture
def random_batches() -> RandomBatches:
    def build(*, context: int = 8, vocab_size: int = 16, num_tokens: int = 4_000) -> LanguageBatches:
        tokens = np.random.default_rng(0).integers(0, vocab_size, num_tokens).astype(np.uint32)
        held_out = num_tokens // 4
        corpus = Corpus(tokens[held_out:], tokens[:held_out], "0" * 16, "uniform random tokens")
        return LanguageBatches(LanguageData(context=context, vocab_size=vocab_size), corpus)

    return build
