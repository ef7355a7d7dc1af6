"""What of a workload no snapshot holds, as a value: before and after a cell, it shows what an edit left behind.

Must not import the runner or an edit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from aftershock.replay.subject import Subject


def footprint(subject: Subject) -> dict[str, Any]:
    """What going back to a snapshot does not put back: the objects, their types, modes, switches and hooks."""
    workload = subject.workload
    found: dict[str, Any] = {
        f"workload.{name}": id(part) if callable(part) else part for name, part in vars(workload).items()
    }
    found["workload.batch"] = found["workload.loss"] = None  # bound methods are made anew at each look
    found |= {"batch": workload.batch, "loss": workload.loss, "training": id(subject.training)}
    found |= {"default dtype": torch.get_default_dtype(), "threads": torch.get_num_threads()}
    found["deterministic"] = torch.are_deterministic_algorithms_enabled()
    for name, module in workload.model.named_modules():
        hooks = [len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks)]
        # A forward pass may change counters and caches by itself: only constants and functions are an edit's alone.
        fixed = {key: vars(module).get(key) for key in vars(type(module)).get("__constants__", ())}
        own = {key: id(value) for key, value in vars(module).items() if callable(value) and not key.startswith("_")}
        found[f"module {name}"] = (id(module), type(module), module.training, hooks, fixed, own)
    for name, p in workload.model.named_parameters(remove_duplicate=False):
        found[f"parameter {name}"] = (id(p), p.dtype, p.requires_grad, p.device, len(p._backward_hooks or ()))
    for i, group in enumerate(workload.optimizer.param_groups):
        found[f"optimizer group {i}"] = [id(p) for p in group["params"]]
    found["optimizer"] = (type(workload.optimizer), sorted(vars(workload.optimizer)), _hooks_of(workload.optimizer))
    return found


def _hooks_of(optimizer: Any) -> list[int]:
    return [len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)]


def check_undone(before: Mapping[str, Any], after: Mapping[str, Any], name: str) -> None:
    """Raises RuntimeError, naming some of it, when the workload is not what it was."""
    left = [part for part in dict.fromkeys([*before, *after]) if before.get(part) != after.get(part)]
    if left:
        raise RuntimeError(
            f"cell {name} left something changed ({', '.join(left[:4])}); its edit must put it back in run.undo"
        )
