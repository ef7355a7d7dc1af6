"""What a batch itself says, before the step: repeats, compressibility, variety, and which sample the loss is in.

Legend: B sequences, T tokens, N counts, V vocabulary.
Token measures are plain numpy over integers on the host. Losses stay on the device until somebody reads them.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

MAX_SPAN = 13
REPEATS = 32
"""OLMo 2 drops documents with an n-gram of span 1 to 13 repeated 32 times or more in a row (2025, section 3.1)."""


class BatchStats(NamedTuple):
    """Of token ids B,T: `repeat_count` (largest of the batch), `repeat_frac` (share of sequences with 32 or more),
    `compression_ratio` (raw over zlib bytes), `unique_frac` (distinct ids over B T)."""

    repeat_count: int
    repeat_frac: float
    compression_ratio: float
    unique_frac: float

    def signals(self) -> dict[str, float]:
        """As `batch/tokens/<stat>`."""
        return {f"batch/tokens/{name}": float(value) for name, value in self._asdict().items()}


class TopLosses(NamedTuple):
    """The k largest losses of the batch, `loss_K`, and the rows they belong to, `row_K`; on the losses' device."""

    loss_K: Tensor
    row_K: Tensor


def batch_stats(tokens_BT: npt.ArrayLike | Tensor) -> BatchStats:
    """All token measures of one batch. Cost: 13 passes of comparison and run lengths over B T integers, one zlib run.

    Raises ValueError for an empty batch, for what is not integer token ids, and for a tensor that is not on the CPU:
    fetching it would wait for the device; measure the batch before it moves.

    >>> batch_stats([[1, 2, 1, 2, 1, 2], [3, 4, 5, 6, 7, 8]]).repeat_count
    3
    """
    tokens = _tokens(tokens_BT)
    repeats_B = repeats(tokens)
    return BatchStats(
        int(repeats_B.max()),
        float((repeats_B >= REPEATS).mean()),
        compression_ratio(tokens),
        float(len(np.unique(tokens)) / tokens.size),
    )


def repeats(tokens_BT: npt.ArrayLike | Tensor, *, max_span: int = MAX_SPAN) -> np.ndarray:
    """Per sequence, how often in a row its most repeated n-gram stands, n = 1..max_span: int64 [B], 1 where none does.

    A run of r matches x[t] = x[t - n] is an n-gram written floor(r / n) + 1 times. Cost: max_span passes over B T.

    >>> repeats([[5, 1, 2, 1, 2, 1, 2, 9]])
    array([3])
    """
    tokens = _tokens(tokens_BT)
    most_B = np.ones(len(tokens), dtype=np.int64)
    for span in range(1, min(max_span, tokens.shape[1] - 1) + 1):
        same = tokens[:, span:] == tokens[:, :-span]
        # Position minus the last mismatch up to it: the length of the run that ends there.
        at = np.arange(1, same.shape[1] + 1)
        last_miss = np.maximum.accumulate(np.where(same, 0, at), axis=1)
        most_B = np.maximum(most_B, (at - last_miss).max(axis=1) // span + 1)
    return most_B


def compression_ratio(tokens_BT: npt.ArrayLike | Tensor) -> float:
    """Raw bytes over zlib bytes (level 6) of all tokens, in the smallest of 1, 2 or 4 little-endian bytes per id.

    Text in bytes has about 2 to 4; a batch of one repeated line tens or hundreds. Cost: about 20 MB/s on one core.
    """
    tokens = _tokens(tokens_BT)
    top = int(tokens.max())
    raw = tokens.astype("<u1" if top < 256 else "<u2" if top < 65536 else "<u4").tobytes()
    return len(raw) / len(zlib.compress(raw, 6))


def sample_losses(logits_BTV: Tensor, targets_BT: Tensor, *, ignore: int = -100) -> Tensor:
    """Mean cross-entropy of each sequence over the targets that are not `ignore`: float32 [B], nats, detached.

    nan for a sequence without a target. Cost: one pass over the logits and one float32 copy of them.
    """
    with torch.no_grad():
        loss_BT = torch.nn.functional.cross_entropy(
            logits_BTV.detach().float().flatten(0, 1), targets_BT.flatten(), ignore_index=ignore, reduction="none"
        ).view(targets_BT.shape)
        counted_BT = targets_BT != ignore
        return torch.where(counted_BT, loss_BT, 0.0).sum(1) / counted_BT.sum(1)


def top_losses(loss_B: Tensor, *, k: int = 1) -> TopLosses:
    """The `k` largest of `loss_B`, largest first; a loss that is not finite counts as the largest. Shape K = min(k, B).

    Cost: one topk over B numbers; no synchronisation.
    """
    if loss_B.ndim != 1 or loss_B.numel() == 0 or k < 1:
        raise ValueError(f"top_losses needs k >= 1 and losses of shape [B], got k={k} and shape {tuple(loss_B.shape)}")
    loss_B = loss_B.detach()
    rank_B = torch.where(torch.isfinite(loss_B), loss_B, torch.inf)
    row_K = rank_B.topk(min(k, len(loss_B))).indices
    return TopLosses(loss_B[row_K], row_K)


def _tokens(tokens_BT: npt.ArrayLike | Tensor) -> np.ndarray:
    if isinstance(tokens_BT, Tensor):
        if tokens_BT.device.type != "cpu":
            raise ValueError(f"the tokens lie on {tokens_BT.device}; measure the batch on the host, before it moves")
        tokens_BT = tokens_BT.numpy()
    tokens = np.asarray(tokens_BT)
    if tokens.ndim != 2 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"token ids must be integers of shape [B, T], got {tokens.dtype} of shape {tokens.shape}")
    if tokens.min() < 0:
        raise ValueError(f"token ids must not be negative, got {int(tokens.min())}; drop the padding first")
    return tokens
