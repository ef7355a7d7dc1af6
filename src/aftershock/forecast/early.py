"""From the first steps of a run to its outcome: predictors with their scores on runs that their fit has not seen.

Every predictor is a ridge logistic regression on some of `early_runs.FEATURES`, its penalty chosen by leaving each
seed out of the runs it is fitted on. Scored twice: on seeds left out in turn, and on the larger sizes from the smaller.
Legend: N runs with a known outcome, C features. Must not import torch at the top.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from aftershock.forecast.early_runs import FEATURES, EarlyRuns, read_early
from aftershock.forecast.early_scores import LEVEL, Estimate, Scores, brier_gain, score_predictor
from aftershock.forecast.logistic import Logistic, choose_penalty, fit_logistic, probability
from aftershock.forecast.outlook import plain

SCHEMA = 1
SIGNALS, RATE_ALONE = "signals", "rate alone"
TRIVIAL = ("base rate", "loss so far", "gradient-norm MAD-z")
"""What an early forecast must beat to be worth a line."""
PREDICTORS: Mapping[str, tuple[str, ...]] = {
    SIGNALS: tuple(FEATURES),
    "signals without rate, N": tuple(key for key in FEATURES if key not in ("rate", "size")),
    "attention logit": ("logit",),
    RATE_ALONE: ("rate", "size"),
    "base rate": (),
    "loss so far": ("loss",),
    "gradient-norm MAD-z": ("grad_norm",),
}
"""Features of each. `RATE_ALONE` knows nothing of the run but its settings, so it could speak before step 0. The MAD-z
is (log g - median) / (1.4826 MAD), g the gradient norm at the step, median and MAD those of the runs fitted: a fit to
it is the fit to log g, since features are standardized. (Against the run's own steps before, it told less.)"""
MIN_EACH = 3
"""Runs of each outcome that a fit needs, and its score: with fewer a single run decides both. Ours."""
MIN_CURVES = 3
"""Curves that a score needs: an interval over fewer says nothing."""

OutcomeName = Literal["fails", "diverged"]


class Fitted(NamedTuple):
    """A feature of the main predictor and what one standard deviation of it adds to the log-odds [nats]."""

    key: str
    title: str
    coefficient: float


class Split(NamedTuple):
    """Scores on runs that the fits have not seen, `by` what was left out. `gain`: the share of the Brier score of
    `best_trivial`, the lowest of `TRIVIAL` here, that `SIGNALS` takes away; `gain_over_rate`: of `RATE_ALONE`'s.
    `refused` says why there are no scores."""

    by: Literal["seeds", "sizes"]
    fitted: str
    scored: str
    num_scored: int
    num_happened: int
    num_curves: int
    scores: tuple[Scores, ...]
    best_trivial: str
    gain: Estimate | None
    gain_over_rate: Estimate | None
    refused: str


class Outcome(NamedTuple):
    """One outcome, scored on both splits; `fitted` and `penalty` of the main predictor on all runs with an outcome."""

    name: OutcomeName
    title: str
    num_happened: int
    num_runs: int
    splits: tuple[Split, ...]
    fitted: tuple[Fitted, ...]
    penalty: float | None
    refused: str


class Chance(NamedTuple):
    """The probability that a run fails. Of a run whose outcome is known: by the fit that left its seed out; else by
    that of all runs with an outcome. None where it was not seen at the step, or too few runs are there to fit."""

    run_id: str
    size: str
    lr: float
    seed: int
    status: str
    fails: bool | None
    probability: float | None


class Early(NamedTuple):
    """What step `step` of `steps` told of the ends of these runs. Intervals hold at `level`, over curves."""

    schema: int
    study: str
    arm: str
    step: int
    steps: int
    level: float
    features: tuple[str, ...]
    outcomes: tuple[Outcome, ...]
    chances: tuple[Chance, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists; what is not finite is null."""
        return plain(self)


class Rows(NamedTuple):
    """Runs with features and a known outcome, as columns. Sizes (in ascending N) and curves are numbered from 0."""

    ids: np.ndarray
    x_NC: np.ndarray
    y_N: np.ndarray
    seed_N: np.ndarray
    size_N: np.ndarray
    curve_N: np.ndarray

    def only(self, chosen_N: np.ndarray) -> Rows:
        """Some of the rows, their curves numbered anew."""
        rows = Rows(*(column[chosen_N] for column in self))
        return rows._replace(curve_N=np.unique(rows.curve_N, return_inverse=True)[1])

    def columns(self, chosen: Sequence[int]) -> Rows:
        """Some of the features."""
        return self._replace(x_NC=self.x_NC[:, list(chosen)])


def early_divergence(folders: Sequence[str | Path], *, arm: str = "", at: int | None = None) -> Early:
    """How well step `at` of a run (by default the first measured at 2 %) tells its end, from the runs of these studies.

    Raises ValueError as `read_early` does, and where neither split can be scored for the outcome `fails`, with what to
    add. Deterministic.

    Example:
        early = early_divergence(["out/early"], arm="no_qk_norm")
        print(early.outcomes[0].splits[1].gain)
    """
    return judge_early(read_early(folders, arm=arm, at=at))


def judge_early(found: EarlyRuns) -> Early:
    """`early_divergence` of runs already read."""
    fails, died = judge_outcome(found, "fails"), judge_outcome(found, "diverged")
    refusals = [fails.refused] if fails.refused else [split.refused for split in fails.splits]
    if all(refusals):
        raise ValueError(f"{found.study}, arm {found.arm!r}, step {found.step}: {'; '.join(dict.fromkeys(refusals))}")
    keys = tuple(feature.key for feature in found.features)
    absent = [name for name, wanted in PREDICTORS.items() if wanted and not set(wanted) & set(keys)]
    notes = [f"no predictor {name!r}: none of its features is there" for name in absent]
    return Early(
        schema=SCHEMA,
        study=found.study,
        arm=found.arm,
        step=found.step,
        steps=found.steps,
        level=LEVEL,
        features=keys,
        outcomes=(fails, died),
        chances=chances(found),
        notes=(*found.notes, *notes),
    )


def judge_outcome(found: EarlyRuns, name: OutcomeName) -> Outcome:
    """Both splits for one outcome, and the main predictor fitted on all runs."""
    title = {"fails": "the run fails", "diverged": "the run diverges"}[name]
    rows = rows_of(found, name)
    happened, num_runs = int(rows.y_N.sum()), len(rows.y_N)
    if min(happened, num_runs - happened) < MIN_EACH:
        refused = (
            f"{title} in {happened} of the {num_runs} runs with a known outcome that were seen at step {found.step}; "
            f"{MIN_EACH} of each outcome are needed: add {'higher' if happened < MIN_EACH else 'lower'} rates, seeds "
            "or sizes"
        )
        return Outcome(name, title, happened, num_runs, (), (), None, refused)
    keys = [feature.key for feature in found.features]
    sizes = list(dict.fromkeys(run.size for run in found.runs))
    splits = (_by_seeds(rows, keys), _by_sizes(rows, keys, sizes))
    if too_little(rows, leave=1):
        return Outcome(name, title, happened, num_runs, splits, (), None, "")
    fit = _fit(rows)
    fitted = [Fitted(f.key, f.title, float(c)) for f, c in zip(found.features, fit.coef_C, strict=True)]
    return Outcome(name, title, happened, num_runs, splits, tuple(fitted), fit.penalty, "")


def chances(found: EarlyRuns) -> tuple[Chance, ...]:
    """The probability of `fails` for every run that was seen at the step."""
    rows = rows_of(found, "fails")
    by_id: dict[str, float] = {}
    if not too_little(rows, leave=2):
        by_id |= zip(rows.ids.tolist(), probability(_seeds_left_out(rows)).tolist(), strict=True)
    still_open = [run for run in found.runs if run.fails is None and run.features is not None]
    if still_open and not too_little(rows, leave=1):
        p_N = probability(_fit(rows).log_odds(np.array([run.features for run in still_open])))
        by_id |= zip((run.run_id for run in still_open), p_N.tolist(), strict=True)
    return tuple(
        Chance(run.run_id, run.size, run.lr, run.seed, run.status, run.fails, by_id.get(run.run_id))
        for run in found.runs
    )


def rows_of(found: EarlyRuns, name: OutcomeName) -> Rows:
    """The runs that were seen at the step and whose outcome is known."""
    known = []
    for run in found.runs:
        happened = run.fails if name == "fails" else run.diverged
        if run.features is not None and happened is not None:
            known.append((run, run.features, happened))
    sizes = list(dict.fromkeys(run.size for run in found.runs))
    curves = list(dict.fromkeys((run.size, run.seed) for run, _, _ in known))
    return Rows(
        ids=np.array([run.run_id for run, _, _ in known]),
        x_NC=np.array([features for _, features, _ in known]).reshape(len(known), len(found.features)),
        y_N=np.array([happened for _, _, happened in known], dtype=bool),
        seed_N=np.array([run.seed for run, _, _ in known], dtype=np.int64),
        size_N=np.array([sizes.index(run.size) for run, _, _ in known], dtype=np.int64),
        curve_N=np.array([curves.index((run.size, run.seed)) for run, _, _ in known], dtype=np.int64),
    )


def too_little(rows: Rows, *, leave: int) -> str:
    """Why these rows cannot be fitted with `leave` seeds left out, or empty: too few seeds, or one outcome without."""
    seeds = np.unique(rows.seed_N)
    if len(seeds) <= leave:
        return f"{len(seeds)} seeds, where leaving {leave} out takes {leave + 1}: add seeds"
    for out in itertools.combinations(seeds.tolist(), leave):
        y_N = rows.y_N[~np.isin(rows.seed_N, out)]
        if y_N.all() or not y_N.any():
            return (
                f"without seeds {', '.join(map(str, out))} all runs have one outcome: add seeds, or rates at the edge"
            )
    return ""


# ------------------------------------------------------------------------------------------------------------- splits


def _by_seeds(rows: Rows, keys: Sequence[str]) -> Split:
    """Each seed from the others; the penalty by leaving seeds out of those."""
    seeds = ", ".join(map(str, np.unique(rows.seed_N)))
    log_odds = {}
    refused = too_little(rows, leave=2) or _unscorable(rows)
    if not refused:
        log_odds = {name: _seeds_left_out(rows.columns(chosen)) for name, chosen in _chosen(keys).items()}
    return _split("seeds", "all other seeds", f"seeds {seeds}, each in turn", rows, log_odds, keys, refused)


def _by_sizes(rows: Rows, keys: Sequence[str], sizes: Sequence[str]) -> Split:
    """The larger half of the sizes (rounded down) from the smaller ones."""
    num_small = (len(sizes) + 1) // 2
    small, large = ", ".join(sizes[:num_small]), ", ".join(sizes[num_small:])
    if not large:
        return _split("sizes", small, "none", rows, {}, keys, f"one size, {small}: add a larger one")
    fitted, scored = rows.only(rows.size_N < num_small), rows.only(rows.size_N >= num_small)
    refused = too_little(fitted, leave=1) or _unscorable(scored)
    log_odds = {}
    if not refused:
        for name, chosen in _chosen(keys).items():
            log_odds[name] = _fit(fitted.columns(chosen)).log_odds(scored.columns(chosen).x_NC)
    return _split("sizes", small, large, scored, log_odds, keys, refused)


def _split(
    by: Literal["seeds", "sizes"],
    fitted: str,
    scored: str,
    rows: Rows,
    log_odds: Mapping[str, np.ndarray],
    keys: Sequence[str],
    refused: str,
) -> Split:
    """The scores of every predictor's log-odds of `rows`, and the gains of the main one."""
    scores = tuple(
        score_predictor(name, tuple(key for key in PREDICTORS[name] if key in keys), eta_N, rows.y_N, rows.curve_N)
        for name, eta_N in log_odds.items()
    )
    num_curves = len(np.unique(rows.curve_N))
    counts = (len(rows.y_N), int(rows.y_N.sum()), num_curves)
    if refused:
        return Split(by, fitted, scored, *counts, (), "", None, None, f"held-out {by}: {refused}")
    best = min((score.brier.value, score.predictor) for score in scores if score.predictor in TRIVIAL)[1]
    gain, over_rate = (
        brier_gain(log_odds[SIGNALS], log_odds[other], rows.y_N, rows.curve_N) for other in (best, RATE_ALONE)
    )
    return Split(by, fitted, scored, *counts, scores, best, gain, over_rate, "")


def _chosen(keys: Sequence[str]) -> dict[str, list[int]]:
    """Columns of each predictor that has any: what was not recorded is missing from all of them."""
    chosen = {name: [keys.index(key) for key in wanted if key in keys] for name, wanted in PREDICTORS.items()}
    return {name: columns for name, columns in chosen.items() if columns or not PREDICTORS[name]}


def _unscorable(rows: Rows) -> str:
    happened, num_curves = int(rows.y_N.sum()), len(np.unique(rows.curve_N))
    if num_curves < MIN_CURVES:
        return f"{num_curves} curves (sizes x seeds) to score, needs {MIN_CURVES}: add seeds"
    if min(happened, len(rows.y_N) - happened) < MIN_EACH:
        return (
            f"{happened} of the {len(rows.y_N)} runs to score have the outcome, needs {MIN_EACH} of each kind: add "
            "seeds, or rates at the edge"
        )
    return ""


def _seeds_left_out(rows: Rows) -> np.ndarray:
    """Log-odds [N], those of each seed by the fit of the others."""
    log_odds_N = np.empty(len(rows.y_N))
    for seed in np.unique(rows.seed_N):
        own_N = rows.seed_N == seed
        log_odds_N[own_N] = _fit(rows.only(~own_N)).log_odds(rows.x_NC[own_N])
    return log_odds_N


def _fit(rows: Rows) -> Logistic:
    return fit_logistic(rows.x_NC, rows.y_N, penalty=choose_penalty(rows.x_NC, rows.y_N, rows.seed_N))
