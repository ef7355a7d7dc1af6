"""What the state of a training run is: live tensors by name, the plain rest, and how both go back bit for bit.

Names: `model/<parameter>`, `buffer/<buffer>`, `optimizer/<parameter>/<key>`, `group/<index>/<setting>`, then
`scheduler/..`, `scaler/..`, `extra/<name>/..`, `module/<name>/..`, `rng/..`. Gradients are not state: clear them.
Sharded tensors (DTensor) count with their local piece; nothing here talks to other ranks.
Must not import the recorder: it takes no copies itself.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from aftershock.guard.tree import fits, join, split, write
from aftershock.signals.places import plain_name
from aftershock.signals.ranks import local


@runtime_checkable
class Stateful(Protocol):
    """Anything that gives its state and takes it back: an EMA, a loader, a sampler, a second optimizer."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


class Kept(NamedTuple):
    """Where a snapshot stands: accepted optimizer steps so far, and the id of the batch that came with them."""

    step: int
    batch_id: int


class StepRow(NamedTuple):
    """One line of the recorder's log. A step that was rewound and taken again has two."""

    step: int
    batch_id: int
    loss: float
    grad_norm: float
    lr: float
    update_norm: float = math.nan
    taken: bool = True


class State(NamedTuple):
    """`tensors` by name (live, or copies on the host), and the `plain` rest with a `tree.Ref` for each of them."""

    tensors: dict[str, Tensor]
    plain: dict[str, Any]


