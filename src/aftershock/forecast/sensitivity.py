"""LR sensitivity: how much final loss a wrong learning rate costs, from anyone's losses.

The metric of Wortsman et al. 2023 (arXiv 2309.14322, section 2.2), its table over groups of runs, an interval, and the
rate at which training fails.
Shapes: N resamples, R rates. Knows losses only, no runs; imports numpy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeGuard

import numpy as np

from aftershock.config import nearest
from aftershock.forecast.cells import csv_lines

_COLUMNS = ("group", "lr", "loss")

FAIL_FRAC = 0.1
"""A run that ends with more than this share of its curve's gain in loss missing has failed. Our choice."""


class LossRow(NamedTuple):
    """The final loss of one run of `group` at peak rate `lr`. None, nan or infinite: the run diverged.

    Rows with the same group and rate are seeds of one setting.
    """

    group: str
    lr: float
    loss: float | None


class GroupSensitivity(NamedTuple):
    """One curve: its sensitivity, and the rate (the lowest, in a tie) and loss of its best point; unit of the loss."""

    group: str
    lr_sensitivity: float
    best_lr: float
    best_loss: float


class SensitivityInterval(NamedTuple):
    """A bootstrap percentile interval [`low`, `high`] around the sensitivity of one group."""

    group: str
    lr_sensitivity: float
    low: float
    high: float


def lr_sensitivity(losses: Iterable[float | None], l0: float) -> float:
    """Mean over the rates of min(loss, l0) - best, in the unit of the losses (nats for cross-entropy).

    lr_sensitivity = (1/R) sum_r min(losses[r], l0) - min_r losses[r]

    One final loss for each of R peak rates, weighted equally; the best rate contributes 0 and stays in the denominator.
    None, nan or infinite = diverged = l0, the evaluation loss at initialisation. Between 0, no rate is worse than
    another, and l0 - best. A curve that is equally bad everywhere scores 0: show it next to its losses.
    Source: Wortsman et al. 2023, section 2.2.

    >>> round(lr_sensitivity([3.9, 3.8, float("nan")], l0=10.8), 4)
    2.3667

    Raises ValueError when l0 is not finite, when there are no losses, when every run diverged, or when every loss lies
    above l0 (then l0 is not the loss at initialisation of these runs).
    """
    return _sensitivity(_capped(losses, l0, "the curve"))


def run_fails(loss: float | None, *, best: float, l0: float) -> bool:
    """Whether a run failed: it diverged, or loss > best + FAIL_FRAC * (l0 - best). Losses in nats.

    `best` is the lowest loss over the rates of the run's own size and arm, `l0` the loss at initialisation. A rate that
    is too low ends like this too: only a rate above the best one fails for being too high (see `failing_lr`).
    Source of the rule: none, Wortsman et al. 2023 judge by eye; the share is ours and the same everywhere.
    """
    return not _finite(loss) or loss > best + FAIL_FRAC * (l0 - best)


def failing_lr(lrs: Iterable[float], losses: Iterable[float | None], l0: float) -> float | None:
    """The lowest rate above the best one at which `run_fails`; None when none does up to the end of the ladder.

    One final loss [nats] for each rate, in any order. None says no more than that the failing rate lies above the
    highest one tried (it is censored there). In a tie the lower rate is the best.

    >>> failing_lr([0.01, 0.03, 0.1, 0.3], [2.3, 2.4, 2.9, None], l0=6.4)
    0.1

    Raises ValueError as `lr_sensitivity` does, and when the rates are not positive numbers, one for each loss.
    """
    ladder, curve = list(lrs), list(losses)
    if len(ladder) != len(curve) or len(set(ladder)) != len(ladder):
        raise ValueError(f"give one loss for each of distinct rates, got {len(ladder)} rates and {len(curve)} losses")
    if not all(math.isfinite(lr) and lr > 0 for lr in ladder):
        raise ValueError(f"a learning rate must be a positive number, got {_rates(ladder)}")
    best, best_lr = min(zip(_capped(curve, l0, "the curve"), ladder, strict=True))
    failing = [lr for lr, loss in zip(ladder, curve, strict=True) if lr > best_lr and run_fails(loss, best=best, l0=l0)]
    return min(failing, default=None)


