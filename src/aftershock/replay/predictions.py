"""What a model predicts on a few batches, one row a prediction, beside what counting the targets would predict.

Legend: B sequences, T positions, V vocabulary or classes, N predictions, C pairs seen. Must not import the lab.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aftershock.signals.untouched import untouched

CELLS = 2**26
"""Predictions times vocabulary that are compared at most: 256 MiB of log-probabilities."""
CHUNK = 2**22
"""The same for one piece of the work."""
TOLD = ("labels", "num_items_in_batch", "num_micro_batches")
"""What is in a batch for the loss alone."""

Logits = Callable[[nn.Module, Any], Tensor]
Targets = Callable[[Any], Tensor]


def reading(model: nn.Module, batch: Any, logits: Logits | None, targets: Targets | None) -> tuple[Logits, Targets]:
    """How logits and targets are got, from the batch's structure where it is not said."""
    if logits is not None and targets is not None:
        return logits, targets
    if isinstance(batch, Mapping) and isinstance(batch.get("labels"), Tensor):
        cut = slice(None, -1) if batch["labels"].ndim == 2 and _shifts(model) else slice(None)
        late = slice(1, None) if cut.stop else slice(None)
        return (
            logits or (lambda m, b: _logits_in(m(**{k: v for k, v in b.items() if k not in TOLD}))[:, cut]),
            targets or (lambda b: b["labels"][:, late] if b["labels"].ndim == 2 else b["labels"]),
        )
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch):
        return logits or (lambda m, b: _logits_in(m(b[0]))), targets or (lambda b: b[1])
    raise ValueError(
        f"it cannot be told what a model predicts on a batch of type {type(batch).__name__}, neither a dict with "
        "labels nor a pair (inputs, targets); pass logits=lambda model, batch: .. and targets=lambda batch: .."
    )


def _shifts(model: nn.Module) -> bool:
    """Whether labels are inputs, to be predicted one place earlier. Raises ValueError where that cannot be told."""
    config, loss = getattr(model, "config", None), getattr(model, "loss_function", None)
    name = getattr(loss, "__name__", "")
    if getattr(config, "is_encoder_decoder", False) or name in ("ForMaskedLMLoss", "ForTokenClassification"):
        return False
    if name == "ForCausalLMLoss":
        return True
    raise ValueError(
        f"it cannot be told whether the labels of {type(model).__name__} are shifted against its logits; pass "
        "logits=lambda model, batch: .. and targets=lambda batch: .., aligned with each other"
    )


def _logits_in(output: Any) -> Tensor:
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(found, Tensor):
        raise ValueError(f"no logits in a model's output of type {type(output).__name__}; pass logits= to say where")
    return found


class View(NamedTuple):
    """One look, per prediction; float64 on the host. `logp` of the first look only, with which others are compared."""

    logp: tuple[Tensor, ...]
    loss_N: Tensor
    entropy_N: Tensor
    confidence_N: Tensor
    top_N: Tensor
    from_unigram_N: Tensor
    from_bigram_N: Tensor
    from_before_N: Tensor