class Training:
    """A run's parts, and its state as a value.

    - `params`: every trained or frozen parameter by name, as of the last `read`; a tied one once. A parameter that only
      the optimizer knows is called `optimizer.<group>.<index>`
    - `extra`: whatever else must go back: EMA, loader. Their `load_state_dict` decides whether that is in place

    Raises ValueError for a part without `state_dict` and `load_state_dict`.

    Example:
        training = Training(model, optimizer, scheduler=scheduler, extra={"ema": ema})
        state = training.read()  # live tensors: copy what should last
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        scheduler: LRScheduler | Stateful | None = None,
        scaler: GradScaler | None = None,
        extra: Mapping[str, Stateful] | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.scaler = scaler
        self.extra = dict(extra or {})
        parts = {"scheduler": scheduler, "scaler": scaler, **{f"extra[{k!r}]": v for k, v in self.extra.items()}}
        for name, part in parts.items():
            if part is not None and not isinstance(part, Stateful):
                raise ValueError(
                    f"{name} is a {type(part).__name__} without state_dict and load_state_dict; "
                    "give it both or leave it out"
                )
        self.params = self._parameters()

    def read(self) -> State:
        """The state now: tensors still live, the rest copied. Cost: no tensor is copied and no device waited for,
        except that an enabled GradScaler reads its scale."""
        tensors: dict[str, Tensor] = {}
        plain = {room: split(part, room, tensors) for room, part in self._parts().items()}
        plain["optimizer"] = {
            name: split(state, f"optimizer/{name}", tensors, like=self.params.get(name))
            for name, state in self._optimizer_state().items()
        }
        return State(tensors, plain)

    def restore(self, state: State, *, rng: bool) -> None:
        """Make the run what it was when `state` was read, bit for bit; with `rng` also its random numbers.

        Parameters, buffers and existing optimizer tensors are written in place, so DDP buckets, hooks and fused kernels
        stay valid. Optimizer state that was not there then is removed. Buffers made since are left alone.
        Raises ValueError, with nothing changed, when the run has other parameters, groups or parts than it had then.
        """
        self.check(state, rng=rng)
        plain, held = state.plain, state.tensors
        for name, ref in plain["model"].items():
            write(local(self.params[name]), held[ref.name])
        self._restore_buffers(plain["buffer"], held)
        for name, module in _with_extra_state(self.model).items():
            module.set_extra_state(join(plain["module"][name], held))
        self._restore_optimizer(plain["optimizer"], held)
        for room, part in self._stateful().items():
            name, _, key = room.partition("/")
            kept = plain[name][key] if key else plain[name]
            part.load_state_dict(join(kept, held, live=None))
        for group, kept in zip(self.optimizer.param_groups, plain["group"], strict=True):
            _refill(group, join(kept, held, live=group), keep="params")  # last: schedulers write rates too
        if rng:
            _set_rng(join(plain["rng"], held))

    def restore_rng(self, state: State) -> None:
        """The random numbers alone."""
        _set_rng(join(state.plain["rng"], state.tensors))

    def check(self, state: State, *, rng: bool) -> None:
        """Raises ValueError, in a sentence, where `restore` would; changes nothing."""
        self.params = self._parameters()
        plain, held = state.plain, state.tensors
        faults = _differences("parameter", plain["model"], self.params)
        if not faults:
            faults = [
                f"parameter {name} is {tuple(local(now).shape)} {now.dtype} here, was {tuple(then.shape)} {then.dtype}"
                for name, now in self.params.items()
                if not fits(now, then := held[plain["model"][name].name])
            ]
        must = plain["buffer"].keys() - set(plain["passing"])
        faults += [f"buffer {name} is missing here" for name in sorted(must - self._buffers().keys())]
        faults += _differences("module with extra state", plain["module"], _with_extra_state(self.model))
        faults += _differences("extra", plain["extra"], self.extra)
        names = {id(parameter): name for name, parameter in self.params.items()}
        now = [[names[id(p)] for p in group["params"]] for group in self.optimizer.param_groups]
        if now != [group["params"] for group in plain["group"]]:
            faults.append(
                f"the optimizer has {len(now)} groups here, of other parameters than the {len(plain['group'])} then"
            )
        for part, there in (("scheduler", self.scheduler), ("scaler", self.scaler)):
            if (there is None) != (plain[part] is None):
                faults.append(f"there {'is no' if there is None else 'was no'} {part}")
        devices = len(plain["rng"]["cuda"])
        if rng and devices != _cuda_devices():
            faults.append(
                f"random numbers of {devices} CUDA devices were kept and {_cuda_devices()} are here (rng=False)"
            )
        if faults:
            more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
            raise ValueError(f"this snapshot is of another run: {'; '.join(faults[:3])}{more}")

    def is_finite(self) -> bool:
        """Whether no parameter and no floating optimizer state is NaN or infinite, and no buffer NaN (masks hold -inf).

        Only what lies on this rank is looked at. Cost: one pass, about 0.5 ns an element on one CPU thread; a GPU
        is waited for.
        """
        optimized = dict[str, Tensor]()
        split(list(self._optimizer_state().values()), "", optimized)
        wanted = [local(p) for p in self.params.values()] + list(optimized.values())
        return all_finite(wanted) and all_finite([local(b) for b in self.model.buffers()], infinite_too=False)

    def _parts(self) -> dict[str, Any]:
        """The live state by room, all but the optimizer's."""
        self.params = self._parameters()
        names = {id(parameter): name for name, parameter in self.params.items()}
        scheduler, scaler = self.scheduler, self.scaler
        return {
            "model": dict(self.params),
            "buffer": self._buffers(),
            "passing": _passing_buffers(self.model),
            "module": {name: m.get_extra_state() for name, m in _with_extra_state(self.model).items()},
            "group": [
                {k: [names[id(p)] for p in v] if k == "params" else v for k, v in group.items()}
                for group in self.optimizer.param_groups
            ],
            "scheduler": None if scheduler is None else scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "extra": {name: part.state_dict() for name, part in self.extra.items()},
            "rng": _get_rng(),
        }

    def _parameters(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            plain = plain_name(name)
            found[plain if plain not in found else name] = parameter
        known = {id(parameter) for parameter in found.values()}
        for g, group in enumerate(self.optimizer.param_groups):
            for i, parameter in enumerate(group["params"]):
                if id(parameter) not in known:
                    found[f"optimizer.{g}.{i}"] = parameter
        return found

    def _buffers(self) -> dict[str, Tensor]:
        return {plain_name(name): buffer for name, buffer in self.model.named_buffers()}

    def _stateful(self) -> dict[str, Stateful]:
        """The parts that restore themselves, by their place in the plain rest."""
        parts: dict[str, Stateful | None] = {"scheduler": self.scheduler, "scaler": self.scaler}
        parts |= {f"extra/{name}": part for name, part in self.extra.items()}
        return {room: part for room, part in parts.items() if part is not None}

    def _optimizer_keys(self) -> dict[str, Any]:
        """The keys of `optimizer.state` by name: parameters by theirs, a custom optimizer's own text keys as `*key`."""
        keys: dict[str, Any] = dict(self.params)
        return keys | {f"*{key}": key for key in self.optimizer.state if isinstance(key, str)}

    def _optimizer_state(self) -> dict[str, Any]:
        state = self.optimizer.state
        return {name: state[key] for name, key in self._optimizer_keys().items() if key in state}

    def _restore_optimizer(self, kept: Mapping[str, Any], held: Mapping[str, Tensor]) -> None:
        state = self.optimizer.state
        keys = self._optimizer_keys()
        for name, key in keys.items():
            if name not in kept:
                state.pop(key, None)
        for name, rest in kept.items():
            key = keys.get(name, name[1:])
            live = state.get(key)
            new = join(rest, held, live=live, like=self.params.get(name))
            if isinstance(live, dict):
                _refill(live, new)
            else:
                state[key] = new

    def _restore_buffers(self, kept: Mapping[str, Any], held: Mapping[str, Tensor]) -> None:
        homes = {plain_name(name): name for name, _ in self.model.named_buffers()}
        for name, ref in kept.items():
            if name not in homes:
                continue  # a cache that its module has dropped; `check` lets no other through
            buffer = self.model.get_buffer(homes[name])
            if fits(buffer, held[ref.name]):
                write(local(buffer), held[ref.name])
            else:  # it has grown since: the module gets one of the old size
                path, _, last = homes[name].rpartition(".")
                setattr(self.model.get_submodule(path), last, join(ref, held, like=buffer))


def all_finite(tensors: Iterable[Tensor], *, infinite_too: bool = True) -> bool:
    """Whether every floating or complex element is finite; with `infinite_too=False` whether none is NaN.

    The 2-norm of finite numbers is finite unless it overflows, and a NaN or infinity always shows in it: so one fused
    norm decides, and only where it does not come out finite is each tensor looked at.
    """
    floating = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors]
    floating = [t if t.element_size() > 1 else t.float() for t in floating if t.is_floating_point() and t.numel()]
    if not floating:
        return True
    norm = float(nn.utils.get_total_norm(floating))
    if np.isfinite(norm):
        return True
    sick = (lambda t: not torch.isfinite(t).all()) if infinite_too else (lambda t: torch.isnan(t).any())
    return not any(bool(sick(t)) for t in floating)


