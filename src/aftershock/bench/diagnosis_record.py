"""The benchmark of verdicts on disk (`bench/records/replay.json`, or in any folder), and summed up.

Must not import torch.
"""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from aftershock.bench.diagnosis import BUILDING, Incident, code_digest
from aftershock.bench.records import fields_of, from_file, to_file
from aftershock.replay.response import wilson
from aftershock.store.environment import describe_environment

NAME = "replay.json"
SCHEMA = 1
PARTS = ("incidents", "unseen")
"""Fields that hold incidents."""
BINS = (0.0, 0.5, 0.8, 0.95, 1.0001)
"""Edges of the shares between which claimed and true frequencies are compared."""


class Diagnoses(NamedTuple):
    """The whole benchmark: incidents of the zoo, and of specimens that nothing was built on."""

    incidents: list[Incident]
    unseen: list[Incident]
    seeds: list[int]
    core_seconds: int
    code: str
    versions: dict[str, str]
    machine: dict[str, Any]
    date: str
    command: str


class Rate(NamedTuple):
    """A share of incidents, with Wilson's 95 % interval."""

    count: int
    total: int
    low: float
    high: float

    @property
    def words(self) -> str:
        """As "61 of 66, 92 % [83, 97]"."""
        share = self.count / self.total if self.total else 0.0
        return f"{self.count} of {self.total}, {100 * share:.0f} % [{100 * self.low:.0f}, {100 * self.high:.0f}]"


class Reliability(NamedTuple):
    """Verdicts whose first share lies in [`low`, `high`): their mean share, and how many had the true class first."""

    low: float
    high: float
    share: float
    right: Rate


def make_record(incidents: Sequence[Incident], *, unseen: Sequence[str], command: str) -> Diagnoses:
    """The record of incidents that were judged just now. Raises ValueError when one of them is of a building seed."""
    seeds = sorted({one.seed for one in incidents})
    if set(seeds) & set(BUILDING):
        raise ValueError(f"seeds {BUILDING} built the signature matrix; no verdict on them counts")
    here = describe_environment()
    return Diagnoses(
        incidents=[one for one in incidents if one.specimen not in unseen],
        unseen=[one for one in incidents if one.specimen in unseen],
        seeds=seeds,
        core_seconds=round(sum(one.seconds for one in incidents)),
        code=code_digest(),
        versions={name: version for name, version in here["versions"].items() if version is not None},
        machine={key: here[key] for key in ("platform", "cpu", "cores", "python")},
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        command=command,
    )


def within(incidents: Sequence[Incident], places: int) -> Rate:
    """How often the true class is among the first `places`; runs that did not spike do not count."""
    spiked = [one for one in incidents if one.spiked]
    return rate(sum(one.place is not None and one.place <= places for one in spiked), len(spiked))


def confidently_wrong(incidents: Sequence[Incident]) -> Rate:
    """How often another class than the true one was the decided verdict."""
    spiked = [one for one in incidents if one.spiked]
    return rate(sum(one.verdict == "decided" and one.place != 1 for one in spiked), len(spiked))


def identical(incidents: Sequence[Incident]) -> Rate:
    """How often unchanged replays had the recorded bits."""
    spiked = [one for one in incidents if one.spiked]
    return rate(sum(one.identical for one in spiked), len(spiked))


def reliability(incidents: Sequence[Incident]) -> list[Reliability]:
    """Claimed against true frequency, by bins of the first share."""
    found = []
    for low, high in itertools.pairwise(BINS):
        inside = [one for one in incidents if one.ranked and low <= one.ranked[0][1] < high]
        if inside:
            mean = sum(one.ranked[0][1] for one in inside) / len(inside)
            found.append(Reliability(low, high, mean, rate(sum(one.place == 1 for one in inside), len(inside))))
    return found


def rate(count: int, total: int) -> Rate:
    """With its interval."""
    low, high = wilson(count, total) if total else (0.0, 1.0)
    return Rate(count, total, low, high)


def write_diagnoses(folder: Path, record: Diagnoses) -> Path:
    """Write the record into `folder`, in place of an older one."""
    breaks = {'{"specimen"': '\n{"specimen"'}
    return to_file(folder / NAME, plain(record), schema=SCHEMA, breaks=breaks)


def read_diagnoses(folder: Path | None = None) -> Diagnoses:
    """The record of `folder`, or where that has none the package's own.

    Raises ValueError when neither is there, or the file is damaged.
    """
    return from_file(NAME, folder, _parsed, what="benchmark of verdicts", command="replay")


def _parsed(data: Mapping[str, Any]) -> Diagnoses:
    fields = fields_of(data, SCHEMA)
    for part in PARTS:
        fields[part] = [Incident(**one) for one in fields[part]]
    return Diagnoses(**fields)


def plain(record: Diagnoses) -> dict[str, Any]:
    """The record as JSON holds it."""
    return record._asdict() | {part: [one._asdict() for one in getattr(record, part)] for part in PARTS}
