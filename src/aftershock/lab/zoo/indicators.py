"""What a step of a specimen shows besides its loss: optimizer, weights, activations, attention and batch, as signals.

Legend: B sequences, T queries, S keys, H heads, E head width, D width, V vocabulary, L layers.
Everything here reads; what trains is not written to, and no random number is drawn. Must not import a specimen.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aftershock.lab.zoo.nets import Attention, ByteLM, ModularMlp, Tokens
from aftershock.signals.activations import output_columns
from aftershock.signals.batches import batch_stats, sample_losses, top_losses
from aftershock.signals.curvature import Method, NoCurvature, directional_curvature, sharpness
from aftershock.workload import Workload

CURVATURE_EVERY = 4
"""Curvature costs three gradients; between two measurements the last value is held."""
SHARPNESS_EVERY, SHARPNESS_TURNS = 20, 2
"""Power iteration costs three gradients a turn; warm-started, two follow what changes in 20 steps."""
WEIGHTS_EVERY = 10
"""Singular values of the query and key weights, which move slowly."""
PROBED = 4
"""Sequences of a batch whose attention entropy is taken."""
USUAL, LEAST = 32, 8
"""Steps whose median is the usual gradient norm of a tensor, and how few still make one."""


def is_adam(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer keeps Adam's moments."""
    return all("betas" in group for group in optimizer.param_groups)


def largest(values: Iterable[float]) -> float:
    """The maximum, and nan where there is one: max() would step over it, which here is the news."""
    found = list(values)
    return math.nan if any(map(math.isnan, found)) else max(found)


def smallest(values: Iterable[float]) -> float:
    """The minimum, and nan where there is one."""
    return -largest(-value for value in values)


# ---------------------------------------------------------------------------------------------------- the optimizer


class Tensors:
    """The tap's signals of all tensors as the few of the whole model; call `row` once a step, in order."""

    def __init__(self, model: nn.Module) -> None:
        self._sizes = {name: p.numel() for name, p in model.named_parameters()}
        self._usual: deque[np.ndarray] = deque(maxlen=USUAL)
        self._first: dict[str, float] = {}
        self._previous: dict[str, float] = {}

    def row(self, values: Mapping[str, float]) -> dict[str, float]:
        row = {name: values[name] for name in ("grad/all/norm", "update/all/norm", "param/all/norm")}
        places = {
            "optim/max/rms_t": ("optim", "rms_t"),
            "optim/max/rms_t_share": ("optim", "rms_t_share"),
            "optim/max/saturated_frac": ("optim", "saturated_frac"),
            "optim/max/eps_floor_frac": ("optim", "eps_floor_frac"),
            "grad/embed/over_median": ("grad", "over_median"),
            "update/max/ratio": ("update", "ratio"),
        }
        for name, (kind, stat) in places.items():
            found = self._of(values, kind, stat)
            if found:
                row[name] = largest(found.values())
        return row | self._moments(values) | self._cosines(values) | self._against_before(values)

    def _of(self, values: Mapping[str, float], kind: str, stat: str) -> dict[str, float]:
        """By parameter; a tensor without the statistic is left out."""
        names = {place: f"{kind}/{place}/{stat}" for place in self._sizes}
        return {place: values[name] for place, name in names.items() if name in values}

    def _moments(self, values: Mapping[str, float]) -> dict[str, float]:
        first, root = self._of(values, "optim", "first_norm"), self._of(values, "optim", "second_root_sum")
        if not first:
            return {}
        size = sum(self._sizes[place] for place in first)
        row = {
            "optim/all/first_norm": math.hypot(*first.values()),
            "optim/all/second_root_sum": sum(root.values()),
        }
        for stat in ("saturated_frac", "eps_floor_frac"):
            shares = self._of(values, "optim", stat)
            row[f"optim/all/{stat}"] = sum(share * self._sizes[place] for place, share in shares.items()) / size
        if row["optim/all/second_root_sum"]:
            mean_root = row["optim/all/second_root_sum"] / size
            row["optim/all/first_over_root"] = row["optim/all/first_norm"] / math.sqrt(size) / mean_root
        return row

    def _cosines(self, values: Mapping[str, float]) -> dict[str, float]:
        """Cosines of the whole model from those of its tensors; one factor for all, as clipping is, leaves them."""
        grad, update = self._of(values, "grad", "norm"), self._of(values, "update", "norm")
        pairs = {
            "grad/all/cosine_previous": (self._of(values, "grad", "cosine_previous"), grad, self._previous),
            "update/all/cosine_descent": (self._of(values, "update", "cosine_descent"), update, grad),
        }
        row = {}
        for name, (cosines, a, b) in pairs.items():
            length = math.hypot(*a.values()) * math.hypot(*b.values())
            if cosines and length:
                row[name] = sum(cosine * a[place] * b[place] for place, cosine in cosines.items()) / length
        self._previous = grad
        return row

    def _against_before(self, values: Mapping[str, float]) -> dict[str, float]:
        """Each tensor's gradient against its own usual one, and its weights against those it began with."""
        row = {}
        grad, param = self._of(values, "grad", "norm"), self._of(values, "param", "norm")
        norm_P = np.array([grad.get(place, 0.0) for place in self._sizes])
        if len(self._usual) >= LEAST:
            median_P = np.median(np.array(self._usual), axis=0)
            known_P = median_P > 0
            if known_P.any():
                row["grad/max/over_usual"] = float((norm_P[known_P] / median_P[known_P]).max())
        if np.isfinite(norm_P).all():
            self._usual.append(norm_P)
        self._first = self._first or param
        kept = [norm / self._first[place] for place, norm in param.items() if self._first.get(place)]
        if kept:
            row["param/min/of_first"] = smallest(kept)
        return row