def _differences(what: str, then: Iterable[str], now: Iterable[str]) -> list[str]:
    before, here = set(then), set(now)
    lost = [f"{what} {name} is missing here" for name in sorted(before - here)]
    return lost + [f"{what} {name} is new here" for name in sorted(here - before)]


def _refill(live: dict, new: dict, *, keep: str | None = None) -> None:
    """`live` holds what `new` does, and is still the same dict."""
    for key in [key for key in live if key not in new]:
        del live[key]
    live.update((key, value) for key, value in new.items() if key != keep)


def _with_extra_state(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that keep state beside tensors (fp8 scales and the like), by name."""
    own = nn.Module.get_extra_state
    return {plain_name(name): m for name, m in model.named_modules() if type(m).get_extra_state is not own}


def _passing_buffers(model: nn.Module) -> list[str]:
    """Names of buffers that checkpoints leave out (caches): they may be absent when a snapshot comes back."""
    return [
        plain_name(f"{prefix}.{name}" if prefix else name)
        for prefix, module in model.named_modules()
        for name in sorted(module._non_persistent_buffers_set)
    ]


def _cuda_devices() -> int:
    """Devices whose random numbers count: none before the process first uses CUDA."""
    return torch.cuda.device_count() if torch.cuda.is_initialized() else 0


def _get_rng() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    return {
        "python": {"version": version, "words": np.array(words, dtype=np.uint32), "gauss": gauss},
        "numpy": np.random.get_state(legacy=False),  # noqa: NPY002 - the user's code may draw from it
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(device) for device in range(_cuda_devices())],
    }


def _set_rng(rng: Mapping[str, Any]) -> None:
    python = rng["python"]
    random.setstate((python["version"], tuple(int(word) for word in python["words"]), python["gauss"]))
    np.random.set_state(rng["numpy"])  # noqa: NPY002 - see above
    torch.set_rng_state(rng["torch"])
    for device, state in enumerate(rng["cuda"]):
        torch.cuda.set_rng_state(state, device)
