"""Benchmark scores of models of known training compute: reading a CSV file into one curve a task, with its checks.

Legend: N runs of one curve, in ascending compute. A curve never mixes metrics, sources or numbers of shots: the same
task under another prompt is another task. Must not import torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from aftershock.config import nearest
from aftershock.forecast.cells import csv_lines

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "task": ("task",),
    "metric": ("metric",),
    "suite": ("suite",),
    "source": ("source",),
    "shots": ("shots",),
    "model": ("model",),
    "family": ("family", "model_family"),
    "flops": ("flops", "compute", "train_flops", "train_flops_6nd"),
    "params": ("params", "params_nonembed"),
    "tokens": ("tokens", "train_tokens"),
    "score": ("score",),
    "chance": ("chance", "chance_low"),
    "high": ("high", "max"),
    "companion": ("companion",),
    "step": ("step",),
}
"""What a column holds -> the names it may have in a file."""

SMOOTH = ("brier", "bleu", "edit_distance", "loss", "nll", "perplexity")
"""Metrics without a threshold: where a task has one of them too, it is the companion of the sharp metric."""

UNBOUNDED = ("loss", "nll", "perplexity")
"""Metrics without a worst score: companions only, no curve of theirs is fitted."""

LOWER_IS_BETTER = ("brier", "edit_distance")
"""Metrics whose best score is 0 and whose worst is 1, where the file has no column `high`."""


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """One curve: the scores of N runs on a task under one metric, ascending in compute.

    `chance` is the score of guessing (nan: not known), `worst` and `best` the ends of the range, best < worst where
    lower is better. `companion_N` is a smooth metric of the same runs, nan where a run has none; `smooth` says that
    the curve's own metric is one. A run's `group` is its model where the curve holds several checkpoints of it, else
    its family, else the model again.
    """

    label: str
    task: str
    metric: str
    source: str
    log_flops_N: np.ndarray
    score_N: np.ndarray
    model_N: np.ndarray
    family_N: np.ndarray
    group_N: np.ndarray
    chance: float
    worst: float
    best: float
    companion: str
    companion_N: np.ndarray

    @property
    def smooth(self) -> bool:
        """Whether the metric has no threshold."""
        return self.metric in SMOOTH

    @property
    def fraction_N(self) -> np.ndarray:
        """Scores as a share of the range: 0 the worst possible, 1 the best, whichever way the metric runs."""
        return (self.score_N - self.worst) / (self.best - self.worst)

    @property
    def chance_fraction(self) -> float:
        """Chance as a share of the range; nan where it is not known."""
        return (self.chance - self.worst) / (self.best - self.worst)

    def to_score(self, fraction: float) -> float:
        """A share of the range in the metric's own unit."""
        return self.worst + fraction * (self.best - self.worst)

    def where(self, chosen_N: np.ndarray) -> TaskScores:
        """The curve of the chosen runs only (bool or index); groups stay as they are."""
        parts = ("log_flops_N", "score_N", "model_N", "family_N", "group_N", "companion_N")
        return dataclasses.replace(self, **{name: getattr(self, name)[chosen_N] for name in parts})


class ScoreTable(NamedTuple):
    """Curves in order of appearance, and a sentence for every kind of row that was left out."""

    curves: list[TaskScores]
    notes: list[str]


class _Key(NamedTuple):
    task: str
    suite: str
    source: str
    shots: str


_Curves = Mapping[tuple[_Key, str], Sequence["_Row"]]
"""The rows of each (key, metric)."""


class _Row(NamedTuple):
    where: str
    key: _Key
    metric: str
    model: str
    family: str
    flops: float
    score: float
    chance: float
    high: float | None
    companion: float


