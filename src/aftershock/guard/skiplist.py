"""The skip list: which batches are left out of training, as half-open ranges [start, stop) of global batch ids.

A YAML (or JSON) file that a person can read and edit. Ids mean something only with their unit, which the file says:
how many samples a batch has over all ranks and how many batches an epoch has; with it a list survives a change of
world size or batch size. Must not import torch or the guard.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from aftershock.config import nearest
from aftershock.store import folder as fs

HEADER = "# Batches left out of training: half-open ranges [start, stop) of global batch ids. Edit between runs.\n"


class Unit(NamedTuple):
    """What one batch id stands for: samples in a batch over all ranks, and batches in an epoch; None: not known."""

    samples_per_batch: int | None = None
    batches_per_epoch: int | None = None


class SkipRange(NamedTuple):
    """Batches [start, stop), why and when they were taken out."""

    start: int
    stop: int
    reason: str = ""
    when: str = ""


class SkipList:
    """Sorted ranges without overlap: overlapping ones become one, with both reasons.

    Example:
        skips = SkipList()
        skips.add(812, 900, "loss spike")
        850 in skips, skips.first_kept(850)  # True, 900
    """

    def __init__(self, ranges: Iterable[SkipRange] = (), *, unit: Unit | None = None) -> None:
        self.unit = Unit() if unit is None else unit
        self._ranges: list[SkipRange] = []
        for one in ranges:
            self._insert(SkipRange(*one))

    @property
    def ranges(self) -> tuple[SkipRange, ...]:
        """In order of `start`."""
        return tuple(self._ranges)

    def add(self, start: int, stop: int, reason: str) -> None:
        """Leave out [start, stop) from now on. Raises ValueError unless 0 <= start < stop."""
        self._insert(SkipRange(start, stop, reason, datetime.now(UTC).isoformat(timespec="seconds")))

    def __contains__(self, batch_id: int) -> bool:
        return self.first_kept(batch_id) != batch_id

    def __len__(self) -> int:
        return len(self._ranges)

    def first_kept(self, batch_id: int) -> int:
        """The first id from `batch_id` on that is trained on."""
        at = bisect_right(self._ranges, batch_id, key=lambda one: one.start) - 1
        while 0 <= at < len(self._ranges) and self._ranges[at].start <= batch_id < self._ranges[at].stop:
            batch_id, at = self._ranges[at].stop, at + 1  # the next range may begin where this one ends
        return batch_id

    def merge(self, other: SkipList) -> None:
        """Take in the ranges of `other`, read in this list's unit; in the other's where this one has none."""
        if not self._ranges or self.unit == Unit():
            self.unit = other.unit
        for one in other._in(self.unit):
            self._insert(one)

    def convert(self, unit: Unit) -> None:
        """The same data in another unit: starts rounded down and stops up, so that no skipped sample comes back.

        Raises ValueError where the units do not tell how (see `convert_id`).
        """
        moved = self._in(unit)
        self.unit, self._ranges = unit, []
        for one in moved:
            self._insert(one)

    def _in(self, unit: Unit) -> list[SkipRange]:
        if self.unit == Unit():  # written by hand without a unit: ids of the run that reads them
            return list(self._ranges)
        return [
            one._replace(
                start=convert_id(one.start, self.unit, unit), stop=convert_id(one.stop, self.unit, unit, up=True)
            )
            for one in self._ranges
        ]

    def state_dict(self) -> dict[str, Any]:
        """JSON types; the same layout as the file."""
        return {"unit": self.unit._asdict(), "skip": [one._asdict() for one in self._ranges]}

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> SkipList:
        """What `state_dict` gave."""
        return SkipList([SkipRange(**one) for one in state["skip"]], unit=Unit(**state["unit"]))

    def write(self, path: Path) -> None:
        """To a `.yaml` or `.json` file, all or not at all."""
        if path.suffix == ".json":
            text = json.dumps(self.state_dict(), indent=1) + "\n"
        else:
            text = HEADER + yaml.safe_dump(self.state_dict(), sort_keys=False, allow_unicode=False)
        fs.atomic_write(path, text.encode())

    @staticmethod
    def read(path: Path) -> SkipList:
        """The list in a `.yaml` or `.json` file. Raises ValueError that names the line of a mistake."""
        try:
            root = yaml.compose(path.read_text("utf-8"), Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark is not None else 1
            raise ValueError(f"{path}: line {line}: not YAML or JSON: {error.problem}") from None
        if root is None:
            return SkipList()
        fields = _mapping(root, ("unit", "skip"), path)
        unit = Unit()
        if "unit" in fields:
            parts = _mapping(fields["unit"], Unit._fields, path)
            unit = Unit(**{name: _value(node, path, name, int, optional=True) for name, node in parts.items()})
        if "skip" not in fields:
            raise ValueError(f"{path}: line 1: no `skip:`; write a list of ranges, or `skip: []`")
        if not isinstance(fields["skip"], yaml.SequenceNode):
            raise ValueError(f"{path}: line {_line(fields['skip'])}: `skip` must be a list of ranges")
        return SkipList([_range(node, path) for node in fields["skip"].value], unit=unit)

    def _insert(self, new: SkipRange) -> None:
        if not 0 <= new.start < new.stop:
            raise ValueError(f"skip range [{new.start}, {new.stop}) must have 0 <= start < stop")
        near = [one for one in self._ranges if one.start < new.stop and new.start < one.stop]
        reasons = list(dict.fromkeys(one.reason for one in [*near, new] if one.reason))
        whens = [one.when for one in [*near, new] if one.when]
        whole = SkipRange(
            start=min(one.start for one in [*near, new]),
            stop=max(one.stop for one in [*near, new]),
            reason="; ".join(reasons),
            when=max(whens, default=""),
        )
        if whole in self._ranges:
            return
        self._ranges = sorted([*(one for one in self._ranges if one not in near), whole])


def convert_id(batch_id: int, old: Unit, new: Unit, *, up: bool = False) -> int:
    """The id, in `new`, of the batch that holds the first sample of batch `batch_id` of `old` (`up`: the next whole).

    sample = (id mod batches_per_epoch) * samples_per_batch, within the same epoch. Raises ValueError where a unit that
    is not known would be needed.

    >>> convert_id(105, Unit(32, 100), Unit(64, 50)), convert_id(105, Unit(32, 100), Unit(64, 50), up=True)
    (52, 53)
    """
    if old == new:
        return batch_id
    if old.samples_per_batch is None or new.samples_per_batch is None:
        raise ValueError(
            f"batch ids of {old} cannot be read as ids of {new}: the samples in a batch are not known; go on with the "
            "same loader and world size, or give samples_per_batch to guard.batches in both runs"
        )
    if (old.batches_per_epoch is None) != (new.batches_per_epoch is None):
        raise ValueError(f"batch ids of {old} cannot be read as ids of {new}: only one of the loaders has a length")
    epoch, index = 0, batch_id
    if old.batches_per_epoch is not None:
        epoch, index = divmod(batch_id, old.batches_per_epoch)
    samples = index * old.samples_per_batch
    there = -(-samples // new.samples_per_batch) if up else samples // new.samples_per_batch
    if new.batches_per_epoch is None:
        return there
    return epoch * new.batches_per_epoch + min(there, new.batches_per_epoch)


def _range(node: yaml.Node, path: Path) -> SkipRange:
    fields = _mapping(node, SkipRange._fields, path)
    for name in ("start", "stop"):
        if name not in fields:
            raise ValueError(f"{path}: line {_line(node)}: a range needs `{name}`")
    start, stop = (_value(fields[name], path, name, int) for name in ("start", "stop"))
    if not 0 <= start < stop:
        raise ValueError(f"{path}: line {_line(node)}: range [{start}, {stop}) must have 0 <= start < stop")
    words = [_value(fields[name], path, name, str) if name in fields else "" for name in ("reason", "when")]
    return SkipRange(start, stop, *words)


def _mapping(node: yaml.Node, known: tuple[str, ...], path: Path) -> dict[str, yaml.Node]:
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(f"{path}: line {_line(node)}: expected `name: value` lines with {', '.join(known)}")
    fields: dict[str, yaml.Node] = {}
    for key, value in node.value:
        if key.value not in known:
            raise ValueError(f"{path}: line {_line(key)}: {key.value!r} unknown{nearest(str(key.value), known)}")
        if key.value in fields:
            raise ValueError(f"{path}: line {_line(key)}: {key.value!r} stands there twice")
        fields[key.value] = value
    return fields


def _value(node: yaml.Node, path: Path, name: str, kind: type, *, optional: bool = False) -> Any:
    value = yaml.SafeLoader("")  # only for its constructors of plain scalars
    found = value.construct_object(node, deep=True)
    if kind is str:
        return node.value if isinstance(node, yaml.ScalarNode) else str(found)
    if (optional and found is None) or (isinstance(found, int) and not isinstance(found, bool)):
        return found
    raise ValueError(f"{path}: line {_line(node)}: `{name}` must be a whole number, got {node.value!r}")


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1
