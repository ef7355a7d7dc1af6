"""Batches of consecutive tokens of a corpus, for next-token prediction.

Shapes: K replicas, B sequences, T = context positions, W windows of the corpus, S = T + 1 tokens of a window.
Imports only the sampler, the corpus, the batch and the recipe.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from aftershock.lab.data.batch import Batch
from aftershock.lab.data.corpus import Corpus
from aftershock.lab.data.sampler import offsets
from aftershock.lab.recipe import LanguageData


class LanguageBatches:
    """Windows of `context + 1` tokens at any offset: all but the last are the inputs, all but the first the targets.

    Documents are packed: a window may span several, and nothing masks one from the next (Wortsman et al. 2023,
    section 2.1). A sample's id is the offset of its window in its split. The corpus is read in place, so a
    memory-mapped one is never loaded whole.
    """

    def __init__(self, config: LanguageData, corpus: Corpus) -> None:
        self.config = config
        self._corpus = corpus
        self._train_WS = np.lib.stride_tricks.sliding_window_view(corpus.train, config.context + 1)
        self._eval_WS = np.lib.stride_tricks.sliding_window_view(corpus.eval, config.context + 1)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def context(self) -> int:
        return self.config.context

    def train(self, seed_K: np.ndarray, step: int, batch_size: int) -> Batch:
        """The batch of step `step` for replicas with data seeds `seed_K`: a pure function of the two."""
        return _gather(self._train_WS, offsets(seed_K, step, batch_size, len(self._train_WS)))

    def eval(self, num_sequences: int) -> Batch:
        """Evenly spaced windows of the held-out split, the same in every run (K = 1).

        B = `num_sequences`, or every window there is when the split has fewer.
        """
        if num_sequences < 1:
            raise ValueError(f"eval_sequences must be at least 1, got {num_sequences}")
        num_windows = len(self._eval_WS)
        num_sequences = min(num_sequences, num_windows)
        return _gather(self._eval_WS, np.arange(num_sequences)[None] * num_windows // num_sequences)

    def describe(self) -> dict[str, Any]:
        """What was trained on, for the run's environment record."""
        return {
            "kind": self.config.kind,
            "source": self.config.source,
            "description": self._corpus.description,
            "digest": self._corpus.digest,
            "train_tokens": len(self._corpus.train),
            "eval_tokens": len(self._corpus.eval),
            "context": self.context,
            "vocab_size": self.vocab_size,
        }


def _gather(tokens_WS: np.ndarray, ids_KB: np.ndarray) -> Batch:
    windows_KBS = tokens_WS[ids_KB]
    return Batch(
        inputs_KBT=torch.from_numpy(windows_KBS[..., :-1].astype(np.int64, order="C")),
        targets_KBT=torch.from_numpy(windows_KBS[..., 1:].astype(np.int64, order="C")),
        ids_KB=ids_KB,
    )