def read_scores(path: str | Path) -> ScoreTable:
    """Curves of a CSV file with a header line; columns in any order, other columns are refused.

    `task` and `score`, and compute as `flops` (also `compute`, `train_flops`, `train_flops_6nd`) or as `params` and
    `tokens` (6 * params * tokens; for a mixture of experts give active parameters). Optional: `model`, `family` (also
    `model_family`), `metric`, `suite`, `source`, `shots`, `step`, `chance` (`chance_low`: the score of guessing),
    `high` (`max`: the best possible score, 1 by default; 0 says that lower is better, with 1 the worst), `companion` (a
    smooth metric of the same run). A file may also hold the companion as rows of its own under one of `SMOOTH`.

    Rows without a known compute, and untrained ones (compute 0), are left out; `notes` says how many and what to add.

    Raises ValueError, naming file and line, for a file that is missing, unreadable or empty; a column that is unknown,
    missing or given twice; a cell that is not a number; a score outside its range; one curve with two chances or highs.
    """
    path = Path(path)
    rows, left_out = _rows(path)
    notes = []
    if left_out["unknown"]:
        notes.append(
            f"{left_out['unknown']} rows have no known compute and are left out; "
            "fill in flops, or both params and tokens, to use them"
        )
    if left_out["untrained"]:
        notes.append(f"{left_out['untrained']} rows have compute 0 (untrained models) and are left out")
    if not rows:
        raise ValueError(f"{path}: no row has a score and a known compute; {'; '.join(notes) or 'add rows'}")
    curves: dict[tuple[_Key, str], list[_Row]] = {}
    for row in rows:
        curves.setdefault((row.key, row.metric), []).append(row)
    found = [_curve(key, metric, curves) for key, metric in curves if metric not in UNBOUNDED]
    if not found:
        raise ValueError(
            f"{path}: holds only {', '.join(UNBOUNDED)}, which have no range; add rows of a bounded metric"
        )
    return ScoreTable(found, notes)


def join_tables(*tables: ScoreTable) -> ScoreTable:
    """The curves and notes of several tables in one."""
    return ScoreTable([curve for t in tables for curve in t.curves], [note for t in tables for note in t.notes])


# ------------------------------------------------------------------------------------------------------------ curves


def _curve(key: _Key, metric: str, curves: _Curves) -> TaskScores:
    rows = sorted(curves[key, metric], key=lambda row: row.flops)
    high = _one(rows, "high", [row.high for row in rows])
    best = high if high is not None else 0.0 if metric in LOWER_IS_BETTER else 1.0
    worst = 1.0 if best == 0 else 0.0
    low, top = sorted((worst, best))
    for row in rows:
        if not low <= row.score <= top:
            raise ValueError(
                f"{row.where}: score {row.score:g} lies outside {low:g} to {top:g}; "
                "add a column high with the best possible score (100 for percent, 0 where lower is better)"
            )
    chances = [None if math.isnan(row.chance) else row.chance for row in rows]
    chance = _one(rows, "chance", chances)
    if chance is not None and not low <= chance <= top:
        raise ValueError(
            f"{rows[0].where}: chance {chance:g} lies outside {low:g} to {top:g}; give it in the score's unit"
        )
    model_N = np.array([row.model for row in rows])
    family_N = np.array([row.family for row in rows])
    repeated = {model for model in set(model_N.tolist()) if model and (model_N == model).sum() > 1}
    group_N = np.array([row.model if row.model in repeated else row.family or row.model for row in rows])
    companion, companion_N = _companion(key, metric, rows, curves)
    return TaskScores(
        label=_label(key, metric, curves),
        task=key.task,
        metric=metric,
        source=key.source,
        log_flops_N=np.log10([row.flops for row in rows]),
        score_N=np.array([row.score for row in rows]),
        model_N=model_N,
        family_N=family_N,
        group_N=group_N,
        chance=math.nan if chance is None else chance,
        worst=worst,
        best=best,
        companion=companion,
        companion_N=companion_N,
    )


def _label(key: _Key, metric: str, curves: _Curves) -> str:
    """Task and metric, and what else it takes to tell the curve from the others."""
    alike = [other for other, its_metric in curves if (other.task, its_metric) == (key.task, metric)]
    words = [word for word in (key.task, metric) if word]
    for name in ("suite", "source", "shots"):
        if len({getattr(other, name) for other in alike}) > 1:
            words.append(f"{key.shots}-shot" if name == "shots" else getattr(key, name))
    return " ".join(words)