# ------------------------------------------------------------------------------------------------- the forward pass


class Outputs:
    """What the last forward pass put out, of the model and of the places within, seen through hooks."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._last = model, torch.zeros(0)
        self._inner: dict[int, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Outputs:
        self._handles = [self._model.register_forward_hook(self._keep)]
        self._handles += [
            place.register_forward_hook(self._keep_inner(i)) for i, place in enumerate(_places(self._model))
        ]
        if isinstance(self._model, ByteLM):
            self._model.watch = True
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()
        if isinstance(self._model, ByteLM):
            self._model.watch = False

    def _keep(self, model: nn.Module, inputs: Any, output: Tensor) -> None:
        self._last = output.detach()

    def _keep_inner(self, index: int) -> Any:
        def keep(model: nn.Module, inputs: Any, output: Tensor) -> None:
            self._inner[index] = output.detach()

        return keep

    @torch.no_grad()
    def row(self, part: Any) -> dict[str, float]:
        """Of the forward pass on `part`, the last (micro-)batch."""
        size = math.sqrt(self._last.numel())
        row = {"output/abs_max": self._last.abs().max().item(), "output/rms": self._last.norm().item() / size}
        if self._last.shape[-1] > 1:
            log_z = self._last.double().logsumexp(-1)
            row |= {"output/log_z": log_z.mean().item(), "output/log_z_max": log_z.max().item()}
        if self._inner:
            columns = [output_columns(self._inner[i]).tolist() for i in sorted(self._inner)]
            row |= {
                "activation/max/abs_max": largest(top for top, *_ in columns),
                "activation/max/kurtosis": largest(kurtosis for *_, kurtosis in columns),
                "activation/last/rms": math.sqrt(columns[-1][1]),
            }
        if isinstance(self._model, ByteLM):
            row["attention/max/logit"] = self._model.max_logit()
            row["attention/min/entropy"] = _least_entropy(self._model)
        tokens = find_tokens(part)
        if tokens is not None:
            loss_B = sample_losses(self._last, tokens.targets_BT)
            worst, mean = top_losses(loss_B).loss_K.item(), loss_B.mean().item()
            row["batch/max/loss"] = worst
            if mean:
                row["batch/max/loss_over_mean"] = worst / mean
        return row


def _places(model: nn.Module) -> Sequence[nn.Module]:
    """The blocks of a language model; of other nets the linear layers but the last, whose output is the model's."""
    if isinstance(model, ByteLM):
        return list(model.blocks)
    return [module for module in model.modules() if isinstance(module, nn.Linear)][:-1]


def _attentions(model: nn.Module) -> list[Attention]:
    return [module for module in model.modules() if isinstance(module, Attention)]


def _least_entropy(model: ByteLM) -> float:
    """The smallest over heads of the mean entropy of the queries' weights, nats, of the last watched forward pass."""
    found = []
    for attention in _attentions(model):
        assert attention.seen is not None, "max_logit has asked for it"
        q_BHTE, k_BHSE = (x[:PROBED] for x in attention.seen)
        scores_BHTS = q_BHTE @ k_BHSE.transpose(-1, -2) / math.sqrt(q_BHTE.shape[-1])
        later_TS = torch.ones(scores_BHTS.shape[-2:], dtype=torch.bool).triu(1)
        weights_BHTS = scores_BHTS.masked_fill(later_TS, -torch.inf).softmax(-1)
        found += torch.special.entr(weights_BHTS).sum(-1).mean((0, 2)).tolist()
    return smallest(found)


