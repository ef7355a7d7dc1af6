"""Wider arithmetic: in everything, or only in attention, in the norms, or in the loss.

Must not import other edits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from aftershock.replay.edits.checked import Checked, try_loss
from aftershock.replay.edits.places import modules_of
from aftershock.replay.edits.wide import Wide
from aftershock.replay.run import Run
from aftershock.signals.ranks import is_sharded

Where = Literal["attention", "norms", "loss"]


@dataclass(frozen=True, kw_only=True)
class Everything(Checked):
    """Weights, buffers, the optimizer's state, inputs, and every operation of loss and backward in `dtype` at least.

    Casts to narrower types inside the loss, in hooks on gradients too, are not carried out, and autocast is off.
    Values start as they were recorded; random numbers are drawn as before (dropout masks are the same).
    """

    dtype: torch.dtype = torch.float64

    def check(self, run: Run) -> None:
        if any(is_sharded(p) for p in run.training.params.values()):
            raise ValueError("sharded parameters cannot change their type in the middle of a run")
        dry = Wide(self.dtype, dry=True)
        if not any(_narrower(p, self.dtype) for p in run.training.params.values()):
            try_loss(run, dry)
            if not dry.count:
                raise ValueError(f"everything is {_name(self.dtype)} or wider already")

    def change(self, run: Run) -> None:
        model, dtype = run.workload.model, self.dtype

        def widen(leaf: Any) -> Any:
            return leaf.to(dtype) if isinstance(leaf, Tensor) and _narrower(leaf, dtype) else leaf

        def widen_inputs(_: nn.Module, args: Any, kwargs: Any) -> Any:
            return tree_map(widen, (args, kwargs))

        _widen_state(run, widen)
        run.undo.append(model.register_forward_pre_hook(widen_inputs, with_kwargs=True).remove)
        _wide_from_loss_to_backward(run, Wide(dtype))


@dataclass(frozen=True, kw_only=True)
class WideParts(Checked):
    """The operations of one kind in `dtype`: their inputs and weights are cast up, and what comes out back.

    "attention" and "norms" are modules whose class has such a name; what leaves them has the type it had before.
    "loss" is all that the workload's loss does with what comes out of the model, what it does to gradients in hooks,
    and cross-entropies (`wide.LOSSES`) inside of the model. Weights and optimizer stay as they are.

    Example:
        WideParts(where="loss", dtype=torch.float64)
    """

    where: Where
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.where not in ("attention", "norms", "loss"):
            raise ValueError(f"precision: where is attention, norms or loss, got {self.where!r}")

    def check(self, run: Run) -> None:
        dry = Wide(self.dtype, dry=True)
        if self.where == "loss":
            with _outside(run.workload.model, dry):
                try_loss(run, dry)
        else:
            self._try_modules(run, dry)
        if not dry.count:
            raise ValueError(f"nothing in its {self.where} is narrower than {_name(self.dtype)}")

    def change(self, run: Run) -> None:
        if self.where == "loss":
            wide, inside = Wide(self.dtype), contextlib.ExitStack()
            run.undo.append(inside.close)
            inside.enter_context(_outside(run.workload.model, wide))
            _wide_from_loss_to_backward(run, wide)
            return
        native = self._try_modules(run, Wide(self.dtype, dry=True))
        for module, dtype in native.items():
            run.undo += [handle.remove for handle in _wide_module(module, self.dtype, dtype)]

    def _try_modules(self, run: Run, dry: Wide) -> dict[nn.Module, torch.dtype]:
        """What type leaves each of the modules now; `dry` has seen their operations."""
        assert self.where != "loss"
        found: dict[nn.Module, torch.dtype] = {}

        def leave(module: nn.Module, _: Any, output: Any) -> None:
            dry.__exit__(None, None, None)
            floats = [leaf.dtype for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and _floats(leaf)]
            if floats:
                found[module] = floats[0]

        handles: list[Any] = []
        try:
            for module in modules_of(run.workload.model, self.where).values():
                handles.append(module.register_forward_pre_hook(lambda *_: _enter(dry)))
                handles.append(module.register_forward_hook(leave))
            try_loss(run, contextlib.nullcontext())
        finally:
            for handle in handles:
                handle.remove()
        return found


def _wide_from_loss_to_backward(run: Run, wide: Wide) -> None:
    """The mode is on from the start of the loss to the end of backward, where hooks on gradients run."""
    loss, on = run.loss, contextlib.ExitStack()
    active: list[bool] = []

    def stop(*_: Any) -> None:
        on.close()
        active.clear()

    def widened(model: nn.Module, batch: Any) -> Tensor:
        if not active:
            on.enter_context(wide)
            active.append(True)
        return loss(model, batch)

    run.loss = widened
    run.after_backward.insert(0, stop)
    run.undo.append(stop)


@contextlib.contextmanager
def _outside(model: nn.Module, wide: Wide) -> Iterator[None]:
    """Pauses the mode until the model has run, and while it does; what was widened for it is made narrow again."""
    own = max((p.dtype for p in model.parameters() if p.is_floating_point()), key=lambda d: d.itemsize, default=None)

    def narrow(leaf: Any) -> Any:
        if own is None or not isinstance(leaf, Tensor) or not _floats(leaf) or leaf.dtype.itemsize <= own.itemsize:
            return leaf
        return leaf.to(own)

    def pause(_: nn.Module, args: Any, kwargs: Any) -> Any:
        wide.paused = True
        return None if wide.dry else tree_map(narrow, (args, kwargs))

    def go_on(*_: Any) -> None:
        wide.paused = False

    handles = [
        model.register_forward_pre_hook(pause, with_kwargs=True),
        model.register_forward_hook(go_on, always_call=True),
    ]
    wide.paused = True
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _wide_module(module: nn.Module, dtype: torch.dtype, native: torch.dtype) -> list[Any]:
    """Hooks that let a module run in `dtype` and give `native` out."""
    open_modes: list[Wide] = []

    def enter(*_: Any) -> None:
        open_modes.append(Wide(dtype))
        _enter(open_modes[-1])

    def leave(_: nn.Module, __: Any, output: Any) -> Any:
        if open_modes:
            open_modes.pop().__exit__(None, None, None)
        return tree_map(lambda leaf: leaf.to(native) if isinstance(leaf, Tensor) and _floats(leaf) else leaf, output)

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]


def _enter(mode: Wide) -> None:
    mode.__enter__()


def _widen_state(run: Run, widen: Callable[[Any], Any]) -> None:
    """Parameters (the same objects), buffers and the optimizer's tensors, with what puts the old memory back."""
    params, buffers = list(run.training.params.values()), list[tuple[nn.Module, str, Tensor]]()
    for module in run.workload.model.modules():
        buffers += [(module, name, buffer) for name, buffer in module._buffers.items() if buffer is not None]
    moments = [
        (state, key, value)
        for p in params
        for state in [run.workload.optimizer.state.get(p, {})]
        for key, value in state.items()
        if isinstance(value, Tensor) and value.shape == p.shape and key != "step"
    ]
    data = [p.data for p in params]

    def narrow() -> None:
        for p, old in zip(params, data, strict=True):
            p.grad = None
            p.data = old
        for module, name, old in buffers:
            module._buffers[name] = old
        for state, key, old in moments:
            state[key] = old

    run.undo.append(narrow)
    for p in params:
        p.data = widen(p.data)
    for module, name, old in buffers:
        module._buffers[name] = widen(old)
    for state, key, old in moments:
        state[key] = widen(old)


def _narrower(tensor: Tensor, dtype: torch.dtype) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize < dtype.itemsize


def _floats(tensor: Tensor) -> bool:
    return tensor.is_floating_point()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "float64": torch.float64}
