"""LanguageBatches: window gathering against slices in a Python loop, and the spacing of the evaluation windows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aftershock.lab.data.corpus import Corpus, load_tokens
from aftershock.lab.data.language import LanguageBatches
from aftershock.lab.data.sampler import offsets
from aftershock.lab.recipe import LanguageData


def corpus(num_train: int, num_eval: int, dtype: str = "uint8") -> Corpus:
    values = np.arange(num_train + num_eval) * 7 % 251
    return Corpus(values[:num_train].astype(dtype), values[num_train:].astype(dtype), "0" * 16, "made up")


@given(
    dtype=st.sampled_from(["uint8", "uint16", "uint32"]),
    context=st.integers(2, 9),
    spare=st.integers(0, 40),
    seeds=st.lists(st.integers(0, 2**32), min_size=1, max_size=3),
    step=st.integers(0, 1000),
    batch_size=st.integers(1, 4),
)
def test_oracle_windows_are_slices(
    dtype: str, context: int, spare: int, seeds: list[int], step: int, batch_size: int
) -> None:
    source = corpus(context + 1 + spare, context + 1, dtype)
    batch = LanguageBatches(LanguageData(context=context), source).train(np.array(seeds), step, batch_size)
    offsets_KB = offsets(np.array(seeds), step, batch_size, spare + 1)
    assert np.array_equal(batch.ids_KB, offsets_KB)
    assert batch.inputs_KBT.dtype == batch.targets_KBT.dtype == torch.int64
    for k in range(len(seeds)):
        for b in range(batch_size):
            start = int(offsets_KB[k, b])
            assert batch.inputs_KBT[k, b].tolist() == source.train[start : start + context].tolist()
            assert batch.targets_KBT[k, b].tolist() == source.train[start + 1 : start + context + 1].tolist()


def test_oracle_over_a_memory_mapped_file(tmp_path: Path) -> None:
    ids = np.arange(2000) * 11 % 500
    ids.astype("<u2").tofile(tmp_path / "ids.bin")
    config = LanguageData(source=str(tmp_path / "ids.bin"), context=16, vocab_size=500)
    batch = LanguageBatches(config, load_tokens(config)).train(np.array([4, 5]), 9, 3)
    for k, b in np.ndindex(2, 3):
        start = int(batch.ids_KB[k, b])
        assert batch.inputs_KBT[k, b].tolist() == ids[start : start + 16].tolist()


@given(context=st.integers(2, 6), spare=st.integers(0, 60), num_sequences=st.integers(1, 80))
def test_eval_windows_are_distinct_and_evenly_spaced(context: int, spare: int, num_sequences: int) -> None:
    source = corpus(context + 1, context + 1 + spare)
    batch = LanguageBatches(LanguageData(context=context), source).eval(num_sequences)
    starts = batch.ids_KB[0]
    assert batch.inputs_KBT.shape == (1, min(num_sequences, spare + 1), context)
    assert starts[0] == 0
    gaps = np.diff(np.append(starts, spare + 1))
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1
    assert batch.inputs_KBT[0, -1].tolist() == source.eval[starts[-1] : starts[-1] + context].tolist()


def test_targets_are_the_inputs_one_later() -> None:
    batch = LanguageBatches(LanguageData(context=5), corpus(50, 20)).train(np.array([1]), 0, 8)
    assert torch.equal(batch.inputs_KBT[..., 1:], batch.targets_KBT[..., :-1])


def test_planted_no_evaluation_sequences() -> None:
    with pytest.raises(ValueError, match="eval_sequences must be at least 1, got 0"):
        LanguageBatches(LanguageData(context=5), corpus(50, 20)).eval(0)
