"""Digests of a run's state, small enough to go with every checkpoint, telling enough to name what was not restored.

Checksums are crc32 of the bits: made to notice what was forgotten, not to withstand anybody.
Must not import the guard, the recorder or a policy.
"""

from __future__ import annotations

import hashlib
import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from aftershock.guard.batchfile import pack
from aftershock.guard.state import Training
from aftershock.guard.tree import Ref
from aftershock.signals.ranks import local
from aftershock.store import folder as fs

BATCH_BYTES = 65_536
"""Bytes of each tensor of a batch that are hashed: enough to tell batches apart, cheap for images."""
NAMED = 3
"""Names in a finding's evidence."""

Room = Literal[
    "weights", "optimizer", "settings_from_config", "settings_from_checkpoint", "scheduler", "scaler", "extra", "rng"
]

_SETTINGS_OF_SCHEDULE = ("lr", "initial_lr", "max_lr", "min_lr", "momentum_schedule")


class StateDigest(NamedTuple):
    """The state in short: `tensors` a crc32 by name, `plain` all other leaves as text by name, `groups` the
    optimizer's settings, `defaults` those its constructor was given."""

    tensors: dict[str, int]
    plain: dict[str, str]
    groups: list[dict[str, Any]]
    defaults: dict[str, Any]


class Fault(NamedTuple):
    """What of the state is not as it was, and what shows it."""

    what: Room
    evidence: str


def of_state(training: Training) -> StateDigest:
    """One pass over the state; on a GPU each tensor is copied to the host once."""
    state = training.read()
    tensors = {name: checksum(tensor) for name, tensor in state.tensors.items() if not name.startswith("group/")}
    rooms = ((room, part) for room, part in state.plain.items() if room not in ("model", "buffer", "group"))
    plain = {name: text for room, part in rooms for name, text in _leaves(part, room)}
    groups = [_settings(group) for group in training.optimizer.param_groups]
    return StateDigest(tensors, plain, groups, _settings(training.optimizer.defaults))


def of_rng() -> str:
    """A digest of the random numbers of python, numpy, torch and all CUDA devices in use, as they stand."""
    state = hashlib.blake2b(digest_size=8)
    _, words, gauss = random.getstate()
    state.update(np.array(words, dtype=np.uint32).tobytes() + repr(gauss).encode())
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002 - the user's code may draw from it
    state.update(repr([(k, v) for k, v in numpy.items() if k != "state"]).encode())
    state.update(np.asarray(numpy["state"]["key"]).tobytes() + str(numpy["state"]["pos"]).encode())
    state.update(torch.get_rng_state().numpy().tobytes())
    if torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            state.update(torch.cuda.get_rng_state(device).numpy().tobytes())
    return state.hexdigest()


