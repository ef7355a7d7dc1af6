"""What a recording depends on besides its state: device, threads, versions, switches, and the user's code and config.

A replay is only as good as these are equal; `differences` says in words what is not.
Must not import the guard, the recorder or a policy.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
import platform
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from aftershock._version import __version__
from aftershock.store.folder import plain
from aftershock.workload import Workload


def surroundings(tensors: Iterable[torch.Tensor]) -> dict[str, Any]:
    """What makes two runs of one code differ in bits, as JSON types; `tensors` tell the devices and dtypes in use."""
    cuda = torch.backends.cuda
    kinds = sorted({(str(tensor.device), str(tensor.dtype)) for tensor in tensors})
    accelerated = any(not device.startswith("cpu") for device, _ in kinds)
    return {
        "aftershock": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "devices": sorted({device for device, _ in kinds}),
        "dtypes": sorted({dtype for _, dtype in kinds}),
        "accelerator": torch.cuda.get_device_name() if accelerated and torch.cuda.is_available() else None,
        "default_dtype": str(torch.get_default_dtype()),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "flash_attention": cuda.flash_sdp_enabled(),
        "efficient_attention": cuda.mem_efficient_sdp_enabled(),
        "cublas_workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        "world_size": _world_size(),
    }


def fingerprint(source: Any, *, config: Any = None) -> dict[str, Any]:
    """The user's code as digests by name and the config as it is, to say later what has changed.

    `source`: a `Workload`; a function, class or module; the text of a program; or a mapping of names to these.
    `config`: a mapping of numbers, text, lists and mappings. Raises ValueError where no source can be read.

    >>> fingerprint("x = 1", config={"lr": 0.1})
    {'code': {'text': '8ff436def145'}, 'config': {'lr': 0.1}}
    """
    settings = {} if config is None else plain(config, "config")
    if isinstance(source, Workload):
        return {"code": _workload_code(source), "config": _workload_config(source) | settings}
    parts = source if isinstance(source, Mapping) else {_name(source): source}
    return {"code": {str(name): _digest(part) for name, part in parts.items()}, "config": settings}


def differences(recorded: Mapping[str, Any], now: Mapping[str, Any], *, what: str = "") -> tuple[str, ...]:
    """One phrase for each key that differs, nested ones as `config.lr`: `threads: 2 recorded, 1 now`."""
    found: list[str] = []
    for key in dict.fromkeys([*recorded, *now]):
        name = f"{what}.{key}" if what else str(key)
        old, new = recorded.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, what=name)
        elif plain(old, name) != plain(new, name):
            found.append(f"{name}: {_shown(recorded, key)} recorded, {_shown(now, key)} now")
    return tuple(found)


def _workload_code(workload: Workload) -> dict[str, str]:
    shapes = [(name, tuple(t.shape), str(t.dtype)) for name, t in workload.model.named_parameters()]
    return {
        "model": _digest(type(workload.model)),
        "parameters": _hash(repr(shapes)),
        "batch": _digest(workload.batch),
        "loss": _digest(workload.loss),
        "optimizer": _name(type(workload.optimizer)),
        "scheduler": _name(type(workload.scheduler)),
    }


def _workload_config(workload: Workload) -> dict[str, Any]:
    defaults = {k: v for k, v in workload.optimizer.defaults.items() if not isinstance(v, torch.Tensor)}
    own = {"clip_norm": workload.clip_norm, "accumulate": workload.accumulate}
    return plain({"optimizer": defaults, **own}, "workload")


def _digest(part: Any) -> str:
    if isinstance(part, str):
        return _hash(part)
    if isinstance(part, functools.partial):
        return _hash(_digest(part.func) + repr(part.args) + repr(sorted(part.keywords.items())))
    if inspect.isbuiltin(part):
        return f"{_name(part)} of torch {torch.__version__}"
    target = part if _has_source(part) else type(part)
    try:
        return _hash(inspect.getsource(target))
    except (OSError, TypeError):
        raise ValueError(
            f"fingerprint: no source can be read for {_name(part)}; define it in a file, or give its text"
        ) from None


def _has_source(part: Any) -> bool:
    return inspect.isclass(part) or inspect.ismodule(part) or inspect.isroutine(part)


def _name(part: Callable[..., Any] | Any) -> str:
    if isinstance(part, str):
        return "text"
    if inspect.ismodule(part):
        return part.__name__
    named = part if _has_source(part) else type(part)
    return f"{named.__module__}.{named.__qualname__}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _shown(values: Mapping[str, Any], key: str) -> str:
    return str(values[key]) if key in values else "absent"


def _world_size() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
