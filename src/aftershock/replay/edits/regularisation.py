"""Dropout rates, and z-loss on the logits that enter the workload's cross-entropy.

Legend: N positions, V classes. Must not import other edits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from aftershock.replay.edits.checked import Checked, try_loss
from aftershock.replay.run import Run


@dataclass(frozen=True, kw_only=True)
class Dropout(Checked):
    """The rate p of every dropout module: times `factor`, or set to `value` (the other one is nan); at most 0.9.

    Modules are nn.Dropout and its kin, and the `dropout` of nn.MultiheadAttention. Dropout that a model takes as a
    function with a number of its own is not seen.
    """

    factor: float = math.nan
    value: float = math.nan

    def __post_init__(self) -> None:
        given = [x for x in (self.factor, self.value) if not math.isnan(x)]
        if len(given) != 1 or not 0 <= given[0] < math.inf or self.value >= 1:
            raise ValueError(f"dropout: give a factor from 0 on or a rate in [0, 1), got {self.factor}, {self.value}")

    def check(self, run: Run) -> None:
        dials = _dials(run.workload.model)
        if not dials:
            raise ValueError("the model has no dropout module")
        if all(self._of(getattr(module, name)) == getattr(module, name) for module, name in dials):
            rates = sorted({getattr(module, name) for module, name in dials})
            raise ValueError(f"dropout is {', '.join(f'{rate:g}' for rate in rates)} already")

    def change(self, run: Run) -> None:
        for module, name in _dials(run.workload.model):
            old = getattr(module, name)
            run.undo.append(_setter(module, name, old))
            setattr(module, name, self._of(old))

    def _of(self, old: float) -> float:
        return min(0.9, old * self.factor) if math.isnan(self.value) else self.value


@dataclass(frozen=True, kw_only=True)
class ZLoss(Checked):
    """Adds `coefficient` mean_N(log^2 Z), Z = sum_V exp(logit), to the loss (Chowdhery et al. 2022, section 5).

    The logits are what enters cross_entropy or log_softmax, wherever in the loss or the model that is; positions whose
    target is ignored do not count. Where there are several such calls, each adds its own mean.
    """

    coefficient: float = 1e-4

    def __post_init__(self) -> None:
        if not 0 < self.coefficient < math.inf:
            raise ValueError(f"z-loss: the coefficient is a number above 0, got {self.coefficient}")

    def check(self, run: Run) -> None:
        seen = _Logits()
        try_loss(run, seen)
        if not seen.calls:
            raise ValueError("the loss takes no cross_entropy or log_softmax, so there are no logits for a z-loss")

    def change(self, run: Run) -> None:
        loss = run.loss

        def with_z(model: nn.Module, batch: Any) -> Tensor:
            with _Logits() as seen:
                value = loss(model, batch)
            return value + self.coefficient * sum(map(_mean_square_log_z, seen.calls))

        run.loss = with_z


class Call(NamedTuple):
    """Logits with the classes in axis `dim`; `counted` of the other axes, None for all."""

    logits: Tensor
    dim: int
    counted: Tensor | None


class _Logits(TorchFunctionMode):
    """Keeps what enters the last normalisation."""

    def __init__(self) -> None:
        super().__init__()  # the mode is a torch class that must be initialised
        self.calls: list[Call] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.cross_entropy:
            self.calls.append(_of_cross_entropy(*args, **kwargs))
        elif func in _LOG_SOFTMAXES:
            self.calls.append(_of_log_softmax(args, kwargs))
        return func(*args, **kwargs)


_LOG_SOFTMAXES = (F.log_softmax, torch.log_softmax, Tensor.log_softmax)


def _of_cross_entropy(input: Tensor, target: Tensor, *rest: Any, ignore_index: int = -100, **others: Any) -> Call:
    dim = 1 if input.ndim > 1 else 0
    if target.is_floating_point():
        return Call(input, dim, None)
    ignored = rest[2] if len(rest) > 2 else ignore_index  # (weight, size_average, ignore_index, ..)
    return Call(input, dim, target != ignored)


def _of_log_softmax(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    logits = args[0] if args else kwargs["input"]
    dim = args[1] if len(args) > 1 else kwargs.get("dim", -1)
    return Call(logits, dim if isinstance(dim, int) else -1, None)


def _mean_square_log_z(call: Call) -> Tensor:
    """In float32 at least; 0 where no position counts."""
    logits = call.logits if call.logits.dtype == torch.float64 else call.logits.float()
    square_N = torch.logsumexp(logits, call.dim).square()
    if call.counted is not None:
        square_N = square_N[call.counted]
    return square_N.sum() / max(1, square_N.numel())


def _dials(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where dropout rates stand."""
    found = list[tuple[nn.Module, str]]()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            found.append((module, "p"))
        elif isinstance(module, nn.MultiheadAttention):
            found.append((module, "dropout"))
    return found


def _setter(module: nn.Module, name: str, value: float) -> Callable[[], None]:
    return lambda: setattr(module, name, value)
