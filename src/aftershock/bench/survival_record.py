"""The fault injection study on disk: one JSON file in the package (`bench/records/guard.json`), or in any folder.

A figure that has no value is None. Must not import torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from aftershock.bench.records import fields_of, from_file, rounded, to_file
from aftershock.bench.survival import DEFAULT, Judged, Summary, summary
from aftershock.bench.survival_run import REFERENCES

NAME = "guard.json"
SCHEMA = 2
ALL = "all"
KINDS = ("planted", "spontaneous", "healthy")


class Row(NamedTuple):
    """The runs of a policy on one specimen, or on `ALL` specimens of a kind, or of all kinds.

    `half`: "scoring" seeds, or the "tuning" seeds that settings may have been chosen on. `reasons`: why runs did not
    survive, the first few.
    """

    policy: str
    kind: str
    specimen: str
    half: str
    figures: Summary
    reasons: list[str]


class Study(NamedTuple):
    """The whole study."""

    rows: list[Row]
    scoring_seeds: list[int]
    tuning_seeds: list[int]
    core_seconds: int
    code: str
    """Digest of the sources of guard, detectors, zoo and the run itself."""
    versions: dict[str, str]
    machine: dict[str, Any]
    date: str
    command: str


def rows_of(runs: Sequence[Judged], *, scoring: Sequence[int]) -> list[Row]:
    """Rows by policy (the default first, controls last), half, kind and specimen, those over all of a kind first."""
    rows = []
    policies = sorted({run.policy for run in runs}, key=lambda name: (name in REFERENCES, name != DEFAULT, name))
    for policy in policies:
        for half in ("scoring", "tuning"):
            own = [run for run in runs if run.policy == policy and (run.seed in scoring) == (half == "scoring")]
            for kind in (ALL, *KINDS):
                of_kind = [run for run in own if kind in (ALL, run.kind)]
                if of_kind:
                    rows.append(_row(policy, kind, ALL, half, of_kind))
            for kind in KINDS:
                for specimen in dict.fromkeys(run.specimen for run in own if run.kind == kind):
                    rows.append(_row(policy, kind, specimen, half, [run for run in own if run.specimen == specimen]))
    return rows


def _row(policy: str, kind: str, specimen: str, half: str, runs: Sequence[Judged]) -> Row:
    figures = summary(runs)
    values = figures._asdict()
    plain: dict[str, Any] = {name: rounded(v) if isinstance(v, float) else v for name, v in values.items()}
    failed = [run for run in runs if not (run.survived or run.refused)]
    lost = [f"seed {run.seed}: {run.reason}" for run in failed] if specimen != ALL else []
    return Row(policy, kind, specimen, half, Summary(**plain), lost[:3])


def write_study(folder: Path, study: Study) -> Path:
    """Write the record into `folder`, in place of an older one."""
    rows = [row._asdict() | {"figures": list(row.figures)} for row in study.rows]
    breaks = {'{"policy"': '\n{"policy"', '],"scoring_seeds"': '\n],"scoring_seeds"'}
    return to_file(folder / NAME, study._asdict() | {"rows": rows}, schema=SCHEMA, breaks=breaks)


def read_study(folder: Path | None = None) -> Study:
    """The record of `folder`, or where that has none the package's own.

    Raises ValueError when neither is there, or the file is damaged.
    """
    return from_file(NAME, folder, parse_study, what="fault injection study", command="guard")


def parse_study(data: Mapping[str, Any]) -> Study:
    """The study that `write_study` wrote."""
    fields = fields_of(data, SCHEMA)
    fields["rows"] = [Row(**row | {"figures": Summary(*row["figures"])}) for row in fields["rows"]]
    return Study(**fields)


def study_json(study: Study) -> str:
    """The study as JSON text, with names for every figure."""
    rows = [row._asdict() | {"figures": _named(row.figures)} for row in study.rows]
    return json.dumps(study._asdict() | {"rows": rows}, indent=1, allow_nan=False)


def _named(figures: Summary) -> dict[str, Any]:
    return figures._asdict() | {"false_rate": figures.false_rate}
