"""Which parts of anybody's model are embeddings, norms and attention, told by their classes; and coarse parts of it.

Classes are known by name, so that a stranger's RMSNorm or GPT2Attention counts. Must not import any edit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

from torch import Tensor, nn

from aftershock.signals.places import plain_name

Kind = Literal["embeddings", "norms", "attention"]

PATTERNS: dict[Kind, re.Pattern[str]] = {
    "embeddings": re.compile("embedding", re.IGNORECASE),
    "norms": re.compile("norm", re.IGNORECASE),
    "attention": re.compile("att(entio)?n", re.IGNORECASE),
}
"""Matched with the name of a module's class, or of one it inherits from."""


def modules_of(model: nn.Module, kind: Kind) -> dict[str, nn.Module]:
    """The modules of a kind by name; of modules inside one another (attention in attention) the outermost.

    Embeddings and norms are only those that hold parameters of their own. Raises ValueError where there is none.
    """
    found: dict[str, nn.Module] = {}
    for name, module in _named(model):
        own = kind == "attention" or next(module.parameters(recurse=False), None) is not None
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if name and own and not inside and _is(module, kind):
            found[name] = module
    if not found:
        raise ValueError(f"no module of the model is one of its {kind}, by the names of their classes")
    return found


def parameters_of(model: nn.Module, kind: Kind) -> dict[str, Tensor]:
    """The parameters that modules of a kind hold themselves, by name. Raises ValueError where there is none."""
    found = modules_of(model, kind)
    named = {f"{place}.{name}": p for place, module in found.items() for name, p in module.named_parameters()}
    return {name: p for name, p in named.items() if p.is_floating_point()}


def coarse_parts(model: nn.Module, *, most: int) -> list[str]:
    """Names of at most `most` modules that hold all parameters between them as far as modules can: the largest is
    taken apart again and again, into its children. A model that is one module has none."""
    names = dict(_named(model))
    parts = [""]
    for _ in range(len(names)):
        whole = max((part for part in parts if _children(names, part)), key=lambda p: _size(names[p]), default=None)
        if whole is None or len(parts) - 1 + len(_children(names, whole)) > most:
            break
        place = parts.index(whole)
        parts[place : place + 1] = _children(names, whole)
    return _each_once(names, [part for part in parts if part])


def _each_once(names: dict[str, nn.Module], parts: list[str]) -> list[str]:
    """Without those whose every parameter is tied to one of a part before."""
    seen: set[int] = set()
    kept: list[str] = []
    for part in parts:
        own = {id(p) for p in names[part].parameters()}
        if own - seen:
            kept.append(part)
        seen |= own
    return kept


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A wrapper stands under the same plain name as what it wraps: the last of a name is the user's own."""
    by_name = {plain_name(f"{name}.").rstrip("."): module for name, module in model.named_modules()}
    yield from by_name.items()


def _is(module: nn.Module, kind: Kind) -> bool:
    return any(PATTERNS[kind].search(cls.__name__) for cls in type(module).__mro__)


def _children(names: dict[str, nn.Module], part: str) -> list[str]:
    start = f"{part}." if part else ""
    below = [name for name in names if name.startswith(start) and name and "." not in name[len(start) :]]
    return [name for name in below if _size(names[name])]


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
