"""Configs as data: frozen dataclasses to and from plain dicts and YAML, dotted overrides, run ids.

A config is owned by what it builds (`lab.recipe.RunConfig` and its parts); this file only moves any frozen
dataclass in and out of text. An unknown key is an error that names the nearest known one.
Must not import anything else of aftershock except the version.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from aftershock._version import __version__

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """Plain dicts, lists and scalars of a (nested) dataclass, in field order."""
    return _plain(config)


def from_dict(cls: type[T], data: Mapping[str, Any], *, where: str = "config") -> T:
    """Build `cls` from `data`. `where` names the source in errors ("sweep.yaml: model").

    Raises ValueError on an unknown key (with the nearest known key), a missing one, or a value of the wrong type.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{where}: expected a mapping of settings, got {type(data).__name__} {data!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    for key in data:
        if key not in fields:
            raise ValueError(f"{where}: unknown key {key!r}{nearest(str(key), fields)}")
    values = {key: _parse(hints[key], value, f"{where}.{key}") for key, value in data.items()}
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{where}: missing {', '.join(missing)}")
    return cls(**values)


def load_yaml(cls: type[T], path: str | Path) -> T:
    """`from_dict` of a YAML file. Raises ValueError when the file is missing, unreadable or not a mapping."""
    path = Path(path)
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path}: not readable as YAML: {error}") from None
    return from_dict(cls, {} if data is None else data, where=str(path))


def dump_yaml(config: Any) -> str:
    """YAML text that `load_yaml` reads back to an equal config."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def override(config: T, changes: Mapping[str, Any], *, where: str = "override") -> T:
    """`config` with dotted paths replaced: `override(run, {"model.width": 64})`.

    Values may be strings, which are read as YAML scalars ("1e-3", "true"). Another `kind` (`{"data.kind": "modular"}`)
    puts the defaults of that kind in place of the old settings, before any other change is made, whatever the order.
    Raises ValueError on an unknown path.
    """
    data = to_dict(config)
    values = {path: _scalar(value, f"{where}: {path}") for path, value in changes.items()}
    for path, value in values.items():
        if path.endswith(".kind"):
            _switch_kind(config, data, path.split(".")[:-1], value, where)
    for path, value in values.items():
        parts = path.split(".")
        inner = data
        for part in parts[:-1]:
            if not isinstance(inner.get(part), dict):
                raise ValueError(f"{where}: unknown key {path!r}{nearest(path, leaves(data))}")
            inner = inner[part]
        if parts[-1] not in inner:
            raise ValueError(f"{where}: unknown key {path!r}{nearest(path, leaves(data))}")
        inner[parts[-1]] = value
    return from_dict(type(config), data, where=where)


def leaves(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict to `{dotted.path: value}`."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        path = f"{prefix}{key}"
        flat |= leaves(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
    return flat


def run_id(config: Any) -> str:
    """12 hex digits of sha256 over the canonical JSON of `config` and the package version.

    The same config under the same version has the same id on every machine: that is what makes a sweep resumable.
    """
    text = json.dumps({"config": to_dict(config), "version": __version__}, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` or, without a near one, the list of known names: the tail of an error sentence."""
    options = list(known)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(options)}"


def _scalar(value: Any, where: str) -> Any:
    try:
        return yaml.load(value, _Loader) if isinstance(value, str) else value
    except yaml.YAMLError:
        raise ValueError(f"{where}: {value!r} is not readable as a YAML value; quote it") from None


def _switch_kind(config: Any, data: dict[str, Any], path: list[str], kind: Any, where: str) -> None:
    """Where `path` leads to a tagged union of another kind, put its defaults in `data`; mistakes are found later."""
    for part in path[:-1]:
        config, data = getattr(config, part, None), data.get(part, {})
    current = getattr(config, path[-1], None)
    if not dataclasses.is_dataclass(current) or getattr(current, "kind", kind) == kind:
        return
    hint = typing.get_type_hints(type(config))[path[-1]]
    data[path[-1]] = to_dict(_parse(hint, {"kind": kind}, f"{where}: {'.'.join(path)}"))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    return value


def _parse(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type `hint`, or a ValueError in the user's words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _parse_union(args, value, where)
    if origin is Literal:
        # YAML 1.1 reads a bare `off` as false; our switches are spelled on/off on purpose.
        value = "off" if value is False and "off" in args else "on" if value is True and "on" in args else value
        if value in args:
            return value
        raise ValueError(f"{where}: got {value!r}{nearest(str(value), map(str, args))}")
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, where=where)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_parse(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin in (dict, Mapping) or getattr(origin, "__name__", "") == "Mapping":
        if isinstance(value, Mapping):
            return {str(k): _parse(args[1], v, f"{where}.{k}") for k, v in value.items()}
    elif hint is Any:
        return value
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if math.isnan(value) or math.isinf(value):
            raise ValueError(f"{where}: must be a finite number, got {value!r}")
        return float(value)
    elif hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    elif isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ValueError(f"{where}: expected {getattr(hint, '__name__', hint)}, got {value!r}")


def _parse_union(args: tuple[Any, ...], value: Any, where: str) -> Any:
    """Optional values, and tagged unions of dataclasses that are told apart by their `kind` field."""
    if value is None and type(None) in args:
        return None
    tagged = [a for a in args if isinstance(a, type) and dataclasses.is_dataclass(a)]
    if not tagged:
        return _parse(next(a for a in args if a is not type(None)), value, where)
    if dataclasses.is_dataclass(value):
        return value
    kinds = {f.default: a for a in tagged for f in dataclasses.fields(a) if f.name == "kind"}
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: expected a mapping of settings, got {type(value).__name__} {value!r}")
    kind = value.get("kind", next(iter(kinds)))
    if kind not in kinds:
        raise ValueError(f"{where}.kind: got {kind!r}{nearest(str(kind), map(str, kinds))}")
    return from_dict(kinds[kind], value, where=where)


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `1e-3` as a number, as people write learning rates (YAML 1.1 wants `1.0e-3`)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)
