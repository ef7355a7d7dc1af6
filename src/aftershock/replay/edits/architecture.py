"""Bounds on attention logits from the snapshot on: normalised queries and keys, or QK-clip after each step.

Legend: B batch, H heads, T positions, E head width, D width, R rows of a weight. Must not import other edits.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from aftershock.guard.policies.qk_clip import Attention, QKClip, grouped, probed
from aftershock.guard.policy import Live, Seen
from aftershock.replay.edits.checked import Checked, first_part, try_loss
from aftershock.replay.edits.places import modules_of
from aftershock.replay.run import Run
from aftershock.signals.places import module_places, plain_name

TINY = 1e-12
"""Under the square root of a query of nothing but zeros."""

QUERY, KEY = r"q(_?proj|_?lin|uery)?|query|to_q|wq", r"k(_?proj|_?lin|ey)?|key|to_k|wk"
"""Names of the layers that make queries and keys [H E, D]."""
FUSED = {r"query_key|qk(_proj)?": 2, r"w?qkv(_proj)?|in_proj|c_attn": 3}
"""Names of one layer whose rows are all queries, then all keys, perhaps then all values; and how many that makes.
Not query_key_value, which takes turns head by head."""


@dataclass(frozen=True, kw_only=True)
class QKNorm(Checked):
    """Queries and keys are divided by their RMS over E and multiplied by what that was on average at the snapshot.

    q' = g q / rms(q), g the RMS over the first batch, by head: so the function hardly changes at first, and the growth
    of W_q and W_k has no effect on the logits from then on. (Dehghani et al. 2023, arXiv 2302.05442, with a mean taken
    off and a learnt gain; a gain of 1 in the middle of a run would be a jump of its own.)

    Seen are calls of scaled_dot_product_attention. For another kernel, `modules` names those whose outputs are queries
    and keys (patterns); their last axis is then normalised.
    """

    modules: tuple[str, ...] = ()

    def check(self, run: Run) -> None:
        if self.modules:
            module_places(run.workload.model, self.modules)
            return
        seen = _Normalised(None)
        try_loss(run, seen)
        if not seen.measured:
            raise ValueError(
                "no scaled_dot_product_attention is called, so queries and keys are not seen; name the modules that "
                "give them out, such as qk-norm:*.q_proj,*.k_proj"
            )

    def change(self, run: Run) -> None:
        if self.modules:
            for module in module_places(run.workload.model, self.modules).values():
                run.undo.append(_normalised_output(run, module))
            return
        seen, loss = _Normalised(None), run.loss
        try_loss(run, seen)

        def bounded(model: nn.Module, batch: Any) -> Tensor:
            with _Normalised(seen.measured):
                return loss(model, batch)

        run.loss = bounded


class _Normalised(TorchFunctionMode):
    """Measures the RMS of queries and keys by call and head; given such measures, scales to them."""

    def __init__(self, gains: Sequence[tuple[Tensor, Tensor]] | None) -> None:
        super().__init__()  # the mode is a torch class that must be initialised
        self._gains = gains
        self._calls = 0
        self.measured: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        named: dict[str, Any] = dict(zip(_SDPA, args, strict=False)) | dict(kwargs or {})
        query, key = named["query"], named["key"]
        if self._gains is None:
            self.measured.append((_gain(query), _gain(key)))
            return func(**named)
        if self._calls >= len(self._gains):
            raise ValueError(f"the model calls attention more often than the {len(self._gains)} times at the snapshot")
        query_gain, key_gain = self._gains[self._calls]
        self._calls += 1
        return func(**named | {"query": _scaled(query, query_gain), "key": _scaled(key, key_gain)})


_SDPA = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def _gain(x_BHTE: Tensor) -> Tensor:
    """[H, 1, 1], or [1, 1] where there are no heads: the RMS over all axes but the heads'."""
    axes = [axis for axis in range(x_BHTE.ndim) if x_BHTE.ndim < 4 or axis != x_BHTE.ndim - 3]
    return x_BHTE.detach().float().square().mean(axes, keepdim=True).sqrt().to(x_BHTE.dtype)


def _scaled(x_BHTE: Tensor, gain: Tensor) -> Tensor:
    wide = x_BHTE if x_BHTE.dtype == torch.float64 else x_BHTE.float()
    rms = (wide.square().mean(-1, keepdim=True) + TINY).sqrt()
    return (wide / rms * gain.to(wide.dtype)).to(x_BHTE.dtype)


