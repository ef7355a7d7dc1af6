"""The benchmark of precursors on disk (`bench/records/precursors.json`, or in any folder).

A figure that has no value is None. Must not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from aftershock.bench.records import Span, fields_of, from_file, to_file

NAME = "precursors.json"
SCHEMA = 1


class Share(NamedTuple):
    """A share, a rate or a difference with its 95 % bootstrap interval over runs."""

    value: float | None
    low: float | None
    high: float | None


class Group(NamedTuple):
    """Targets of one kind or cause: all, and those caught by their peak; those that an alarm could catch at lead >= 1,
    and were; those that open before their onset, and had an alarm before it."""

    targets: int
    by_peak: int
    catchable: int
    caught: int
    foreseeable: int
    early: int


class At(NamedTuple):
    """An indicator at the threshold that kept to `budget` false alarms per 10,000 healthy steps on the tuning seeds.

    `recall`: of catchable targets, caught a step or more before the peak; `early`: of foreseeable ones, alarmed before
    the onset; `lead`: quartiles of the steps from first alarm to onset; `gain_*`: less the gradient norm's on the same
    runs; `out_*`: each specimen at the setting chosen without it. `groups` only under the shorter horizon.
    """

    budget: float
    threshold: float | None
    false_rate: Share
    recall: Share
    early: Share
    lead: list[float | None]
    lead_span: Span
    groups: dict[str, Group]
    gain_recall: Share
    gain_early: Share
    out_false_rate: Share
    out_recall: Share
    out_early: Share


class PrecursorRow(NamedTuple):
    """One indicator, on the scoring seeds' runs that have it. `area`: under the precision-recall curve, lead >= 1."""

    indicator: str
    horizon: int
    way: str
    runs: int
    targets: int
    area: float | None
    area_span: Span
    at: list[At]


class Reliable(NamedTuple):
    """Steps whose probability lies in [`low`, `high`): how many, their mean probability, the share that came true."""

    low: float
    high: float
    count: int
    claimed: float
    seen: Share


class Forecaster(NamedTuple):
    """A forecast of "an onset within k steps" on the scoring seeds. Skills are 1 - score / score of the base rate.

    `seen`: fitted on the tuning seeds of all specimens; `unseen`: each specimen by a model that had none of its runs.
    """

    name: str
    signals: list[str]
    k: int
    steps: int
    onsets: int
    brier: float
    brier_skill: Share
    log_skill: Share
    unseen_brier_skill: Share
    unseen_log_skill: Share
    gain_over_gradient: Share
    """Log skill in unseen specimens less that of the gradient norm's robust z alone, on the same rows."""
    by_kind: dict[str, Share]
    """Log skill in unseen specimens, by kind."""
    reliability: list[Reliable]
    unseen_reliability: list[Reliable]


class Precursors(NamedTuple):
    """The whole benchmark. `specimens`: by name, kind, cause, runs, targets, healthy steps of the scoring seeds."""

    rows: list[PrecursorRow]
    forecasters: list[Forecaster]
    specimens: dict[str, dict[str, Any]]
    missing: dict[str, str]
    budgets: list[float]
    horizons: list[int]
    tuning_seeds: list[int]
    scoring_seeds: list[int]
    versions: dict[str, str]
    machine: dict[str, Any]
    date: str
    command: str


def write_precursors(folder: Path, record: Precursors) -> Path:
    """Write the record into `folder`, in place of an older one."""
    breaks = {start: f"\n{start}" for start in ('{"indicator"', '{"name"')}
    return to_file(folder / NAME, plain(record), schema=SCHEMA, breaks=breaks)


def read_precursors(folder: Path | None = None) -> Precursors:
    """The record of `folder`, or where that has none the package's own.

    Raises ValueError when neither is there, or the file is damaged.
    """
    return from_file(NAME, folder, _parsed, what="benchmark of precursors", command="precursors")


def plain(value: Any) -> Any:
    """NamedTuples as mappings; shares, groups and spans, of which there are many, as lists."""
    if isinstance(value, (Precursors, PrecursorRow, At, Forecaster, Reliable)):
        return {name: plain(item) for name, item in value._asdict().items()}
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _parsed(data: Mapping[str, Any]) -> Precursors:
    fields = fields_of(data, SCHEMA)
    fields["rows"] = [_row(row) for row in fields["rows"]]
    fields["forecasters"] = [_forecaster(one) for one in fields["forecasters"]]
    return Precursors(**fields)


def _row(data: Mapping[str, Any]) -> PrecursorRow:
    fields = dict(data)
    fields["area_span"] = tuple(fields["area_span"])
    fields["at"] = [_at(one) for one in fields["at"]]
    return PrecursorRow(**fields)


def _at(data: Mapping[str, Any]) -> At:
    fields = dict(data)
    for name in ("false_rate", "recall", "early", "gain_recall", "gain_early"):
        fields[name] = Share(*fields[name])
    for name in ("out_false_rate", "out_recall", "out_early"):
        fields[name] = Share(*fields[name])
    fields["lead_span"] = tuple(fields["lead_span"])
    fields["groups"] = {name: Group(*group) for name, group in fields["groups"].items()}
    return At(**fields)


def _forecaster(data: Mapping[str, Any]) -> Forecaster:
    fields = dict(data)
    for name in ("brier_skill", "log_skill", "unseen_brier_skill", "unseen_log_skill", "gain_over_gradient"):
        fields[name] = Share(*fields[name])
    fields["by_kind"] = {kind: Share(*share) for kind, share in fields["by_kind"].items()}
    for name in ("reliability", "unseen_reliability"):
        fields[name] = [Reliable(**{**one, "seen": Share(*one["seen"])}) for one in fields[name]]
    return Forecaster(**fields)
