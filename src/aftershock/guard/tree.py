"""Any tree of state in two parts: the tensors by name, and a plain rest that holds a `Ref` where each tensor was.

The rest is made of dicts, lists, tuples and leaves that nothing outside can change; only the tensors are still live.
Must not import models or optimizers: it knows no more of state than its shape.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from aftershock.signals.ranks import is_sharded, local

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_NUMBERS = "biufc"
"""numpy kinds that torch can hold: bool, int, unsigned, float, complex."""


class Piece(NamedTuple):
    """Which part of a DTensor lies here: `size` of the whole, `offset` of the local part, `dims` it is split along.

    `dims` has one entry per axis of the mesh, -1 where that axis only repeats; None means "as its parameter is".
    """

    size: tuple[int, ...]
    offset: tuple[int, ...]
    dims: tuple[int, ...] | None
    dtype: torch.dtype


class Ref(NamedTuple):
    """Stands where a tensor was. `device` is where it lay; `piece` is set for a DTensor; `numpy` for an array."""

    name: str
    device: str
    piece: Piece | None = None
    numpy: bool = False


def split(tree: Any, name: str, into: dict[str, Tensor], *, like: Tensor | None = None) -> Any:
    """`tree` with a `Ref` for each tensor, whose live local piece goes `into` the dict under its path from `name`.

    Leaves that are no tensors are copied. Mappings that are not dicts come back as dicts. `like` is the parameter
    this state belongs to. Raises ValueError for a sparse tensor and for a leaf that cannot be copied.
    """
    if isinstance(tree, Tensor):
        if tree.layout != torch.strided:
            raise ValueError(f"{name} is a {tree.layout} tensor; a snapshot holds dense ones only: call .to_dense()")
        name = _fresh(name, into)
        into[name] = local(tree)
        return Ref(name, str(tree.device), _piece(tree, like) if is_sharded(tree) else None)
    if isinstance(tree, np.ndarray) and tree.dtype.kind in _NUMBERS:
        name = _fresh(name, into)
        into[name] = torch.from_numpy(tree.astype(tree.dtype.newbyteorder("="), order="C"))
        return Ref(name, "cpu", numpy=True)
    if isinstance(tree, Counter):
        return Counter(tree)
    if isinstance(tree, Mapping):
        return {key: split(value, f"{name}/{key}", into, like=like) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        parts = [split(value, f"{name}/{i}", into, like=like) for i, value in enumerate(tree)]
        if isinstance(tree, list):
            return parts
        return type(tree)(*parts) if is_named_tuple(tree) else tuple(parts)
    if isinstance(tree, _PLAIN):
        return tree
    try:
        return copy.deepcopy(tree)
    except Exception as error:
        raise ValueError(
            f"{name}: a {type(tree).__name__} cannot be copied ({error}); keep it out of the state"
        ) from error


def join(
    rest: Any, held: Mapping[str, Tensor], *, live: Any = None, like: Tensor | None = None, host: bool = False
) -> Any:
    """The tree that `split` took apart, with tensors of its own: nothing in it shares memory with `held`.

    Where `live`, the tree as it is now, holds a fitting tensor at the same place, that one is written and kept. New
    tensors lie where the old ones lay; with `host` on the CPU.
    """
    return _join(rest, held, live, torch.empty(0) if host else like, set())


def refs(rest: Any) -> Iterator[Ref]:
    """Every `Ref` in what `split` gave."""
    if isinstance(rest, Ref):
        yield rest
    elif isinstance(rest, dict):
        for value in rest.values():
            yield from refs(value)
    elif isinstance(rest, (list, tuple)):
        for value in rest:
            yield from refs(value)


def write(target: Tensor, value: Tensor) -> None:
    """Copy `value` into the memory of `target` (local, same shape), which may be expanded."""
    for dim, (size, stride) in enumerate(zip(target.shape, target.stride(), strict=True)):
        if stride == 0 and size > 1:  # copy_ refuses to write one element twice
            target, value = target.narrow(dim, 0, 1), value.narrow(dim, 0, 1)
    with torch.no_grad():
        target.copy_(value)


def fits(target: Any, value: Tensor) -> bool:
    """Whether `value` can be written into `target` as it is: a tensor of the same local shape and dtype."""
    if not isinstance(target, Tensor) or target.layout != torch.strided:
        return False
    piece = local(target)
    return piece.shape == value.shape and piece.dtype == value.dtype


def is_named_tuple(tree: Any) -> bool:
    """Whether `tree` is a namedtuple, which is built from its fields and not from a sequence."""
    return isinstance(tree, tuple) and isinstance(getattr(type(tree), "_fields", None), tuple)


def _join(rest: Any, held: Mapping[str, Tensor], live: Any, like: Tensor | None, used: set[int]) -> Any:
    if isinstance(rest, Ref):
        value = held[rest.name]
        if rest.numpy:
            return value.clone().numpy()
        # Two places that share one tensor now may have had different values then: the second gets its own.
        if fits(live, value) and id(live) not in used:
            used.add(id(live))
            write(local(live), value)
            return live
        return _new(rest, value, live, like)
    if isinstance(rest, Counter):
        return Counter(rest)
    if isinstance(rest, dict):
        now = live if isinstance(live, Mapping) else {}
        return {key: _join(value, held, now.get(key), like, used) for key, value in rest.items()}
    if isinstance(rest, (list, tuple)):
        now = live if isinstance(live, (list, tuple)) else ()
        parts = [_join(v, held, now[i] if i < len(now) else None, like, used) for i, v in enumerate(rest)]
        if isinstance(rest, list):
            return parts
        return type(rest)(*parts) if is_named_tuple(rest) else tuple(parts)
    return rest if isinstance(rest, _PLAIN) else copy.deepcopy(rest)


def _new(ref: Ref, value: Tensor, live: Any, like: Tensor | None) -> Tensor:
    """A tensor for `ref` where there is none: on its parameter's device, but scalars that lay on the CPU stay there."""
    counter = value.ndim == 0 and ref.device == "cpu"
    near = live if isinstance(live, Tensor) else like
    device = torch.device(ref.device) if counter or near is None else near.device
    own = torch.empty_like(value, device=device, pin_memory=False).copy_(value)
    if ref.piece is None:
        return own
    if near is None or not is_sharded(near):
        raise ValueError(
            f"{ref.name} was sharded when it was kept and its parameter no longer is; shard the model first"
        )
    from torch.distributed.tensor import DTensor, Replicate, Shard

    dims = ref.piece.dims
    placements = near.placements if dims is None else [Replicate() if d < 0 else Shard(d) for d in dims]  # pyright: ignore[reportAttributeAccessIssue]
    size = torch.Size(ref.piece.size)
    stride = torch.empty(size, device="meta").stride()
    mesh = near.device_mesh  # pyright: ignore[reportAttributeAccessIssue]
    return DTensor.from_local(own, mesh, placements, run_check=False, shape=size, stride=stride)