# -------------------------------------------------------------------------------------------- weights and curvature


class Weights:
    """Singular values of query and key weights and of their change, and the mean output embedding, now and then."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._held = model, dict[str, float]()
        self._before: Tensor | None = None

    @torch.no_grad()
    def row(self, index: int) -> dict[str, float]:
        if index % WEIGHTS_EVERY == 0:
            self._held = self._head() | self._query_key()
        return dict(self._held)

    def _head(self) -> dict[str, float]:
        if not isinstance(self._model, (ByteLM, ModularMlp)):
            return {}
        return {"param/head/mean_norm": self._model.head.weight.mean(0).norm().item()}

    def _query_key(self) -> dict[str, float]:
        attentions = _attentions(self._model)
        if not attentions:
            return {}
        now = torch.stack([a.query_key.weight.unflatten(0, (2, a.heads, -1)) for a in attentions])  # L 2 H E D
        before, self._before = self._before, now
        names = ("param/qk/spectral_norm", "update/qk/stable_rank", "update/qk/spectral_entropy")
        if not now.isfinite().all() or (before is not None and not before.isfinite().all()):
            return dict.fromkeys(names, math.nan)  # singular values of nan are an error
        row = {names[0]: torch.linalg.matrix_norm(now.flatten(2, 3), ord=2).max().item()}
        if before is None:
            return row
        query, key = now.unbind(1)
        moved_query, moved_key = (now - before).unbind(1)
        change = moved_query.transpose(-1, -2) @ key + query.transpose(-1, -2) @ moved_key  # L H D D
        square = torch.linalg.svdvals(change.double()).square()
        if not (square.sum(-1) > 0).all():
            return row
        share = square / square.sum(-1, keepdim=True)
        row[names[1]] = (1 / share.amax(-1)).min().item()
        row[names[2]] = torch.special.entr(share).sum(-1).min().item()
        return row


class Curvatures:
    """Curvature along the step and the sharpest one, against the edge of stability, measured now and then and held."""

    def __init__(self, workload: Workload) -> None:
        self._workload, self._held = workload, dict[str, float]()
        self._method: Method = "auto"
        self._vector: Sequence[Tensor] | None = None

    def row(self, index: int) -> dict[str, float]:
        if index and index % CURVATURE_EVERY == 0:
            self._along_step(index)
        if index and index % SHARPNESS_EVERY == 0:
            self._sharpest(index)
        return dict(self._held)

    def _problem(self, index: int) -> dict[str, Any]:
        model, optimizer = self._workload.model, self._workload.optimizer
        batch = next(self._workload.micro_batches(index))
        return {
            "model": model,
            "loss": lambda: self._workload.loss(model, batch),
            "lr": optimizer.param_groups[0]["lr"],
            "optimizer": optimizer if is_adam(optimizer) else None,
            "method": self._method,
        }

    def _along_step(self, index: int) -> None:
        value = math.nan
        with contextlib.suppress(NoCurvature):
            found = directional_curvature(**self._problem(index))
            value = found.momentum_edge_share
            # A kernel that has no second derivative now has none later: it is tried once.
            self._method = "finite_difference" if found.method == "finite_difference" else "auto"
        self._held["curvature/all/directional"] = value

    def _sharpest(self, index: int) -> None:
        value = math.nan
        # NoCurvature, or where a loss without a gradient leaves power iteration no direction.
        with contextlib.suppress(ValueError):
            found = sharpness(**self._problem(index), warm=self._vector, iterations=SHARPNESS_TURNS)
            optimizer = self._workload.optimizer
            beta1 = optimizer.param_groups[0]["betas"][0] if is_adam(optimizer) else 0.0
            value = found.edge_share * (1 - beta1) / (1 + beta1)
            self._vector = found.vector if math.isfinite(value) else None
        self._held["curvature/all/sharpest"] = value


# -------------------------------------------------------------------------------------------------------- the batch


def find_tokens(part: Any) -> Tokens | None:
    """The tokens in a (micro-)batch, which may carry more beside them; None where it has none."""
    if isinstance(part, Tokens):
        return part
    if isinstance(part, tuple):
        return next((inner for inner in part if isinstance(inner, Tokens)), None)
    return None


def batch_row(parts: Sequence[Any]) -> dict[str, float]:
    """What the tokens of a step's (micro-)batches say before the step (`batch_stats`); {} where it has none."""
    found = [tokens.inputs_BT for part in parts if (tokens := find_tokens(part)) is not None]
    return batch_stats(torch.cat(found)).signals() if found else {}
