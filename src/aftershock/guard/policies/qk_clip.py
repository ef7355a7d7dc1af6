"""QK-clip: shrink query and key weights of a head whose attention logits grew too large (Kimi K2, arXiv 2507.20534).

Legend: H heads (of queries), G key heads, R rows of a weight. Must not import the guard.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from aftershock.config import nearest
from aftershock.guard.policies.editor import Editor
from aftershock.guard.policies.saved import require
from aftershock.guard.policy import CONTINUE, Action, Continue, Live, Seen
from aftershock.signals.attention import probe_attention
from aftershock.signals.ranks import is_sharded

MaxLogits = Callable[[], Mapping[str, Sequence[float]]]


class Rows(NamedTuple):
    """Rows of a projection: head h owns `size` rows from `start + h stride` on, scaled by r_h^`power`."""

    name: str
    heads: int
    start: int
    stride: int
    size: int
    power: float


class Attention(NamedTuple):
    """One attention layer: `place` is its key in the max logits, of `heads` numbers; `rows` are what to scale."""

    place: str
    heads: int
    rows: tuple[Rows, ...]


def grouped(
    place: str, *, query: str, key: str, heads: int, key_heads: int, width: int, fused: bool = False, alpha: float = 0.5
) -> Attention:
    """MHA or GQA: W_q rows of a head times r^alpha, W_k rows times r^(1 - alpha); `width` rows a head.

    `query` and `key` name weights [R, in], and biases [R] in a layer of their own. With `fused`, `query` and `key` name
    one tensor that holds all queries, then all keys (then the values).

    Example:
        grouped("blocks.0.attn", query="blocks.0.attn.q.weight", key="blocks.0.attn.k.weight", heads=8, key_heads=2,
                width=64)
    """
    if heads % key_heads:
        raise ValueError(f"{place}: {heads} query heads cannot share {key_heads} key heads evenly")
    first_key = heads * width if fused else 0
    q_rows = Rows(query, heads, 0, width, width, alpha)
    return Attention(place, heads, (q_rows, Rows(key, key_heads, first_key, width, width, 1 - alpha)))


def latent(
    place: str, *, query: str, key_value: str, heads: int, nope: int, rope: int, value: int, alpha: float = 0.5
) -> Attention:
    """MLA: q_nope times r^alpha, k_nope times r^(1 - alpha), q_rope times r; the shared k_rope is left alone.

    `query` rows per head: `nope`, then `rope`; `key_value` rows per head: `nope` of the key, then `value`.
    """
    whole = nope + rope
    return Attention(
        place,
        heads,
        (
            Rows(query, heads, 0, whole, nope, alpha),
            Rows(query, heads, nope, whole, rope, 1.0),
            Rows(key_value, heads, 0, nope + value, nope, 1 - alpha),
        ),
    )


def probed(model: nn.Module, run: Callable[[], Any], places: str | Sequence[str]) -> MaxLogits:
    """Max logits from a probe batch: `run()` is a forward pass of `model` on a few sequences.

    See `signals.attention.probe_attention` for what it can read and its cost.
    """

    def read() -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        whole: dict[str, float] = {}
        for signal, value in probe_attention(model, run, places).read().items():
            place, _, stat = signal.removeprefix("attn/").rpartition("/")
            if stat == "max_logit":
                layer, dot, _ = place.rpartition(".head")
                if dot:
                    found.setdefault(layer, []).append(value)
                else:
                    whole[place] = value
        return {place: found.get(place, [value]) for place, value in whole.items()}

    return read


@dataclass(kw_only=True, eq=False)
class QKClip(Editor):
    """After the step, scales W_q and W_k of each head by powers of r = min(1, `tau` / S), S its largest logit.

    In a GQA group one r, the smallest of its heads, since they share the key. S is the maximum over all processes, and
    a head whose S is not finite is left alone and told. `max_logits()` gives S by place [H]: from the kernel, or from
    `probed(...)`; it is called every `every` steps, after the step, on every rank. Only weights named here change, and
    in place; an optimizer with hidden master copies (not torch's own) would undo it.

    Example:
        layers = [grouped(f"blocks.{i}.attn", query=..., key=..., heads=8, key_heads=8, width=64) for i in range(12)]
        policy = QKClip(layers=layers, max_logits=probed(model, lambda: model(batch[:2]), "blocks.*.attn"), every=10)
    """

    SAVED: ClassVar[tuple[str, ...]] = ("steps",)

    layers: Sequence[Attention]
    max_logits: MaxLogits
    tau: float = 100.0
    every: int = 1

    _steps: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        require(self, tau=1e-9, every=1)
        if not self.layers:
            raise ValueError("QKClip: no layers given; name the query and key weights with grouped(...) or latent(...)")

    def edit(self, seen: Seen, live: Live) -> Action:
        return CONTINUE

    def after_step(self, seen: Seen, live: Live) -> Action:
        self._steps += 1
        if self._steps % self.every:
            return CONTINUE
        device = next(iter(live.params.values())).device
        tops = [top.tolist() for top in self._over_ranks(self.max_logits(), device)]
        clipped, strange = [], []
        for layer, top_H in zip(self.layers, tops, strict=True):
            if not all(math.isfinite(top) for top in top_H):
                strange.append(layer.place)
            ratio_H = [min(1.0, self.tau / top) if math.isfinite(top) and top > 0 else 1.0 for top in top_H]
            if min(ratio_H) < 1:
                clipped.append(f"{layer.place} (max logit {max(filter(math.isfinite, top_H)):.4g})")
                _shrink(layer, ratio_H, live)
        told = [f"query and key weights shrunk: {', '.join(clipped)}"] if clipped else []
        told += [f"max logit not finite: {', '.join(strange)}"] if strange else []
        return Continue("; ".join(told))

    def _over_ranks(self, found: Mapping[str, Sequence[float]], device: torch.device) -> list[Tensor]:
        """Per layer, the maximum over processes [H]: one all-reduce of all heads."""
        for layer in self.layers:
            if layer.place not in found:
                raise ValueError(f"QKClip: no max logits for {layer.place!r}{nearest(layer.place, found)}")
            if len(found[layer.place]) != layer.heads:
                raise ValueError(
                    f"QKClip: {len(found[layer.place])} max logits for the {layer.heads} heads of {layer.place}"
                )
        all_H = torch.tensor([float(top) for layer in self.layers for top in found[layer.place]], device=device)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(all_H, torch.distributed.ReduceOp.MAX)
        return list(all_H.cpu().split([layer.heads for layer in self.layers]))


def _shrink(layer: Attention, ratio_H: list[float], live: Live) -> None:
    """Scale the rows of one layer's projections."""
    shared = min(rows.heads for rows in layer.rows)
    size = layer.heads // shared
    ratio_G = [min(ratio_H[g * size : (g + 1) * size]) for g in range(shared)]
    factors: dict[str, Tensor] = {}
    for rows in layer.rows:
        if rows.name not in live.params:
            raise ValueError(f"QKClip: {layer.place} names {rows.name!r}{nearest(rows.name, live.params)}")
        num_rows = live.params[rows.name].shape[0]
        if rows.start + (rows.heads - 1) * rows.stride + rows.size > num_rows:
            raise ValueError(f"QKClip: {rows.name} has {num_rows} rows, too few for {rows.heads} heads of {rows.size}")
        factor_R = factors.setdefault(rows.name, torch.ones(num_rows))
        for h in range(rows.heads):
            start = rows.start + h * rows.stride
            factor_R[start : start + rows.size] *= ratio_G[h * shared // rows.heads] ** rows.power
    with torch.no_grad():
        for name, factor_R in factors.items():
            _scale_rows(live.params[name], factor_R)


def _scale_rows(weight: Tensor, factor_R: Tensor) -> None:
    factor = factor_R.to(weight.device).reshape(-1, *[1] * (weight.ndim - 1))
    if is_sharded(weight):
        from torch.distributed.tensor import DTensor, Replicate

        mesh = weight.device_mesh  # pyright: ignore[reportAttributeAccessIssue]
        factor = DTensor.from_local(factor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    # In float32, then rounded once to the weight's own dtype.
    weight.copy_(weight * factor)