def sensitivity_table(rows: Iterable[LossRow], l0: float) -> list[GroupSensitivity]:
    """One entry per group, in order of first appearance.

    Seeds are averaged per rate after capping each at l0, so a rate at which one seed of two diverged counts
    (loss + l0) / 2. `best_loss` is the lowest of these averages.

    >>> rows = [LossRow("a", 0.01, 4.0), LossRow("a", 0.1, None)]
    >>> sensitivity_table(rows, l0=6.0)
    [GroupSensitivity(group='a', lr_sensitivity=1.0, best_lr=0.01, best_loss=4.0)]

    Raises ValueError as `lr_sensitivity` does, naming the group, and when there are no rows, a rate is not a positive
    number, or the groups do not have the same rates: sensitivities are comparable only on one ladder.
    """
    table = []
    for group, seeds_by_lr in _by_group(rows).items():
        means = _seed_means(group, seeds_by_lr, l0)
        best_lr = min(means, key=lambda lr: (means[lr], lr))
        table.append(GroupSensitivity(group, _sensitivity(list(means.values())), best_lr, means[best_lr]))
    return table


def bootstrap_sensitivity(
    rows: Iterable[LossRow], l0: float, *, level: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> list[SensitivityInterval]:
    """Percentile bootstrap over seeds: the runs of each rate are drawn again, with replacement and independently.

    It measures the luck of the seeds, not the choice of rates; with two or three seeds a rate it is narrower than
    `level` says. A resample in which every run diverged has no sensitivity and is not counted. Deterministic in `seed`.

    Raises ValueError as `sensitivity_table` does, and when a rate of a group has only one run.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be at least 1, got {num_resamples}")
    rows = list(rows)
    groups = _by_group(rows)
    intervals = []
    for entry in sensitivity_table(rows, l0):
        seeds_by_lr = groups[entry.group]
        lone = [lr for lr, losses in seeds_by_lr.items() if len(losses) < 2]
        if lone:
            raise ValueError(
                f"group {entry.group!r} has one run at learning rate {lone[0]:g}; an interval needs two seeds or more"
            )
        generator = np.random.default_rng(seed)  # the same draws for every group: its interval does not know the others
        resampled = _resample(generator, list(seeds_by_lr.values()), l0, num_resamples)
        if not resampled.size:
            raise ValueError(f"no resample of group {entry.group!r} holds a run that trained; raise num_resamples")
        low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
        intervals.append(SensitivityInterval(entry.group, entry.lr_sensitivity, float(low), float(high)))
    return intervals


def read_losses_csv(path: str | Path) -> list[LossRow]:
    """Rows of a CSV file with the columns group, lr and loss, in any order, under a header line.

    An empty loss, `nan` or `inf` means that the run diverged (loss nan). Repeated (group, lr) are seeds. Empty lines
    are passed over.

    Raises ValueError, with the line where there is one, when the file is missing, unreadable or holds no rows; when a
    column is unknown, missing or given twice; and when a line has too few or too many cells, no group, a rate that is
    not a positive number, or a loss that is not a number.
    """
    path = Path(path)
    rows: list[LossRow] = []
    header: list[str] = []
    for where, cells in csv_lines(path, columns="group, lr, loss"):
        if not header:
            header = _header(path, cells)
        else:
            rows.append(_row(where, header, cells))
    if not rows:
        raise ValueError(f"{path}: holds no rows; give a header line group,lr,loss and one line per run")
    return rows


# ------------------------------------------------------------------------------------------------------- the metric


def _finite(loss: float | None) -> TypeGuard[float]:
    return loss is not None and math.isfinite(loss)


def _cap(loss: float | None, l0: float) -> float:
    return min(loss, l0) if _finite(loss) else l0


def _capped(losses: Iterable[float | None], l0: float, whose: str) -> list[float]:
    """min(loss, l0) with diverged as l0, after the checks. `whose` names the curve in errors."""
    losses = list(losses)
    if not math.isfinite(l0):
        raise ValueError(f"l0, the loss at initialisation, must be a finite number, got {l0}")
    if not losses:
        raise ValueError(f"{whose} has no losses; give one final loss per learning rate")
    finite = [loss for loss in losses if _finite(loss)]
    if not finite:
        raise ValueError(f"every run of {whose} diverged, so it has no best loss to compare with; add a lower rate")
    if min(finite) > l0:
        raise ValueError(
            f"every loss of {whose} lies above l0={l0:g} (the lowest is {min(finite):g}); "
            "give the evaluation loss at initialisation as l0, in the same unit"
        )
    return [_cap(loss, l0) for loss in losses]


def _sensitivity(capped: Sequence[float]) -> float:
    best = min(capped)
    return math.fsum(loss - best for loss in capped) / len(capped)


def _seed_means(group: str, seeds_by_lr: Mapping[float, Sequence[float | None]], l0: float) -> dict[float, float]:
    """Capped loss per rate, averaged over seeds."""
    capped = iter(_capped([loss for losses in seeds_by_lr.values() for loss in losses], l0, f"group {group!r}"))
    per_lr = {lr: [next(capped) for _ in losses] for lr, losses in seeds_by_lr.items()}
    return {lr: math.fsum(losses) / len(losses) for lr, losses in per_lr.items()}


def _by_group(rows: Iterable[LossRow]) -> dict[str, dict[float, list[float | None]]]:
    """Seeds by group and ascending rate, all groups on the same ladder."""
    groups: dict[str, dict[float, list[float | None]]] = {}
    for group, lr, loss in rows:
        if not (math.isfinite(lr) and lr > 0):
            raise ValueError(f"group {group!r}: a learning rate must be a positive number, got {lr}")
        groups.setdefault(group, {}).setdefault(lr, []).append(loss)
    if not groups:
        raise ValueError("there are no losses; give at least one row of group, lr, loss")
    first, *others = groups
    for other in others:
        if groups[first].keys() != groups[other].keys():
            raise ValueError(
                f"groups {first!r} and {other!r} have different learning rates (only {first!r}: "
                f"{_rates(groups[first].keys() - groups[other].keys())}; only {other!r}: "
                f"{_rates(groups[other].keys() - groups[first].keys())}); give every group the same rates"
            )
    return {group: dict(sorted(seeds_by_lr.items())) for group, seeds_by_lr in groups.items()}


def _rates(lrs: Iterable[float]) -> str:
    return ", ".join(f"{lr!r}" for lr in sorted(lrs)) or "none"


def _resample(
    generator: np.random.Generator, seeds: Sequence[Sequence[float | None]], l0: float, num_resamples: int
) -> np.ndarray:
    """Sensitivities of `num_resamples` redrawn curves, those left out of which every run diverged."""
    mean_NR = np.empty((num_resamples, len(seeds)))
    trained_N = np.zeros(num_resamples, dtype=bool)
    for r, losses in enumerate(seeds):
        draw_NS = generator.integers(len(losses), size=(num_resamples, len(losses)))
        mean_NR[:, r] = np.array([_cap(loss, l0) for loss in losses])[draw_NS].mean(axis=1)
        trained_N |= np.array([_finite(loss) for loss in losses])[draw_NS].any(axis=1)
    return (mean_NR.mean(axis=1) - mean_NR.min(axis=1))[trained_N]


# ------------------------------------------------------------------------------------------------------------- CSV


def _header(path: Path, cells: Sequence[str]) -> list[str]:
    names = [cell.lower() for cell in cells]
    for cell, name in zip(cells, names, strict=True):
        if name not in _COLUMNS:
            raise ValueError(f"{path}: unknown column {cell!r}{nearest(name, _COLUMNS)}")
        if names.count(name) > 1:
            raise ValueError(f"{path}: column {name!r} is given twice; keep one")
    missing = [name for name in _COLUMNS if name not in names]
    if missing:
        raise ValueError(f"{path}: missing column {', '.join(missing)}; the header must name group, lr and loss")
    return names


def _row(where: str, header: Sequence[str], cells: Sequence[str]) -> LossRow:
    if len(cells) != len(header):
        raise ValueError(f"{where}: has {len(cells)} cells, the header {len(header)}")
    values = dict(zip(header, cells, strict=True))
    if not values["group"]:
        raise ValueError(f"{where}: the group is empty; name the curve this run belongs to")
    lr = _number(where, "lr", values["lr"])
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"{where}: lr must be a positive number, got {values['lr']}")
    loss = _number(where, "loss", values["loss"]) if values["loss"] else math.nan
    return LossRow(values["group"], lr, loss if math.isfinite(loss) else math.nan)


def _number(where: str, name: str, cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        raise ValueError(f"{where}: {name} {cell!r} is not a number") from None
