"""Batches of any shape on disk: tensors in one safetensors file, the shape they came in and all else as JSON.

A tree is JSON: {"tensor": name}, {"array": name}, {"value": x}, {"list": [...]}, {"tuple": [...]}, {"dict": {...}},
{"object": "module:Class", "fields": {...}} (NamedTuple, dataclass), {"lost": "Class"} for what cannot be kept.
Must not import the guard, the recorder or a policy.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from aftershock.store.folder import plain, replacing, unspell


class Decoder(Protocol):
    """Any tokenizer."""

    def decode(self, ids: Any) -> str:
        """The text of a list of token ids."""
        ...


class Packed(NamedTuple):
    """A batch as JSON with its tensors beside it, by name."""

    tree: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def pack(batch: Any, name: str) -> Packed:
    """`batch` taken apart; its tensors are called `name`, or `name/0/input_ids` where it holds several."""
    tensors: dict[str, torch.Tensor] = {}
    return Packed(_pack(batch, name, tensors), tensors)


def unpack(tree: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Any:
    """The batch that `pack` took apart.

    Raises ValueError when a part could not be kept, or its class is not imported in this process: nothing is imported
    because a file says so.
    """
    ((kind, value), *_) = tree.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "array":
        return tensors[value].numpy()
    if kind == "value":
        return unspell(value)
    if kind in ("list", "tuple"):
        parts = [unpack(part, tensors) for part in value]
        return parts if kind == "list" else tuple(parts)
    if kind == "dict":
        return {key: unpack(part, tensors) for key, part in value.items()}
    if kind == "object":
        made = _class(value)
        return made(**{key: unpack(part, tensors) for key, part in tree["fields"].items()})
    raise ValueError(f"batch part of class {value} could not be kept; take the batch from the data by its id")


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """One safetensors file, whole or not at all. The tensors are host copies already."""
    from safetensors.torch import save

    owned = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    data = save(owned)
    with replacing(path) as tmp:
        tmp.write_bytes(data)


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """What `save_tensors` wrote."""
    from safetensors.torch import load

    return load(path.read_bytes())


def token_rows(batch: Any) -> torch.Tensor | None:
    """Token ids [rows, positions] of a batch: `input_ids`, else its first matrix of integers; None without one."""
    packed = pack(batch, "batch")
    names = sorted(packed.tensors, key=lambda name: (not name.endswith("/input_ids"), list(packed.tensors).index(name)))
    for name in names:
        tensor = packed.tensors[name]
        whole = tensor.dtype in (torch.int64, torch.int32, torch.int16, torch.uint8)
        if whole and tensor.ndim >= 2:
            return tensor.reshape(-1, tensor.shape[-1])
    return None


def texts(
    batch: Any, decoder: Decoder, *, num_tokens: int, losses: Sequence[float] | None = None
) -> list[dict[str, Any]]:
    """Each row's first `num_tokens` tokens as text; with `losses` by row, the worst row first (NaN is worst).

    A row that the tokenizer cannot decode says so in `error`. Empty where the batch holds no token ids.
    """
    rows = token_rows(batch)
    if rows is None:
        return []
    found: list[dict[str, Any]] = []
    for row, ids in enumerate(rows[:, :num_tokens].tolist()):
        entry: dict[str, Any] = {"row": row}
        if losses is not None and row < len(losses):
            entry["loss"] = float(losses[row])
        try:
            entry["text"] = decoder.decode([token for token in ids if token >= 0])
        except Exception as error:  # a foreign tokenizer on data that may be what is broken
            entry["error"] = repr(error)
        found.append(entry)
    if losses is not None:
        found.sort(key=lambda e: -_badness(e.get("loss", -np.inf)))
    return found


def worst_rows(losses: Sequence[float], *, most: int = 8) -> list[dict[str, Any]]:
    """Rows and their losses, the worst first (NaN is worst)."""
    rows = [{"row": row, "loss": float(loss)} for row, loss in enumerate(losses)]
    return sorted(rows, key=lambda r: -_badness(r["loss"]))[:most]


def _badness(loss: float) -> float:
    return float("inf") if loss != loss else loss


def _pack(part: Any, name: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    if isinstance(part, torch.Tensor):
        tensors[name] = part
        return {"tensor": name}
    if isinstance(part, np.ndarray) and part.dtype.kind in "biuf" and part.dtype.isnative:
        tensors[name] = torch.from_numpy(np.ascontiguousarray(part))
        return {"array": name}
    if part is None or isinstance(part, (bool, int, float, str, np.generic)):
        return {"value": plain(part, name)}
    if isinstance(part, Mapping):
        return {"dict": {str(key): _pack(value, f"{name}/{key}", tensors) for key, value in part.items()}}
    fields = _fields(part)
    if fields is not None:
        packed = {key: _pack(value, f"{name}/{key}", tensors) for key, value in fields.items()}
        return {"object": f"{type(part).__module__}:{type(part).__qualname__}", "fields": packed}
    if isinstance(part, (list, tuple)):
        kind = "list" if isinstance(part, list) else "tuple"
        return {kind: [_pack(value, f"{name}/{i}", tensors) for i, value in enumerate(part)]}
    return {"lost": f"{type(part).__module__}.{type(part).__qualname__}"}


def _fields(part: Any) -> dict[str, Any] | None:
    """The fields of a NamedTuple or dataclass, None for anything else."""
    if isinstance(part, tuple) and type(part) is not tuple:
        names = vars(type(part)).get("_fields")
        return None if names is None else dict(zip(names, part, strict=True))
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        return {field.name: getattr(part, field.name) for field in dataclasses.fields(part) if field.init}
    return None


def _class(name: str) -> type:
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type):
        raise ValueError(f"batches are of class {name}, which this process does not know; import {module} first")
    if not (dataclasses.is_dataclass(found) or (issubclass(found, tuple) and "_fields" in vars(found))):
        raise ValueError(f"batches are of class {name}, which is no NamedTuple or dataclass any more")
    return found
