"""Text and token files as two arrays of token ids, training and held out, checked before anything trains on them.

Three sources: the interpreter's own library source, a text file or folder (one token per byte), a `.bin` of token ids.
Reading `.bin` files is in `tokenfile.py`. Imports only that, numpy and the recipe.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from aftershock.lab.data.tokenfile import TokenFile, find_validation, read_token_file
from aftershock.lab.recipe import LanguageData

END_OF_TEXT = b"\0"
"""Between two documents. No text file may hold it, so it is an unambiguous end-of-text token."""

_STDLIB_LEFT_OUT = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


class Corpus(NamedTuple):
    """`train`, `eval`: token ids [N], uint8, uint16 or uint32, memory-mapped for a `.bin`; read-only.

    `digest`: the first 16 hex digits of sha256 over both splits: equal digests are equal data.
    `description`: one line for people.
    """

    train: np.ndarray
    eval: np.ndarray
    digest: str
    description: str


class _Split(NamedTuple):
    train: bytes
    eval: bytes
    description: str


def load_tokens(config: LanguageData) -> Corpus:
    """Read and check the corpus that `config.source` names.

    `stdlib`: the library source of the running interpreter, tests and installed packages left out. A text file is one
    document, the last `eval_frac` of which is held out. A folder is every text file below it, hidden ones apart.
    Library and folder are read in the order of their relative paths, documents joined by one NUL byte; whole files
    are held out, about `eval_frac` of the bytes, chosen by a hash of the relative path. A `.bin` is
    held out by a `<name>_val.bin` beside it (`val.bin` for `train.bin`), or else by its own last `eval_frac`.
    Empty files are no documents.

    >>> load_tokens(LanguageData()).train.dtype
    dtype('uint8')

    Raises ValueError, in one sentence that names the file, when the source is missing, unreadable, empty, binary, cut
    off, shorter than one window of context + 1 tokens in either split, or holds a token id outside `vocab_size`.
    Warns when files in a folder are left out because they are not text.
    """
    if not config.source.strip():
        raise ValueError("data.source is empty; give stdlib, a text file, a folder or a .bin token file")
    try:
        if config.source != "stdlib" and Path(config.source).suffix.lower() == ".bin":
            corpus = _token_corpus(config)
        else:
            corpus = _byte_corpus(config)
    except OSError as error:
        raise ValueError(
            f"{error.filename or config.source}: cannot be read ({error.strerror}); check data.source and its mode"
        ) from None
    for name, split in (("training", corpus.train), ("held-out", corpus.eval)):
        if len(split) <= config.context:
            raise ValueError(
                f"{config.source}: the {name} split has {len(split)} tokens, but one window needs data.context + 1 "
                f"= {config.context + 1}; give more text, lower data.context or change data.eval_frac, "
                f"which is {config.eval_frac:g}"
            )
    return corpus


# --------------------------------------------------------------------------------------------------------- bytes


def _byte_corpus(config: LanguageData) -> Corpus:
    if config.vocab_size < 256:
        raise ValueError(
            f"data.vocab_size={config.vocab_size} is too small for {config.source}, which is read as bytes; use 256"
        )
    path = Path(os.path.expanduser(config.source))
    if config.source == "stdlib":
        train, held_out, description = _stdlib(config.eval_frac)
    elif path.is_dir():
        train, held_out, description = _folder(path, config.eval_frac)
    elif path.is_file():
        train, held_out, description = _text_file(path, config.eval_frac)
    elif path.exists():
        raise ValueError(f"{path}: is neither a regular file nor a folder; give a text file, a folder or a .bin")
    else:
        raise ValueError(f"{path}: no such file or folder; data.source takes stdlib, a text file, a folder or a .bin")
    digest = hashlib.sha256(len(train).to_bytes(8, "little") + train)
    digest.update(held_out)
    return Corpus(
        train=np.frombuffer(train, dtype=np.uint8),
        eval=np.frombuffer(held_out, dtype=np.uint8),
        digest=digest.hexdigest()[:16],
        description=description,
    )


def _stdlib(eval_frac: float) -> _Split:
    root = Path(sysconfig.get_paths()["stdlib"])
    names = _walk(root, lambda name: name not in _STDLIB_LEFT_OUT)
    contents = {name: (root / name).read_bytes() for name in names if name.endswith(".py")}
    documents = {name: content for name, content in contents.items() if content}
    if len(documents) < 2:
        raise ValueError(f"{root}: this interpreter keeps no library source there; set data.source to a file or folder")
    description = f"Python {platform.python_version()} standard library source, {len(documents)} files"
    return _split_by_file(documents, eval_frac, description)


def _folder(root: Path, eval_frac: float) -> _Split:
    names = [name for name in _walk(root, lambda name: not name.startswith(".")) if "/." not in f"/{name}"]
    documents: dict[str, bytes] = {}
    binary: list[str] = []
    for name in names:
        content = (root / name).read_bytes()
        if _text_fault(content) is not None:
            binary.append(name)
        elif content:
            documents[name] = content
    if not documents:
        raise ValueError(f"{root}: no file in this folder is UTF-8 text (it holds {len(names)} files); give text files")
    if len(set(documents.values())) == 1:
        only = root / next(iter(documents))
        raise ValueError(f"{root}: holds only one distinct text file, but whole files are held out; use {only}")
    description = f"{root}, {len(documents)} text files"
    if binary:
        left_out = f"{len(binary)} of {len(names)} files left out as not UTF-8 text (first: {binary[0]})"
        warnings.warn(f"{root}: {left_out}", stacklevel=4)  # the caller of load_tokens
        description += f", {left_out}"
    return _split_by_file(documents, eval_frac, description)


def _text_file(path: Path, eval_frac: float) -> _Split:
    text = path.read_bytes()
    if not text:
        raise ValueError(f"{path}: is empty; give a file with text")
    fault = _text_fault(text)
    if fault is not None:
        raise ValueError(f"{path}: is not UTF-8 text ({fault}); convert it, or name a file of token ids .bin")
    cut = len(text) - round(len(text) * eval_frac)
    return _Split(text[:cut], text[cut:], f"{path}, its last {eval_frac:g} held out")


def _walk(root: Path, enter: Callable[[str], bool]) -> list[str]:
    """Relative posix paths of the regular files below `root`, sorted; `enter` says which folders to go into."""
    names: list[str] = []

    def fail(error: OSError) -> None:
        raise error

    for folder, subfolders, files in os.walk(root, onerror=fail):
        subfolders[:] = [name for name in subfolders if enter(name)]
        paths = (Path(folder) / name for name in files)
        names += [path.relative_to(root).as_posix() for path in paths if path.is_file()]
    return sorted(names)


def _text_fault(content: bytes) -> str | None:
    """Why `content` is not text, or None."""
    nul = content.find(b"\0")
    if nul >= 0:
        return f"NUL byte at offset {nul}"
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"undecodable byte 0x{content[error.start]:02x} at offset {error.start}"
    return None


def _split_by_file(documents: Mapping[str, bytes], eval_frac: float, description: str) -> _Split:
    """Hold out files in the order of their path's hash, passing over those that would overshoot; at least one file.

    Files of equal content stay on one side, or the held-out loss would be measured on text that was trained on.
    """
    budget = eval_frac * sum(map(len, documents.values()))
    copies: dict[bytes, list[str]] = {}
    for name, content in documents.items():
        copies.setdefault(content, []).append(name)
    held_out: set[str] = set()
    for content, names in sorted(copies.items(), key=lambda item: hashlib.sha256(os.fsencode(item[1][0])).digest()):
        if len(content) * len(names) <= budget:
            held_out.update(names)
            budget -= len(content) * len(names)
    if not held_out:
        held_out.update(min(copies.items(), key=lambda item: (len(item[0]) * len(item[1]), item[1]))[1])
    return _Split(
        train=END_OF_TEXT.join(content for name, content in documents.items() if name not in held_out),
        eval=END_OF_TEXT.join(content for name, content in documents.items() if name in held_out),
        description=f"{description}, {len(held_out)} of them held out",
    )


# -------------------------------------------------------------------------------------------------------- tokens


def _token_corpus(config: LanguageData) -> Corpus:
    path = Path(os.path.expanduser(config.source))
    first = read_token_file(path, config.token_dtype)
    validation = find_validation(path)
    if validation is None:
        cut = len(first.tokens) - round(len(first.tokens) * config.eval_frac)
        splits = [first._replace(tokens=first.tokens[:cut]), first._replace(tokens=first.tokens[cut:], start=cut)]
        description = f"{path}, its last {config.eval_frac:g} held out"
    else:
        splits = [first, read_token_file(validation, config.token_dtype)]
        description = f"{path}, held out: {validation.name}"
    return Corpus(
        train=splits[0].tokens,
        eval=splits[1].tokens,
        digest=_check_ids(splits, config.vocab_size),
        description=description,
    )


def _check_ids(splits: list[TokenFile], vocab_size: int) -> str:
    """The digest, from the one pass over the files that also looks for ids outside the vocabulary."""
    digest = hashlib.sha256(len(splits[0].tokens).to_bytes(8, "little"))
    offender, largest = "", -1
    for path, tokens, start in splits:
        for chunk_start in range(0, len(tokens), _CHUNK_TOKENS):
            chunk = tokens[chunk_start : chunk_start + _CHUNK_TOKENS]
            digest.update(chunk.data)
            largest = max(largest, int(chunk.max()))
            if largest >= vocab_size and not offender:
                position = int(np.argmax(chunk >= vocab_size))
                offender = f"{path}: token id {chunk[position]} at position {start + chunk_start + position}"
    if offender:
        raise ValueError(
            f"{offender} is outside data.vocab_size={vocab_size}; set data.vocab_size={largest + 1} or more "
            "(the file's largest id plus one)"
        )
    return digest.hexdigest()[:16]


_CHUNK_TOKENS = 2**22  # 8 or 16 MiB at a time: enough to stream at disk speed, little enough to stay out of the way