def _piece(tensor: Any, like: Any) -> Piece:
    """Raises ValueError for a DTensor that waits for a sum, or is split in a way that cannot be written down."""
    from torch.distributed.tensor import Shard

    dims = None
    if not (like is not None and is_sharded(like) and tensor.placements == like.placements):
        for placement in tensor.placements:
            if not placement.is_replicate() and type(placement) is not Shard:
                raise ValueError(
                    f"a state tensor is laid out as {placement}; a snapshot holds Shard and Replicate only"
                )
        dims = tuple(-1 if p.is_replicate() else p.dim for p in tensor.placements)
    chunks = tensor.__create_chunk_list__()  # what torch's own checkpoints ask a DTensor
    offset = tuple(chunks[0].offsets) if chunks else (0,) * tensor.ndim
    return Piece(tuple(tensor.shape), offset, dims, tensor.dtype)


def _fresh(name: str, into: Mapping[str, Tensor]) -> str:
    """`name`, or with marks behind it when another path spells the same (keys 1 and "1")."""
    while name in into:
        name += "'"
    return name


def encode(rest: Any, where: str) -> Any:
    """The plain rest of `split` as JSON types, without loss but that a namedtuple becomes a tuple.

    What JSON does not have is spelt `{"~": kind, "v": value}`. Raises ValueError, naming the place, for anything else.
    """
    if isinstance(rest, np.bool_):
        return bool(rest)
    if rest is None or isinstance(rest, (bool, str)):
        return rest
    if isinstance(rest, (int, np.integer)):
        return int(rest)
    if isinstance(rest, (float, np.floating)):
        return float(rest) if math.isfinite(rest) else {"~": "float", "v": repr(float(rest))}
    if isinstance(rest, Ref):
        piece = None
        if rest.piece is not None:
            size, offset, dims, dtype = rest.piece
            piece = [list(size), list(offset), dims and list(dims), str(dtype)]
        return {"~": "tensor", "v": [rest.name, rest.device, piece, rest.numpy]}
    if isinstance(rest, Counter):
        return {"~": "counter", "v": [[encode(k, where), v] for k, v in rest.items()]}
    if isinstance(rest, dict):
        if all(isinstance(key, str) for key in rest) and "~" not in rest:
            return {key: encode(value, f"{where}/{key}") for key, value in rest.items()}
        return {"~": "dict", "v": [[encode(k, where), encode(v, f"{where}/{k}")] for k, v in rest.items()]}
    if isinstance(rest, (list, tuple, set, frozenset)):
        parts = [encode(value, f"{where}/{i}") for i, value in enumerate(rest)]
        if isinstance(rest, list):
            return parts
        return {"~": "tuple" if isinstance(rest, tuple) else type(rest).__name__, "v": parts}
    if isinstance(rest, (bytes, bytearray)):
        return {"~": "bytes", "v": rest.hex()}
    if isinstance(rest, complex):
        return {"~": "complex", "v": [encode(rest.real, where), encode(rest.imag, where)]}
    if isinstance(rest, (torch.dtype, torch.device)):
        return {"~": "dtype" if isinstance(rest, torch.dtype) else "device", "v": str(rest)}
    raise ValueError(
        f"{where}: a {type(rest).__name__} cannot be written to disk; keep numbers, text, tensors, lists and mappings"
    )


