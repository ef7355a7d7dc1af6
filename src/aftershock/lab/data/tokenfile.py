"""`.bin` files of token ids, memory-mapped: raw little-endian integers, or the same behind a header of llm.c.

Imports numpy only.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

_HEADER_BYTES = 256 * 4
_HEADERS = {(20240520, 1): "uint16", (20240801, 7): "uint32"}  # (magic, version): llm.c, dev/data/data_common.py


class TokenFile(NamedTuple):
    """`tokens`: [N], uint16 or uint32, read-only and mapped; `start`: the position in the file of the first of them."""

    path: Path
    tokens: np.ndarray
    start: int = 0


def read_token_file(path: Path, token_dtype: str) -> TokenFile:
    """Map the ids in `path`. Raises ValueError when it is missing, empty, cut off, or of another integer type."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; data.source takes stdlib, a text file, a folder or a .bin")
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path}: is empty; give a file of {token_dtype} token ids")
    offset, num_tokens = _header(path, size, token_dtype)
    dtype = np.dtype(token_dtype).newbyteorder("<")
    if num_tokens is None:
        if size % dtype.itemsize:
            raise ValueError(
                f"{path}: its {size} bytes are no whole number of {token_dtype} tokens; "
                "the file is cut off, or data.token_dtype is not what it was written with"
            )
        num_tokens = size // dtype.itemsize
    elif size != offset + num_tokens * dtype.itemsize or num_tokens == 0:
        raise ValueError(
            f"{path}: its header announces {num_tokens} tokens, but {size - offset} bytes follow it; "
            "write the file again"
        )
    mapped = np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(num_tokens,))
    return TokenFile(path, np.asarray(mapped))


def find_validation(path: Path) -> Path | None:
    """The held-out file that goes with `path`: `<stem>_val.bin`, or `...val.bin` for `...train.bin`."""
    names = [f"{path.stem}_val{path.suffix}"]
    if path.stem.endswith("train"):
        names.append(f"{path.stem.removesuffix('train')}val{path.suffix}")
    return next((path.with_name(name) for name in names if path.with_name(name).is_file()), None)


class _Header(NamedTuple):
    offset: int
    num_tokens: int | None


def _header(path: Path, size: int, token_dtype: str) -> _Header:
    """Where the ids start and how many the header announces; (0, None) for a raw file."""
    if size < _HEADER_BYTES:
        return _Header(0, None)
    magic, version, num_tokens = (int(number) for number in np.fromfile(path, dtype="<i4", count=3))
    if magic not in {known for known, _ in _HEADERS}:
        return _Header(0, None)
    written = _HEADERS.get((magic, version))
    if written is None:
        raise ValueError(f"{path}: has an llm.c header of unknown version {version}; write the file again as raw ids")
    if written != token_dtype:
        raise ValueError(f"{path}: its header says {written}, data.token_dtype is {token_dtype}; set it to {written}")
    return _Header(_HEADER_BYTES, num_tokens)
