"""Max attention logit and entropy per head, through a probe batch, whatever attention kernel the model uses.

Legend: B batch, H heads, T queries, S keys.
A fused kernel never shows its scores. During the probe, scaled_dot_product_attention is sent to its plain form, and
every softmax inside a named attention module is seen where all of them end: at the dispatcher. So eager code, SDPA,
nn.MultiheadAttention and Hugging Face models all read the same. It does not see flash_attn, xformers or FlexAttention:
these take their softmax where no dispatcher is; switch the model to SDPA or eager for the probe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from aftershock.signals.places import module_places
from aftershock.signals.untouched import untouched

SOFTMAXES = (torch.ops.aten._softmax.default, torch.ops.aten._safe_softmax.default)


class ProbeReading(NamedTuple):
    """Signals by name, and their values [N] on the device they were made on: push them through a `LateReader`, or
    call `read()`."""

    names: list[str]
    values: Tensor

    def read(self) -> dict[str, float]:
        """By name, on the host; waits for a GPU."""
        return dict(zip(self.names, self.values.tolist(), strict=True))


@torch.no_grad()
def probe_attention(model: nn.Module, run: Callable[[], Any], places: str | Sequence[str]) -> ProbeReading:
    """Run `run()`, a forward pass of `model` on a few sequences, and read the attention of the modules at `places`.

    `attn/<place>.head<h>/max_logit`: largest score that enters the softmax of head h (scaled, soft-capped, biased and
    masked as the model does it), over batch, queries and keys; `.../entropy`: mean over batch and queries of
    -sum_s p log p, nats. `attn/<place>/max_logit` and `/entropy`: the maximum, the mean over heads. A query with no key
    left is not counted. Scores of shape [..., H, T, S] have heads; [G, T, S] only has them in nn.MultiheadAttention.

    The model runs in eval mode without gradients and is left as it was, to the bit. With sharded parameters every rank
    must call it. Cost: one forward pass with B H T S scores per layer in memory, four passes over them; meant for 1 or
    2 sequences every 10 to 50 steps. Raises ValueError when a place has run no softmax.

    Example:
        reading = probe_attention(model, lambda: model(tokens_BT[:2]), "blocks.*.attn").read()
    """
    modules = module_places(model, places)
    seen = _Seen(modules)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    handles = []
    try:
        # Fused inference kernels of nn.TransformerEncoderLayer would take the softmax inside.
        torch.backends.mha.set_fastpath_enabled(False)
        for place, module in modules.items():
            handles.append(module.register_forward_pre_hook(seen.enter(place)))
            handles.append(module.register_forward_hook(seen.leave, always_call=True))
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with untouched(model, evaluate=True), sdpa_kernel(SDPBackend.MATH), seen:
            run()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for handle in handles:
            handle.remove()
    return seen.reading()


class _Seen(TorchDispatchMode):
    """Every softmax over the last axis, booked on the innermost named module that is running."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        super().__init__()  # the mode is a torch class that must be initialised
        self._modules = modules
        self._running: list[str] = []
        self._found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {place: [] for place in modules}

    def enter(self, place: str) -> Callable[..., None]:
        return lambda *_: self._running.append(place)

    def leave(self, *_: Any) -> None:
        self._running.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._running and func in SOFTMAXES:
            scores, dim = args[0], args[1]
            if scores.ndim >= 3 and dim in (-1, scores.ndim - 1) and scores.shape[-1] and scores.numel():
                self._found[self._running[-1]].append(self._per_head(scores, out))
        return out

    def _per_head(self, scores: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maximum [H], summed entropy [H] and counted queries [H] of one softmax."""
        module = self._modules[self._running[-1]]
        if scores.ndim == 3:
            heads = module.num_heads if isinstance(module, nn.MultiheadAttention) else 1
            scores, weights = (x.reshape(-1, heads, *x.shape[1:]) for x in (scores, weights))
        top = scores.amax(-1).movedim(-2, 0).flatten(1).double()
        # -inf, or what models use for it: the lowest number of the dtype, sometimes with a score added.
        lowest = torch.finfo(scores.dtype).min / 2
        counted = top > lowest
        entropy = torch.special.entr(weights.double()).sum(-1).movedim(-2, 0).flatten(1)
        entropy = torch.where(counted | top.isnan(), entropy, 0.0)
        counted = counted | top.isnan()
        return torch.where(counted, top, -torch.inf).amax(1), entropy.sum(1), counted.sum(1)

    def reading(self) -> ProbeReading:
        silent = [place for place, found in self._found.items() if not found]
        if silent:
            raise ValueError(
                f"{', '.join(silent[:5])} ran no softmax over attention scores in the probe; name the modules that do "
                "the attention, and switch flash_attn, xformers or FlexAttention to SDPA or eager for it"
            )
        names, values = [], []
        for place, found in self._found.items():
            top_H = torch.stack([top for top, _, _ in found]).amax(0)
            entropy_H = sum(part for _, part, _ in found) / sum(count for _, _, count in found)
            assert isinstance(entropy_H, Tensor)
            if len(top_H) > 1:
                for stat, value_H in (("max_logit", top_H), ("entropy", entropy_H)):
                    names += [f"attn/{place}.head{h}/{stat}" for h in range(len(value_H))]
                    values.append(value_H)
            names += [f"attn/{place}/max_logit", f"attn/{place}/entropy"]
            values.append(torch.stack([top_H.amax(), entropy_H.mean()]))
        device = values[0].device
        return ProbeReading(names, torch.cat([value.to(device) for value in values]))