def decode(value: Any) -> Any:
    """The inverse of `encode`."""
    if isinstance(value, list):
        return [decode(part) for part in value]
    if not isinstance(value, dict):
        return value
    if "~" not in value:
        return {key: decode(part) for key, part in value.items()}
    return _DECODERS[value["~"]](value["v"])


def _decode_ref(v: Any) -> Ref:
    name, device, piece, is_numpy = v
    if piece is None:
        return Ref(name, device, None, is_numpy)
    size, offset, dims, dtype = piece
    split_along = None if dims is None else tuple(dims)
    return Ref(name, device, Piece(tuple(size), tuple(offset), split_along, _decode_dtype(dtype)), is_numpy)


def _decode_dtype(v: str) -> torch.dtype:
    return getattr(torch, v.removeprefix("torch."))


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "float": float,
    "tensor": _decode_ref,
    "counter": lambda v: Counter({decode(k): n for k, n in v}),
    "dict": lambda v: {decode(k): decode(part) for k, part in v},
    "tuple": lambda v: tuple(decode(part) for part in v),
    "set": lambda v: {decode(part) for part in v},
    "frozenset": lambda v: frozenset(decode(part) for part in v),
    "bytes": bytes.fromhex,
    "complex": lambda v: complex(decode(v[0]), decode(v[1])),
    "dtype": _decode_dtype,
    "device": torch.device,
}
