"""One training batch of a fleet, as a value.

Shapes: K replicas, B sequences a replica, T positions. Imports torch and numpy only.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

IGNORE = -1
"""The target of a position that the loss leaves out (`ignore_index` of the cross-entropy)."""


class Batch(NamedTuple):
    """What K replicas see at one step; an evaluation batch has K = 1, because every replica gets the same one.

    `inputs_KBT`, `targets_KBT`: int64 token ids, contiguous; a target of `IGNORE` is left out of the loss.
    `ids_KB`: int64, the stable name of each sample: equal ids are equal samples, in every run on the same data.
    """

    inputs_KBT: torch.Tensor
    targets_KBT: torch.Tensor
    ids_KB: np.ndarray