def _companion(key: _Key, metric: str, rows: Sequence[_Row], curves: _Curves) -> tuple[str, np.ndarray]:
    """Name and values of the smooth metric of the same runs: the column's where it is filled, else other rows'."""
    given_N = np.array([row.companion for row in rows])
    if not np.isnan(given_N).all():
        return "companion", given_N
    if metric not in SMOOTH:
        for name in SMOOTH:
            if (key, name) in curves:
                known = {(row.model, row.flops): row.score for row in curves[key, name]}
                return name, np.array([known.get((row.model, row.flops), math.nan) for row in rows])
    return "", given_N


def _one(rows: Sequence[_Row], name: str, values: Sequence[float | None]) -> float | None:
    """The one value that all rows of a curve share."""
    for row, value in zip(rows, values, strict=True):
        if value != values[0]:
            raise ValueError(
                f"{row.where}: {name} {value} differs from {values[0]} elsewhere in the same curve (one task, metric, "
                "source and number of shots); give one, or tell the curves apart in the column source"
            )
    return values[0]


# --------------------------------------------------------------------------------------------------------------- CSV


def _rows(path: Path) -> tuple[list[_Row], dict[str, int]]:
    rows: list[_Row] = []
    left_out = {"unknown": 0, "untrained": 0}
    header: list[str] = []
    for where, cells in csv_lines(path, columns="task, score and flops"):
        if not header:
            header = _header(path, cells)
        elif len(cells) != len(header):
            raise ValueError(f"{where}: has {len(cells)} cells, the header {len(header)}")
        else:
            row = _row(where, dict(zip(header, cells, strict=True)))
            if row.flops > 0:
                rows.append(row)
            else:
                left_out["untrained" if row.flops == 0 else "unknown"] += 1
    if not header:
        raise ValueError(f"{path}: holds no rows; give a header line with task,score,flops and a line for each model")
    return rows, left_out


def _header(path: Path, cells: Sequence[str]) -> list[str]:
    meaning = {name: column for column, names in COLUMNS.items() for name in names}
    known: list[str] = []
    for cell in cells:
        if cell.lower() not in meaning:
            raise ValueError(f"{path}: unknown column {cell!r}{nearest(cell.lower(), meaning)}; rename or remove it")
        if meaning[cell.lower()] in known:
            raise ValueError(f"{path}: two columns hold {meaning[cell.lower()]}; keep one")
        known.append(meaning[cell.lower()])
    missing = [name for name in ("task", "score") if name not in known]
    if "flops" not in known and not {"params", "tokens"} <= set(known):
        missing.append("flops (or both params and tokens)")
    if missing:
        raise ValueError(f"{path}: missing column {', '.join(missing)}")
    return known


def _row(where: str, cells: Mapping[str, str]) -> _Row:
    if not cells["task"]:
        raise ValueError(f"{where}: the task is empty; name the curve this score belongs to")
    score = _number(where, "score", cells)
    if not math.isfinite(score):
        raise ValueError(f"{where}: a score must be a finite number, got {cells['score']!r}; leave the line out")
    high = _number(where, "high", cells)
    flops = _number(where, "flops", cells)
    if math.isnan(flops):
        flops = 6 * _number(where, "params", cells) * _number(where, "tokens", cells)
    if flops < 0 or math.isinf(flops):
        raise ValueError(f"{where}: compute must be a positive number of FLOPs, got {flops:g}")
    return _Row(
        where=where,
        key=_Key(cells["task"], cells.get("suite", ""), cells.get("source", ""), cells.get("shots", "")),
        metric=cells.get("metric", ""),
        model=cells.get("model", ""),
        family=cells.get("family", ""),
        flops=flops,
        score=score,
        chance=_number(where, "chance", cells),
        high=None if math.isnan(high) else high,
        companion=_number(where, "companion", cells),
    )


def _number(where: str, name: str, cells: Mapping[str, str]) -> float:
    """The number in a cell, nan where it is empty or the file has no such column."""
    cell = cells.get(name, "")
    try:
        return float(cell) if cell else math.nan
    except ValueError:
        raise ValueError(f"{where}: {name} {cell!r} is not a number") from None
