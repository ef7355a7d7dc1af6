"""Every operation in a wider floating type than the program asks for, by a mode that sees each call of torch.

Arguments that are narrower are widened before the call, casts to narrower types are not carried out, and autocast is
off. What is widened is cast back for the gradient by autograd. Must not import any edit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

LOSSES: frozenset[Callable[..., Any]] = frozenset(
    {
        F.binary_cross_entropy,
        F.binary_cross_entropy_with_logits,
        F.cross_entropy,
        F.gaussian_nll_loss,
        F.huber_loss,
        F.kl_div,
        F.l1_loss,
        F.log_softmax,
        F.mse_loss,
        F.nll_loss,
        F.smooth_l1_loss,
        Tensor.log_softmax,
        Tensor.logsumexp,
        torch.log_softmax,
        torch.logsumexp,
    }
)
"""What counts as part of the loss where a model computes it inside."""

_NARROWING = frozenset({Tensor.half, Tensor.bfloat16, Tensor.float})
_LEFT_ALONE = frozenset({"__get__", "__set__", "__setitem__", "backward", "register_hook", "retain_grad"})
"""Attributes, and what must reach the tensor itself and not a copy of it."""


class Wide(TorchFunctionMode):
    """Inside, torch computes in `dtype` at least. While it is `paused`, only the functions of `LOSSES` do.

    `count` is how many arguments, casts and autocasts it found that were narrower; with `dry` it changes nothing.
    """

    def __init__(self, dtype: torch.dtype, *, dry: bool = False) -> None:
        super().__init__()  # the mode is a torch class that must be initialised
        self.dtype = dtype
        self.dry = dry
        self.paused = False
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (self.paused and func not in LOSSES) or _is_left_alone(func):
            return func(*args, **kwargs)
        if func in _NARROWING and args[0].is_floating_point():
            kind = {Tensor.half: torch.float16, Tensor.bfloat16: torch.bfloat16, Tensor.float: torch.float32}[func]
            func, args = Tensor.to, (args[0], kind)
        wide_args, wide_kwargs = tree_map(self._wide, (args, kwargs))
        autocast = _autocast(args)
        if self.dry:
            output = func(*args, **kwargs)
            if autocast is not None:
                tree_map(self._wide, output)  # what autocast has made of wider arguments
            return output
        if autocast is None:
            return func(*wide_args, **wide_kwargs)
        with torch.autocast(autocast, enabled=False):
            return func(*wide_args, **wide_kwargs)

    def _wide(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and self._narrower(leaf.dtype):
            self.count += 1
            return leaf.to(self.dtype)
        if isinstance(leaf, torch.dtype) and self._narrower(leaf):
            self.count += 1
            return self.dtype
        return leaf

    def _narrower(self, dtype: torch.dtype) -> bool:
        return dtype.is_floating_point and dtype.itemsize < self.dtype.itemsize


def _is_left_alone(func: Any) -> bool:
    """Attributes, and what writes into its tensor: x.add_(y), x += y."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in _LEFT_ALONE or (name.startswith("__i") and name not in ("__index__", "__invert__"))


def _autocast(args: tuple[Any, ...]) -> str | None:
    """The kind of device on which autocast is on for these arguments."""
    device = next((leaf.device.type for leaf in args if isinstance(leaf, Tensor)), None)
    return device if device is not None and torch.is_autocast_enabled(device) else None
