"""Snapshots of tensors as safetensors files: `snapshots/step-<step>.safetensors`, written whole or not at all.

torch and safetensors are imported where they are used.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from aftershock.store.folder import ENV, SCHEMA, SNAPSHOTS, replacing

if TYPE_CHECKING:
    import torch


def snapshot_name(step: int) -> str:
    """The file name of one step's snapshot."""
    return f"step-{step}.safetensors"


def snapshot_steps(names: Iterable[str]) -> list[int]:
    """Steps of the snapshots among file names, ascending."""
    stems = (n.removeprefix("step-").removesuffix(".safetensors") for n in names if n.endswith(".safetensors"))
    return sorted(int(stem) for stem in stems if stem.isdecimal())


def save_snapshot(run_folder: Path, *, step: int, segment: int, tensors: Mapping[str, torch.Tensor], keep: int) -> None:
    """Write one, then drop those of later steps (a branch that was rewound) and all but the latest `keep`."""
    from safetensors.torch import save_file

    folder = run_folder / SNAPSHOTS
    meta = {"schema": str(SCHEMA), "step": str(step), "segment": str(segment)}
    with replacing(folder / snapshot_name(step)) as tmp:
        try:
            save_file(_owned(tensors), tmp, metadata=meta)
        except Exception as error:
            raise as_os_error(error) from error
        shutil.copymode(run_folder / ENV, tmp)  # safetensors makes it readable by its owner only
    steps = snapshot_steps(p.name for p in folder.iterdir())
    for old in [s for s in steps if s > step] + [s for s in steps if s <= step][:-keep]:
        (folder / snapshot_name(old)).unlink(missing_ok=True)


def load_snapshot(data: bytes) -> dict[str, torch.Tensor]:
    """Tensors on the CPU."""
    from safetensors.torch import load

    return load(data)


def as_os_error(error: Exception) -> Exception:
    """safetensors reports the operating system's errors in words only: "... (os error 28)"."""
    code = str(error).partition("os error ")[2].partition(")")[0]
    return OSError(int(code), str(error)) if code.isdecimal() else error


def _owned(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous CPU tensors that share no storage: safetensors refuses views."""
    import torch

    owned: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        flat = tensor.detach().to("cpu").contiguous()
        storage = flat.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != flat.numel() * flat.element_size():
            flat = flat.clone(memory_format=torch.contiguous_format)
        seen.add(flat.untyped_storage().data_ptr())
        owned[name] = flat
    return owned
