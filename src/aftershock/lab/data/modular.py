"""Batches of modular arithmetic, `a op b = c (mod p)`: every equation once, split once, nothing read from disk.

Shapes: K replicas, B sequences, T = 4 positions, E equations. Imports only the sampler, the batch and the recipe.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from aftershock.lab.data.batch import IGNORE, Batch
from aftershock.lab.data.sampler import offsets, shuffle
from aftershock.lab.recipe import ModularData


class _Table(NamedTuple):
    inputs_ET: np.ndarray
    targets_ET: np.ndarray


class ModularBatches:
    """Sequences `a op b =`, of which only the answer `c` after `=` is scored (Power et al. 2022, appendix A.1).

    Tokens: the residues 0..p-1, then p for the operation and p+1 for `=`. Division reads `a / b`, so a = c b mod p and
    b is never 0. A sample's id is its row in the table of all equations: b + p a, or b-1 + (p-1) c for division.
    The split is a shuffle by `split_seed`; the first `train_frac` of it is trained on.

    Raises ValueError when `train_frac` leaves one side of the split empty.
    """

    def __init__(self, config: ModularData) -> None:
        self.config = config
        self._table = _equations(config)
        num_equations = len(self._table.inputs_ET)
        num_train = round(config.train_frac * num_equations)
        if not 0 < num_train < num_equations:
            raise ValueError(
                f"data.train_frac={config.train_frac} puts {num_train} of {num_equations} equations into training; "
                "choose one that leaves some on both sides"
            )
        order_E = shuffle(config.split_seed, num_equations)
        self._train_ids, self._eval_ids = order_E[:num_train], order_E[num_train:]

    @property
    def vocab_size(self) -> int:
        return self.config.modulus + 2

    @property
    def context(self) -> int:
        return 4

    def train(self, seed_K: np.ndarray, step: int, batch_size: int) -> Batch:
        """The batch of step `step` for replicas with data seeds `seed_K`: a pure function of the two.

        Rows are drawn with replacement. A `batch_size` of at least the training split means the full split, each
        equation once, at every step; B is then the split's size.
        """
        num_train = len(self._train_ids)
        if batch_size < num_train:
            return self._gather(self._train_ids[offsets(seed_K, step, batch_size, num_train)])
        return self._gather(np.broadcast_to(self._train_ids, (len(seed_K), num_train)))

    def eval(self, num_sequences: int) -> Batch:
        """At most `num_sequences` equations of the held-out split, the same ones in every run (K = 1)."""
        if num_sequences < 1:
            raise ValueError(f"eval_sequences must be at least 1, got {num_sequences}")
        return self._gather(self._eval_ids[None, :num_sequences])

    def describe(self) -> dict[str, Any]:
        """What was trained on, for the run's environment record."""
        symbol = {"add": "+", "sub": "-", "mul": "*", "div": "/"}[self.config.operation]
        return {
            "kind": self.config.kind,
            "description": f"a {symbol} b mod {self.config.modulus}, split by seed {self.config.split_seed}",
            "train_equations": len(self._train_ids),
            "eval_equations": len(self._eval_ids),
            "context": self.context,
            "vocab_size": self.vocab_size,
        }

    def _gather(self, ids_KB: np.ndarray) -> Batch:
        return Batch(
            inputs_KBT=torch.from_numpy(self._table.inputs_ET[ids_KB]),
            targets_KBT=torch.from_numpy(self._table.targets_ET[ids_KB]),
            ids_KB=np.ascontiguousarray(ids_KB),
        )


def _equations(config: ModularData) -> _Table:
    """All equations: p^2 of them, or p (p-1) for division."""
    p = config.modulus
    left_E, right_E = (side.ravel() for side in np.meshgrid(np.arange(p), np.arange(p), indexing="ij"))
    if config.operation == "div":
        answer_E, right_E = left_E[right_E > 0], right_E[right_E > 0]
        left_E = answer_E * right_E % p
    else:
        answer_E = {"add": left_E + right_E, "sub": left_E - right_E, "mul": left_E * right_E}[config.operation] % p
    operation_E, equals_E = np.full_like(left_E, p), np.full_like(left_E, p + 1)
    targets_ET = np.full((len(left_E), 4), IGNORE, dtype=np.int64)
    targets_ET[:, -1] = answer_E
    return _Table(np.stack([left_E, operation_E, right_E, equals_E], axis=1).astype(np.int64), targets_ET)
