"""The data of a run: `batch(i)` is a pure function of (seed, i), so rewinding and skipping are one line each.

`build_batches` is the entrance. Each kind has `.train(seed_K, step, batch_size)`, `.eval(num_sequences)`,
`.vocab_size`, `.context` and `.describe()`; a new kind is one file, one line in `_BUILDERS`, and one line in the
contract test.
Must not import models, optimizers or the fleet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aftershock.lab.data.batch import IGNORE, Batch
from aftershock.lab.data.corpus import Corpus, load_tokens
from aftershock.lab.data.language import LanguageBatches
from aftershock.lab.data.modular import ModularBatches
from aftershock.lab.recipe import LanguageData, ModularData

__all__ = ["IGNORE", "Batch", "Batches", "Corpus", "LanguageBatches", "ModularBatches", "build_batches", "load_tokens"]

Batches = LanguageBatches | ModularBatches
"""What `build_batches` gives."""

_BUILDERS: dict[str, Callable[[Any], Batches]] = {
    "language": lambda config: LanguageBatches(config, load_tokens(config)),
    "modular": ModularBatches,
}


def build_batches(config: LanguageData | ModularData) -> Batches:
    """The batches that `config` describes, its files read and checked.

    >>> build_batches(ModularData(modulus=5)).vocab_size
    7

    Raises ValueError, in one sentence, for data that cannot be trained on.
    """
    return _BUILDERS[config.kind](config)