def _normalised_output(run: Run, module: nn.Module) -> Any:
    """A hook on what leaves the module, scaled to what it is at the snapshot; how to take it off."""
    gains: list[Tensor] = []
    measure = module.register_forward_hook(lambda _, __, output: gains.append(_whole(output)))
    try:
        try_loss(run, contextlib.nullcontext())
    finally:
        measure.remove()
    if not gains:
        raise ValueError(f"a {type(module).__name__} named for qk-norm is not run by the loss")

    def scale(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return _scaled(output, gains[0])

    return module.register_forward_hook(scale).remove


def _whole(output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise ValueError(f"a module named for qk-norm gives a {type(output).__name__}; name one that gives a tensor")
    return output.detach().float().square().mean().sqrt()


@dataclass(frozen=True, kw_only=True)
class QKClipped(Checked):
    """After each step W_q and W_k of every head are shrunk until no logit of the step's batch exceeds `tau`.

    nan: the largest logit that the first batch has at the snapshot, so that logits grow no further. Layers are found
    by the names that people give them (`QUERY`, `KEY`, `FUSED`), also GPT-2's transposed ones, or given as the guard's
    `QKClip` takes them. Cost: one forward pass a step with the scores in memory.
    """

    tau: float = math.nan
    layers: tuple[Attention, ...] = ()

    def __post_init__(self) -> None:
        if not math.isnan(self.tau) and not 0 < self.tau < math.inf:
            raise ValueError(f"qk-clip: tau is a logit above 0, got {self.tau}")

    def check(self, run: Run) -> None:
        self._found(run)

    def change(self, run: Run) -> None:
        tops, layers = self._found(run)
        tau = max(map(max, tops.values())) if math.isnan(self.tau) else self.tau
        places = sorted({layer.place for layer in layers})
        policy = QKClip(layers=layers, max_logits=lambda: _max_logits(run, places), tau=tau)
        live = Live(run.workload.model, run.workload.optimizer, _rows_first(run.workload.model))

        @torch.no_grad()
        def clip(step: int) -> None:
            policy.after_step(Seen(step, step, math.nan, math.nan, math.nan, math.nan, {}, None, ()), live)

        run.after_step.append(clip)

    def _found(self, run: Run) -> tuple[Mapping[str, Sequence[float]], tuple[Attention, ...]]:
        """Largest logits by place, and the layers."""
        model = run.workload.model
        places = [layer.place for layer in self.layers] or list(modules_of(model, "attention"))
        tops = _max_logits(run, places)
        layers = self.layers or tuple(
            layer for place, top in tops.items() for layer in _layers(model, place, heads=len(top))
        )
        if not all(math.isfinite(top) for heads in tops.values() for top in heads):
            raise ValueError("attention logits are not finite at the snapshot")
        return tops, layers


def _max_logits(run: Run, places: Sequence[str]) -> Mapping[str, Sequence[float]]:
    """By place [H], of the first micro-batch of the step."""
    batch = first_part(run)
    return probed(run.workload.model, lambda: run.loss(run.workload.model, batch), places)()


def _layers(model: nn.Module, place: str, *, heads: int) -> list[Attention]:
    """The weights and biases that make queries and keys of one attention module. Raises ValueError where none do."""
    rows = {name: p for name, p in _rows_first(model).items() if name.startswith(f"{place}.")}
    named = {(m["path"], m["layer"], m["kind"]): m[0] for m in map(_PARTS.fullmatch, rows) if m is not None}
    found: list[Attention] = []
    for (path, layer, kind), name in named.items():
        num_rows = rows[name].shape[0]
        for pattern, count in FUSED.items():
            if _is_named(layer, pattern) and num_rows % (count * heads) == 0:
                width = num_rows // count // heads
                found.append(
                    grouped(place, query=name, key=name, heads=heads, key_heads=heads, width=width, fused=True)
                )
        if _is_named(layer, QUERY) and num_rows % heads == 0:
            width = num_rows // heads
            keys = [other for (p, o, k), other in named.items() if (p, k) == (path, kind) and _is_named(o, KEY)]
            found += [
                grouped(place, query=name, key=key, heads=heads, key_heads=rows[key].shape[0] // width, width=width)
                for key in keys
            ]
    if not found:
        raise ValueError(
            f"{place}: no weight is named as those that make queries and keys are; give QKClipped(layers=...) by hand"
        )
    return found


_PARTS = re.compile(r"(?P<path>(?:.*\.)?)(?P<layer>[^.]+)[._](?P<kind>weight|bias)")


def _is_named(layer: str, pattern: str) -> bool:
    return re.fullmatch(pattern, layer, re.IGNORECASE) is not None


def _rows_first(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by name, with GPT-2's [in, out] weights seen the other way round."""
    found = {plain_name(name): p.detach() for name, p in model.named_parameters()}
    for name, module in model.named_modules():
        if type(module).__name__ == "Conv1D":
            place = plain_name(f"{name}.weight")
            found[place] = found[place].t()
    return found
