"""Named places in any nn.Module: parameters and submodules chosen by fnmatch patterns over their own names.

A pattern that matches nothing is an error that names the nearest place there is. Nothing here touches the model.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn

_log = logging.getLogger("aftershock.signals")

WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What DDP, torch.compile, FSDP1 and activation checkpointing put into the names of a model they wrap."""


class Notes:
    """What was left out and why: each sentence is kept once, in order, and logged once to `aftershock.signals`."""

    def __init__(self) -> None:
        self._said: dict[str, str] = {}

    def say(self, about: str, sentence: str) -> None:
        """Add `sentence` unless something was already said under the key `about`."""
        if about not in self._said:
            self._said[about] = sentence
            _log.warning("%s", sentence)

    @property
    def sentences(self) -> tuple[str, ...]:
        """All of them, oldest first."""
        return tuple(self._said.values())


def match(patterns: str | Sequence[str], names: Iterable[str], *, what: str) -> list[str]:
    """The `names` that match any of the `patterns` (fnmatch: `*`, `?`, `[ab]`), in the order of `names`.

    Cost: len(patterns) * len(names) string matches, once. Raises ValueError for a pattern without a match, with the
    nearest name.

    >>> match("blocks.*.weight", ["embed.weight", "blocks.0.weight"], what="parameter")
    ['blocks.0.weight']
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise ValueError(f"no {what} pattern given; '*' takes them all")
    known = list(names)
    if not known:
        raise ValueError(f"the model has no {what} to measure")
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            near = _nearest(pattern, known)
            raise ValueError(f"no {what} matches {pattern!r}; the nearest of {len(known)} is {near!r}")
    return [name for name in known if any(fnmatchcase(name, pattern) for pattern in patterns)]


def parameter_places(model: nn.Module, patterns: str | Sequence[str] = "*") -> dict[str, Tensor]:
    """The parameters whose names match, by name; a tied parameter appears once, under its first name.

    Names are the model's own, less what DDP, torch.compile, FSDP1 and checkpointing add. Raises as `match` does.
    """
    found = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    return {name: found[name] for name in match(patterns, found, what="parameter")}


def module_places(model: nn.Module, patterns: str | Sequence[str]) -> dict[str, nn.Module]:
    """The submodules whose names match, by name (the model itself has no name). Raises as `match` does."""
    found = dict(_submodules(model))
    return {name: found[name] for name in match(patterns, found, what="module")}


def plain_name(name: str) -> str:
    """`name` without what DDP, torch.compile, FSDP1 and checkpointing put into it.

    >>> plain_name("module._orig_mod.blocks.0.weight")
    'blocks.0.weight'
    """
    # `module.` only in front, where DDP puts it: in the middle it may be the user's own name.
    name = name.removeprefix(WRAPPERS[0])
    for wrapper in WRAPPERS[1:]:
        name = name.replace(wrapper, "")
    return name.removeprefix(WRAPPERS[0])


def _nearest(pattern: str, known: list[str]) -> str:
    """Compared as far down as the pattern goes: `blocks.*.atn` is not near `blocks.0`, `head.*` is near `head.w`."""
    depth = pattern.count(".") + 1
    names = {name: ".".join(name.split(".")[:depth]) for name in known}
    as_deep = {name: start for name, start in names.items() if start.count(".") + 1 == depth} or names
    near = difflib.get_close_matches(pattern, as_deep.values(), n=1, cutoff=0.0)[0]
    return next(name for name, start in as_deep.items() if start == near)


def _submodules(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Wrappers leave a name behind that stands for the wrapper itself: the last one of a name is the user's module."""
    for name, module in model.named_modules():
        plain = plain_name(f"{name}.").rstrip(".")
        if plain:
            yield plain, module