class Asking:
    """The predictions that are asked for at every point."""

    def __init__(self, model: nn.Module, asked: Sequence[Any], logits: Logits, targets: Targets) -> None:
        self._model, self._logits, self.targets = model, logits, targets
        known = [(part, targets(part)) for part in asked]
        self._parts = [part for part, target in known if target.numel()]
        found = [target for _, target in known if target.numel()]
        if not found:
            raise ValueError("the calm batches hold no target; pass targets= to say where they are")
        with untouched(model, evaluate=True), torch.no_grad():
            shape = logits(model, self._parts[0]).shape
        if shape[:-1] != found[0].shape or found[0].is_floating_point():
            raise ValueError(
                f"logits of shape {tuple(shape)} do not fit targets of {tuple(found[0].shape)}, {found[0].dtype}; "
                "pass logits= and targets= that give [B, T, V] and [B, T], or [B, V] and [B]; regressions have none"
            )
        self.vocabulary = shape[-1]
        self.sequences = found[0].ndim == 2
        self.notes = () if self.sequences else ("no sequences: nothing by position, and no bigram",)
        whole = [_flat(target) for target in found]
        self._rows = [(one.target_N >= 0).nonzero().squeeze(1) for one in whole]
        num, most = sum(map(len, self._rows)), max(1, CELLS // self.vocabulary)
        if num > most:
            self.notes += (f"{most} of {num} predictions are asked for, evenly spread",)
            chosen = torch.zeros(num, dtype=torch.bool)
            chosen[torch.linspace(0, num - 1, most).long()] = True
            pieces = chosen.split([len(rows) for rows in self._rows])
            self._rows = [rows[piece] for rows, piece in zip(self._rows, pieces, strict=True)]
        kept = [[values[rows] for values in one] for one, rows in zip(whole, self._rows, strict=True)]
        self.flat = Flat(*(torch.cat(values) for values in zip(*kept, strict=True)))
        self.num = len(self.flat.target_N)

    def view(self, counts: Counts, before: View | None) -> View:
        """The model's predictions as it stands."""
        pieces: list[tuple[Tensor, ...]] = []
        kept: list[Tensor] = []
        at = 0
        with untouched(self._model, evaluate=True), torch.no_grad():
            for part, rows in zip(self._parts, self._rows, strict=True):
                if not len(rows):
                    continue
                logits_NV = self._logits(self._model, part).reshape(-1, self.vocabulary)
                for piece in rows.split(max(1, CHUNK // self.vocabulary)):
                    logp_NV = logits_NV[piece.to(logits_NV.device)].float().log_softmax(-1).cpu()
                    old_NV = logp_NV if before is None else before.logp[len(pieces)]
                    flat = Flat(*(values[at : at + len(piece)] for values in self.flat))
                    pieces.append(_measured(logp_NV, old_NV, flat, counts))
                    kept += [logp_NV] if before is None else []
                    at += len(piece)
        return View(tuple(kept), *(torch.cat(values) for values in zip(*pieces, strict=True)))


class Flat(NamedTuple):
    """Predictions in a row: the target, the target before it (-1: none) and the place in the sequence."""

    target_N: Tensor
    previous_N: Tensor
    place_N: Tensor


def _flat(target: Tensor) -> Flat:
    target = target.detach().cpu().long()
    previous, place = torch.full_like(target, -1), torch.zeros_like(target)
    if target.ndim == 2:
        previous[:, 1:] = target[:, :-1].clamp(min=-1)
        place += torch.arange(target.shape[1])
    return Flat(target.flatten(), previous.flatten(), place.flatten())


class Counts:
    """How often targets, and pairs of one after another, were seen; each once more than that in a probability."""

    def __init__(self, seen: Sequence[Tensor], ask: Asking) -> None:
        size = self._size = ask.vocabulary
        flat = Flat(*(torch.cat(values) for values in zip(*map(_flat, seen), strict=True)))
        self.count_V = torch.bincount(flat.target_N[flat.target_N >= 0], minlength=size).double()
        self.total = self.count_V.sum().item()
        self.log_unigram_V = ((self.count_V + 1) / (self.total + size)).log()
        self.entropy = -(self.log_unigram_V.exp() * self.log_unigram_V).sum().item()
        both = (flat.target_N >= 0) & (flat.previous_N >= 0)
        pair_C, self._pair_count_C = torch.unique(
            flat.previous_N[both] * size + flat.target_N[both], return_counts=True
        )
        self._next_C = pair_C % size
        self._start = torch.searchsorted(pair_C, torch.arange(size + 1) * size)
        self._after_V = torch.zeros(size, dtype=torch.float64)
        self._after_V.index_add_(0, pair_C // size, self._pair_count_C.double())

    def log_bigram(self, p_NV: Tensor, previous_N: Tensor) -> Tensor:
        """sum p ln q(. | previous) per prediction; nan where there is none before. Only pairs that were seen cost."""
        known = (previous_N >= 0).nonzero().squeeze(1)
        first, last = self._start[previous_N[known]], self._start[previous_N[known] + 1]
        row = torch.repeat_interleave(known, last - first)
        inner = torch.arange(len(row)) - torch.repeat_interleave(
            (last - first).cumsum(0) - (last - first), last - first
        )
        pair = torch.repeat_interleave(first, last - first) + inner
        found = torch.full((len(p_NV),), math.nan, dtype=torch.float64)
        found[known] = -p_NV[known].sum(1) * (self._after_V[previous_N[known]] + self._size).log()
        return found.index_add_(0, row, p_NV[row, self._next_C[pair]] * (self._pair_count_C[pair] + 1).double().log())


def _measured(logp_NV: Tensor, old_NV: Tensor, flat: Flat, counts: Counts) -> tuple[Tensor, ...]:
    """The fields of a `View`, for one piece of its predictions."""
    logp, p = logp_NV.double(), logp_NV.double().exp()
    entropy_N = -_expected(p, logp)
    confidence_N, top_N = p.max(1)
    old = old_NV.double()
    return (
        -logp.gather(1, flat.target_N[:, None]).squeeze(1),
        entropy_N,
        confidence_N,
        top_N,
        -entropy_N - _expected(p, counts.log_unigram_V),
        -entropy_N - counts.log_bigram(p, flat.previous_N),
        _expected(old.exp(), old) - _expected(old.exp(), logp),
    )


def _expected(p_NV: Tensor, value: Tensor) -> Tensor:
    """sum p x, where p = 0 gives 0 whatever x is."""
    return torch.where(p_NV == 0, 0.0, p_NV * value).sum(1)
