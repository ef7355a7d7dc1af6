"""What a claim is: a published statement, a criterion fixed before any run, and perhaps the study that judges it.

Pure data; a criterion is a function from what a study found to a `Judgement`. Must not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from aftershock.forecast.scores import ScoreTable
from aftershock.lab.sweep import SweepSpec

Verdict = Literal["supported", "contradicted", "inconclusive"]


class Signal(NamedTuple):
    """One recorded signal of a run: `values` [N] at `steps` [N], ascending; values need not be finite."""

    steps: Sequence[int]
    values: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """One run as a criterion sees it. `num_params` is the paper's N, without embedding and head; losses in nats.

    `final_loss` None: the run diverged. `initial_loss` is the evaluation loss before the first step, l0.
    """

    size: str
    arm: str
    lr: float
    seed: int
    num_params: int
    initial_loss: float
    final_loss: float | None
    signals: Mapping[str, Signal] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """A verdict and what it rests on. `effect` and `interval` are nan where nothing could be measured.

    `meaning` says what the effect is, with its unit. `detail` holds small tables: title -> row -> number.
    """

    verdict: Verdict
    effect: float
    interval: tuple[float, float]
    meaning: str
    detail: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


Criterion = Callable[[Sequence[RunResult]], Judgement]


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a study writes down before it trains the rest: `foretell` of the runs of `sweep`, a part of the study.

    `foretell` is deterministic and gives what JSON can hold. See `claims.foretold` for how the order is kept.
    """

    sweep: SweepSpec
    foretell: Callable[[Sequence[RunResult]], Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """How a claim is judged at tiny scale: the runs, the statistics read of each (shell patterns), the criterion.

    With a `forecast`, what it foretells is on disk before any run that is not in its own sweep is trained.
    """

    sweep: SweepSpec
    criterion: Criterion
    signals: tuple[str, ...] = ()
    forecast: Forecast | None = None


Line = Mapping[str, Any]
"""One piece of evidence as it lies in a study's JSON lines; it has an `id`, a `seed` and its core-`seconds`."""


@dataclass(frozen=True, kw_only=True)
class LineTrial:
    """How a claim is judged on the JSON lines of a study, a key of `study.STUDIES`, which other claims may share."""

    study: str
    criterion: Callable[[Sequence[Line]], Judgement]


@dataclass(frozen=True, kw_only=True)
class ScoreTrial:
    """How a claim is judged on benchmark scores of published models: tables that the user has, by their file names."""

    files: tuple[str, ...]
    criterion: Callable[[ScoreTable], Judgement]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement made in public. A criterion that changes raises `version`; all versions stay on record."""

    id: str
    source: str
    statement: str
    criterion: str
    version: int = 1
    trial: Trial | LineTrial | ScoreTrial | None = None


class Record(NamedTuple):
    """A judgement on disk: everything needed to read it, doubt it and repeat it."""

    id: str
    version: int
    scale: str
    verdict: Verdict
    effect: float | None
    interval: tuple[float, float] | None
    meaning: str
    detail: dict[str, dict[str, float | None]]
    statement: str
    criterion: str
    num_seeds: int
    run_ids: list[str]
    config_digest: str
    core_s: float
    aftershock: str
    torch: str | None
    machine: dict[str, Any]
    date: str
    command: str