def of_batch(batch: Any) -> str:
    """A digest of a batch: its shape as a tree, and of each host tensor shape, dtype and the first bytes."""
    packed = pack(batch, "batch")
    state = hashlib.blake2b(repr(packed.tree).encode(), digest_size=8)
    for name, tensor in packed.tensors.items():
        state.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
        if tensor.device.type == "cpu":
            count = max(1, BATCH_BYTES // tensor.element_size())
            state.update(_bytes(tensor.detach().flatten()[:count]))
    return state.hexdigest()


def rates(training: Training) -> tuple[float, ...]:
    """The learning rate of each group now. A rate kept as a tensor on a device is waited for."""
    return tuple(float(group["lr"]) for group in training.optimizer.param_groups if "lr" in group)


def checksum(tensor: torch.Tensor) -> int:
    """crc32 of the bits."""
    return zlib.crc32(_bytes(local(tensor).detach().cpu()))


def faults(then: StateDigest, now: StateDigest) -> list[Fault]:
    """What differs, by room; nothing for equal states. Raises ValueError when they are of different models."""
    if _of(then.tensors, "model/").keys() != _of(now.tensors, "model/").keys():
        odd = sorted(_of(then.tensors, "model/").keys() ^ _of(now.tensors, "model/").keys())
        raise ValueError(
            f"the tail is of another model: {', '.join(odd[:NAMED])} (of {len(odd)}) in one of the two only"
        )
    optimizer = _tensors("optimizer", then, now, ("optimizer/",))
    found = [
        _tensors("weights", then, now, ("model/", "buffer/", "module/")),
        optimizer,
        *_group_faults(then, now),
        _scheduler(then, now, rates_too=optimizer is None),  # they come with the optimizer's state
        _tensors("scaler", then, now, ("scaler",)),
        _tensors("extra", then, now, ("extra/",)),
        _tensors("rng", then, now, ("rng/",)),
    ]
    return [fault for fault in found if fault is not None]


def _tensors(what: Room, then: StateDigest, now: StateDigest, rooms: tuple[str, ...]) -> Fault | None:
    old: dict[str, Any] = {}
    new: dict[str, Any] = {}
    for room in rooms:
        old |= _of(then.tensors, room) | _of(then.plain, room)
        new |= _of(now.tensors, room) | _of(now.plain, room)
    lost = [name for name in old if name not in new]
    extra = [name for name in new if name not in old]
    changed = [name for name in old if name in new and old[name] != new[name]]
    count = max(len(old), len(new))
    texts = [
        f"{len(names)} of {count} {words} ({_some(names)})"
        for names, words in ((lost, "missing"), (changed, "differ"), (extra, "not there when it was saved"))
        if names
    ]
    return Fault(what, "; ".join(texts)) if texts else None


def _group_faults(then: StateDigest, now: StateDigest) -> Iterator[Fault]:
    """Settings that are neither the recorded ones nor the config's: who wrote over whom."""
    if len(then.groups) != len(now.groups):
        text = f"{len(then.groups)} parameter groups recorded, {len(now.groups)} now"
        yield Fault("settings_from_config", text)
        return
    scheduled = any(name.startswith("scheduler/") for name in then.plain)
    new_settings = []
    for i, (old, new) in enumerate(zip(then.groups, now.groups, strict=True)):
        for name in sorted(old.keys() | new.keys()):
            if scheduled and name in _SETTINGS_OF_SCHEDULE:
                continue
            if old.get(name) != new.get(name):
                new_settings.append(f"group {i}: {name} {old.get(name)} recorded, {new.get(name)} now")
    if new_settings:
        yield Fault("settings_from_config", "; ".join(new_settings))
    stale = [
        f"{name} {value} in the config, {[group.get(name) for group in now.groups]} in use, as in the checkpoint"
        for name, value in now.defaults.items()
        if name in then.defaults
        and value != then.defaults[name]
        and all(a.get(name) == b.get(name) for a, b in zip(then.groups, now.groups, strict=True))
    ]
    if stale:
        yield Fault("settings_from_checkpoint", "; ".join(stale))


def _scheduler(then: StateDigest, now: StateDigest, *, rates_too: bool) -> Fault | None:
    old, new = (
        {k: v for k, v in _of(d.plain, "scheduler/").items() if not k.removeprefix("scheduler/").startswith("_")}
        for d in (then, now)
    )
    texts = [
        f"{name.removeprefix('scheduler/')} {old.get(name, 'absent')} recorded, {new.get(name, 'absent')} now"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    ]
    if rates_too and (old or new):
        for i, (a, b) in enumerate(zip(then.groups, now.groups, strict=False)):
            if a.get("lr") != b.get("lr"):
                texts.append(f"group {i}: lr {a.get('lr')} recorded, {b.get('lr')} now")
    return Fault("scheduler", "; ".join(texts[:6])) if texts else None


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON types with NaN and infinities spelled, so that recorded and live ones compare."""
    found: dict[str, Any] = {}
    for name, value in group.items():
        if name == "params":
            continue
        plain = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
        if isinstance(plain, tuple):
            plain = [v.item() if isinstance(v, torch.Tensor) else v for v in plain]
        found[name] = plain if isinstance(plain, (bool, int, float, str, list, type(None))) else repr(plain)
    return fs.plain(found, "settings")


def _leaves(tree: Any, name: str) -> Iterator[tuple[str, str]]:
    """Every leaf but tensors, as text. An object is named by its class only: its address says nothing."""
    if isinstance(tree, Ref):
        return
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{name}/{key}")
    elif isinstance(tree, (list, tuple)):
        for i, value in enumerate(tree):
            yield from _leaves(value, f"{name}/{i}")
    elif tree is None or isinstance(tree, (bool, int, float, complex, str, bytes, torch.dtype, torch.device)):
        yield name, repr(tree)
    else:
        yield name, type(tree).__qualname__


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")


def _of(values: Mapping[str, Any], room: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name.startswith(room)}


def _bytes(tensor: torch.Tensor) -> memoryview:
    flat: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)
