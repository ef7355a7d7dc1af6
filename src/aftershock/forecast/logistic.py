"""Ridge logistic regression in plain numpy: the fit, its penalty chosen over groups left out, log-odds for new rows.

Legend: N rows, C features, D = 1 + C with the intercept. Pure; must not import torch or scipy, nor know runs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

PENALTIES: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Penalties tried, in half decades: from next to none to one that hides all but the strongest feature of 100 rows."""
MAX_STEPS = 100
"""Newton's method takes about ten; it halves a step that does not descend."""
GRADIENT = 1e-9
"""The fit ends where no element of the gradient, per row, is larger."""


class Logistic(NamedTuple):
    """P(y) = 1 / (1 + exp(-(intercept + (x - center) / scale . coef))); scale 1 and coef 0 for a constant feature."""

    center_C: np.ndarray
    scale_C: np.ndarray
    coef_C: np.ndarray
    intercept: float
    penalty: float

    def log_odds(self, x_NC: np.ndarray) -> np.ndarray:
        """log(P / (1 - P)) of each row, natural log."""
        return self.intercept + ((x_NC - self.center_C) / self.scale_C) @ self.coef_C


def fit_logistic(x_NC: np.ndarray, y_N: np.ndarray, *, penalty: float) -> Logistic:
    """Minimise sum_N log(1 + exp(-s eta)) + penalty / 2 |coef|^2, s = 1 where y else -1, by Newton's method.

    Features are standardized on these rows (le Cessie and van Houwelingen 1992); the intercept is free. With C = 0
    this is the share of y. Raises ValueError where all y are equal, and for a penalty that is not above 0: without one
    rows that a line separates have no finite fit.
    """
    if penalty <= 0:
        raise ValueError(f"the penalty must be above 0, got {penalty:g}")
    outcome_N = np.asarray(y_N, dtype=np.float64)
    share = float(outcome_N.mean()) if len(outcome_N) else 0.0
    if not 0 < share < 1:
        raise ValueError(f"a logistic fit needs rows of both outcomes, got {len(outcome_N)} of one")
    center_C = x_NC.mean(axis=0)
    spread_C = x_NC.std(axis=0)
    scale_C = np.where(spread_C > 0, spread_C, 1.0)
    z_ND = np.concatenate([np.ones((len(x_NC), 1)), (x_NC - center_C) / scale_C], axis=1)
    ridge_D = np.full(z_ND.shape[1], penalty)
    ridge_D[0] = 0.0
    beta_D = np.zeros(z_ND.shape[1])
    beta_D[0] = np.log(share / (1 - share))
    for _ in range(MAX_STEPS):
        p_N = probability(z_ND @ beta_D)
        gradient_D = z_ND.T @ (p_N - outcome_N) + ridge_D * beta_D
        if np.abs(gradient_D).max() <= GRADIENT * len(z_ND):
            return Logistic(center_C, scale_C, beta_D[1:], float(beta_D[0]), penalty)
        hessian_DD = (z_ND.T * (p_N * (1 - p_N))) @ z_ND + np.diag(ridge_D)
        beta_D = _descend(z_ND, outcome_N, ridge_D, beta_D, np.linalg.solve(hessian_DD, gradient_D))
    raise AssertionError(f"no convergence in {MAX_STEPS} steps of Newton's method on a convex function")


def choose_penalty(x_NC: np.ndarray, y_N: np.ndarray, group_N: np.ndarray) -> float:
    """The one of `PENALTIES` whose fits, each group left out in turn, have the lowest log score there; the larger of
    equals.

    Raises ValueError with fewer than two groups, and where the rows without a group are all of one outcome.
    """
    groups = np.unique(group_N)
    if len(groups) < 2:
        raise ValueError(f"choosing a penalty takes two groups or more to leave one out, got {len(groups)}")
    if x_NC.shape[1] == 0:
        return PENALTIES[-1]
    totals = []
    for penalty in PENALTIES:
        folds = [(group_N != group, group_N == group) for group in groups]
        losses = [log_loss(fit_logistic(x_NC[i], y_N[i], penalty=penalty).log_odds(x_NC[o]), y_N[o]) for i, o in folds]
        totals.append(float(np.concatenate(losses).sum()))
    return max(penalty for penalty, total in zip(PENALTIES, totals, strict=True) if total <= min(totals))


def probability(log_odds_N: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-log_odds)), without overflow.

    >>> probability(np.array([-1e6, 0.0, 1e6])).tolist()
    [0.0, 0.5, 1.0]
    """
    return 0.5 * (1 + np.tanh(0.5 * log_odds_N))


def log_loss(log_odds_N: np.ndarray, y_N: np.ndarray) -> np.ndarray:
    """-log P(what happened) of each row [nats], exact also where P rounds to 1."""
    return np.logaddexp(0.0, np.where(y_N, -log_odds_N, log_odds_N))


def _descend(
    z_ND: np.ndarray, outcome_N: np.ndarray, ridge_D: np.ndarray, beta_D: np.ndarray, step_D: np.ndarray
) -> np.ndarray:
    """beta less the step, halved until the objective no longer rises."""

    def objective(at_D: np.ndarray) -> float:
        return float(log_loss(z_ND @ at_D, outcome_N > 0).sum() + 0.5 * (ridge_D * at_D**2).sum())

    before = objective(beta_D)
    slack = 1e-12 * (1 + abs(before))  # rounding of the objective itself, near its minimum
    while objective(beta_D - step_D) > before + slack:
        step_D = step_D / 2
    return beta_D - step_D
