"""From a study of the lab to what the fits see: one arm's runs with their ends and signals, checked to be comparable.

Legend: a curve is one seed at one size over all rates. Readings and brackets are intervals in decades (log10), as in
`fits`: a run that diverged is known to have gone at least as far as its last finite value, so it is kept, not dropped.
Must not import torch: a study is read in a second.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from aftershock.config import from_dict, leaves, nearest, to_dict
from aftershock.forecast.sensitivity import failing_lr, run_fails
from aftershock.lab.recipe import DecoderConfig, RunConfig
from aftershock.store.study import Study, StudyRow

EARLY_FRAC = 0.02
"""The early logit is read at 2 % of the run (Wortsman et al. 2023, figure 9: step 2e3 of 1e5)."""
LATEST_FRAC = 0.05
"""A first measurement later than this is not early: there are none, and the note says how to get them. Ours."""
LAST = 5
"""An end value is the mean of this many last finite measurements."""
MIN_RATES, MIN_CURVES = 3, 4


_OWN = ("model.width", "model.depth", "model.heads", "optim.lr", "seed", "data_seed")
_LOOKING = ("log_every", "measure_every", "eval_every", "snapshot_every")


class Quantity(NamedTuple):
    """A signal that is forecast; `grows` when trouble drives it up, so that a run that died bounds it from below."""

    key: str
    title: str
    statistic: str
    moment: Literal["early", "end"]
    grows: bool


LOGIT, LOG_Z, GRADIENT = "attn/blocks.0/max_abs_logit", "output/head/abs_log_z", "grad_clipped/blocks.0.mlp.in/rms"
OUTPUTS = "output/blocks.*/rms"
"""The last block's is the one that is read."""

QUANTITIES = {
    quantity.key: quantity
    for quantity in (
        Quantity("early_logit", "max attention logit at 2 %", LOGIT, "early", True),
        Quantity("logit", "max attention logit at the end", LOGIT, "end", True),
        Quantity("abs_log_z", "|log Z| at the end", LOG_Z, "end", True),
        Quantity("output_rms", "output RMS at the end", OUTPUTS, "end", True),
        Quantity("grad_rms", "gradient RMS at the end", GRADIENT, "end", False),
    )
}
"""Logits: block 0. Gradient: the first MLP matrix of block 0, after clipping, which is what AdamW compares with eps."""


class Reading(NamedTuple):
    """A value in decades: a point where both ends are equal, else all that is known of it."""

    low: float
    high: float


class Observation(NamedTuple):
    """One run. `fails` as `sensitivity.run_fails` above the best rate of its own curve; `seconds` of one core."""

    run_id: str
    size: str
    width: int
    depth: int
    num_params: int
    lr: float
    seed: int
    initial_loss: float
    final_loss: float | None
    fails: bool
    seconds: float
    readings: Mapping[str, Reading]


class Curve(NamedTuple):
    """One seed of one size: the decades between which its failing rate lies, infinite where the ladder ends."""

    size: str
    width: int
    depth: int
    num_params: int
    seed: int
    bracket: Reading


class Observations(NamedTuple):
    """One arm of one or more studies. `config` is that of its first run: only size, rate and seed differ."""

    study: str
    arm: str
    config: RunConfig
    runs: tuple[Observation, ...]
    notes: tuple[str, ...]

    @property
    def sizes(self) -> list[str]:
        """Ascending in N."""
        return list(dict.fromkeys(run.size for run in sorted(self.runs, key=lambda run: run.num_params)))

    @property
    def rates(self) -> list[float]:
        """Ascending."""
        return sorted({run.lr for run in self.runs})

    @property
    def curves(self) -> list[Curve]:
        """Every seed of every size, in ascending N."""
        return curves_of(self.runs)

    def without(self, size: str) -> Observations:
        """The same without one size."""
        return self._replace(runs=tuple(run for run in self.runs if run.size != size))

    def only(self, size: str) -> Observations:
        """One size alone."""
        return self._replace(runs=tuple(run for run in self.runs if run.size == size))


def read_observations(folders: Sequence[str | Path], *, arm: str = "") -> Observations:
    """All finished and diverged runs of one arm of these studies. `arm` may be left out where there is one only.

    Raises ValueError for an arm that no study has; for runs that differ in more than size, rate and seed, with the
    fields; and where nothing can be fitted: no run done, one size, too few rates or curves, every run diverged, or a
    signal that no run recorded. Each says what to add.
    """
    where, studies, arm, mine = runs_of_arm(folders, arm)
    done = {run: pair for run, pair in mine.items() if pair[1].status in ("finished", "diverged")}
    if not done:
        raise ValueError(f"{where}: no run of arm {arm!r} is done; run the same sweep again to train them")
    configs = {run: from_dict(RunConfig, study.reader(run).config) for run, (study, _) in done.items()}
    config = check_settings(configs)
    notes = [f"{len(mine) - len(done)} runs that are not done are left out"] if len(done) < len(mine) else []
    series = [_read_series(study, [row for other, row in done.values() if other is study]) for study in studies]
    early, problems = _early_steps(series, config.steps)
    notes += problems
    died = {run: row.status == "diverged" for run, (_, row) in done.items()}
    readings = {
        run: _readings(named, step, died=died[run])
        for own, step in zip(series, early, strict=True)
        for run, named in own.items()
    }
    runs = [_observation(row, configs[run], readings.get(run, {})) for run, (_, row) in done.items()]
    found = Observations(where, arm, config, judged(runs), tuple(notes))
    check_enough(found)
    return found


class ArmRuns(NamedTuple):
    """The runs of one arm of some studies, done or not; `where`: the studies in words."""

    where: str
    studies: list[Study]
    arm: str
    runs: dict[str, tuple[Study, StudyRow]]


def runs_of_arm(folders: Sequence[str | Path], arm: str) -> ArmRuns:
    """Those of `arm`, which may be empty where there is one only. Raises ValueError for an arm that no study has."""
    studies = [Study(folder) for folder in folders]
    where = ", ".join(study.place.text for study in studies)
    rows = [(study, row) for study in studies for row in study.rows()]
    arms = list(dict.fromkeys(row.ref.arm for _, row in rows))
    if not arm and len(arms) > 1:
        raise ValueError(f"{where} has {len(arms)} arms; choose one with --arm: {', '.join(arms)}")
    arm = arm or (arms[0] if arms else "")
    if arm not in arms:
        raise ValueError(f"{where} has no arm {arm!r}{nearest(arm, arms)}")
    return ArmRuns(where, studies, arm, {row.ref.run_id: (study, row) for study, row in rows if row.ref.arm == arm})


def check_settings(configs: Mapping[str, RunConfig]) -> RunConfig:
    """The first config, once all are seen to differ in size, rate and seed only. Raises ValueError with the fields."""
    first = next(iter(configs.values()))
    for config in configs.values():
        if not isinstance(config.model, DecoderConfig):
            raise ValueError(f"a forecast needs decoders, which have a width and a depth, got {config.model.kind}")
    settings = {run: _settings(config) for run, config in configs.items()}
    keys = dict.fromkeys(key for own in settings.values() for key in own)
    differ = {key: sorted({str(own.get(key)) for own in settings.values()}) for key in keys}
    mixed = [f"{key} ({', '.join(values)})" for key, values in differ.items() if len(values) > 1]
    if mixed:
        raise ValueError(
            f"the runs differ in {'; '.join(mixed)}; one arm may differ only in size, learning rate and seed: "
            "sweep each setting as an arm of its own, with heads in proportion to the width"
        )
    return first


def check_enough(found: Observations) -> None:
    """Raises ValueError where no forecast can rest on these runs, saying what to add."""
    where = f"{found.study}, arm {found.arm!r}"
    alive = [run for run in found.runs if run.final_loss is not None]
    if not alive:
        raise ValueError(f"{where}: every run diverged, so there is no best rate; add lower rates")
    if len(found.sizes) < 2:
        raise ValueError(
            f"{where} has one size, {found.sizes[0]}; a trend over size needs two, better three: add sizes"
        )
    thin = [size for size in found.sizes if len(found.only(size).rates) < MIN_RATES]
    if thin:
        raise ValueError(f"{where}: size {thin[0]} has {len(found.only(thin[0]).rates)} rates, needs {MIN_RATES}")
    if len(found.curves) < MIN_CURVES:
        raise ValueError(
            f"{where} has {len(found.curves)} curves (sizes x seeds), needs {MIN_CURVES}; add seeds or sizes"
        )
    lost = [q for q in QUANTITIES.values() if q.moment == "end" and not any(q.key in r.readings for r in found.runs)]
    if lost:
        raise ValueError(f"{where}: no run recorded {lost[0].statistic}; train with --set measure_every=10")


def curves_of(runs: Sequence[Observation]) -> list[Curve]:
    """The bracket of each curve's failing rate: (last rate before it, failing rate], in decades.

    Open above where no rate fails, open below where every run of the curve diverged.
    """
    curves = []
    for members in _by_curve(runs):
        lrs = [run.lr for run in members]
        if all(run.final_loss is None for run in members):
            bracket = Reading(-math.inf, math.log10(lrs[0]))
        else:
            start = failing_lr(lrs, [run.final_loss for run in members], max(run.initial_loss for run in members))
            below = max((lr for lr in lrs if start is None or lr < start), default=lrs[0])
            bracket = Reading(math.log10(below), math.inf if start is None else math.log10(start))
        first = members[0]
        curves.append(Curve(first.size, first.width, first.depth, first.num_params, first.seed, bracket))
    return curves


def judged(runs: Sequence[Observation]) -> tuple[Observation, ...]:
    """The runs in ascending order of N, seed and rate, with `fails` filled in."""
    result = []
    for members in _by_curve(runs):
        alive = [run for run in members if run.final_loss is not None]
        best = min(alive, key=lambda run: (run.final_loss, run.lr), default=None)
        for run in members:
            broken = best is None or run_fails(run.final_loss, best=best.final_loss or 0.0, l0=run.initial_loss)
            result.append(run._replace(fails=broken and (best is None or run.lr > best.lr)))
    return tuple(result)


def end_reading(values: Sequence[float], *, died: bool, grows: bool) -> Reading | None:
    """An end value from a whole series: mean of the last `LAST` finite ones.

    Of a run that died, the last finite one is a lower bound where trouble drives the signal up, and says nothing of
    its end otherwise. None where no value is finite and positive.
    """
    known = [value for value in values if math.isfinite(value) and value > 0]
    if not known:
        return None
    if died:
        return Reading(math.log10(known[-1]), math.inf) if grows else Reading(-math.inf, math.inf)
    value = math.log10(sum(known[-LAST:]) / len(known[-LAST:]))
    return Reading(value, value)


def early_reading(steps: Sequence[int], values: Sequence[float], step: int, *, died: bool) -> Reading | None:
    """The value at `step`; of a run that died before, its last finite value as a lower bound. None where unknown."""
    known = {int(s): v for s, v in zip(steps, values, strict=True) if math.isfinite(v) and v > 0}
    if step in known:
        value = math.log10(known[step])
        return Reading(value, value)
    before = [s for s in known if s < step]
    return Reading(math.log10(known[max(before)]), math.inf) if before and died else None


def early_step(measured: Iterable[int], steps: int) -> tuple[int | None, str]:
    """The first measured step at 2 % of the run or later, and why there is none."""
    after = [step for step in sorted(measured) if step >= EARLY_FRAC * steps]
    if after and after[0] <= LATEST_FRAC * steps:
        return after[0], ""
    wanted = max(1, math.ceil(EARLY_FRAC * steps))
    return None, (
        f"no measurement between {EARLY_FRAC:.0%} and {LATEST_FRAC:.0%} of the run, so no early logit; "
        f"train with --set measure_every={wanted}"
    )


# ------------------------------------------------------------------------------------------------------- the study


def _by_curve(runs: Sequence[Observation]) -> list[list[Observation]]:
    groups: dict[tuple[int, str, int], list[Observation]] = {}
    for run in runs:
        groups.setdefault((run.num_params, run.size, run.seed), []).append(run)
    return [sorted(groups[key], key=lambda run: run.lr) for key in sorted(groups)]


def _settings(config: RunConfig) -> dict[str, Any]:
    """What must be equal: all but size, rate, seeds and when to look; the head dimension stands for the heads."""
    flat = leaves(to_dict(config))
    for key in (*_OWN, *_LOOKING):
        flat.pop(key, None)
    if isinstance(config.model, DecoderConfig):
        flat["head dimension"] = config.model.head_dim
    return flat


Named = dict[str, tuple[list[int], list[float]]]
"""Steps and values of each statistic of a run."""


def _read_series(study: Study, done: Sequence[StudyRow]) -> dict[str, Named]:
    """By run. One query: each makes the study's tables anew."""
    wanted = " or ".join(_named(statistic) for statistic in dict.fromkeys(q.statistic for q in QUANTITIES.values()))
    rows = study.sql(
        "select run_id, kind || '/' || place || '/' || stat as name, list(step order by step) as steps, "
        f"list(value order by step) as series from stats where ({wanted}) and {_among(done)} group by all"
    )
    series: dict[str, Named] = {}
    for row in rows:
        series.setdefault(row["run_id"], {})[row["name"]] = (row["steps"], row["series"])
    return series


def _early_steps(series: Sequence[Mapping[str, Named]], steps: int) -> tuple[list[int | None], list[str]]:
    """The early step of each study, and notes: logits of different steps do not compare, so the earliest one stands."""
    found, problems = [], []
    for own in series:
        step, problem = early_step({step for named in own.values() for step in named.get(LOGIT, ((), ()))[0]}, steps)
        found.append(step)
        problems += [problem] if problem and problem not in problems else []
    known = {step for step in found if step is not None}
    if len(known) > 1:
        problems.append(
            f"early logits were measured at steps {sorted(known)}; those after step {min(known)} are left out"
        )
    return [step if step == min(known, default=None) else None for step in found], problems


def _readings(named: Named, early: int | None, *, died: bool) -> dict[str, Reading]:
    outputs = sorted((name for name in named if name.startswith("output/blocks.")), key=_block_number)
    readings: dict[str, Reading] = {}
    for quantity in QUANTITIES.values():
        name = quantity.statistic if quantity.statistic != OUTPUTS else (outputs[-1] if outputs else "")
        if name not in named:
            continue
        steps, values = named[name]
        if quantity.moment == "end":
            reading = end_reading(values, died=died, grows=quantity.grows)
        else:
            reading = None if early is None else early_reading(steps, values, early, died=died)
        if reading is not None:
            readings[quantity.key] = reading
    return readings


def _named(statistic: str) -> str:
    kind, place, stat = statistic.split("/")
    return f"(kind = '{kind}' and place like '{place.replace('*', '%')}' and stat = '{stat}')"


def _among(rows: Sequence[StudyRow]) -> str:
    names = ", ".join(f"'{row.ref.run_id}'" for row in rows)
    return f"run_id in ({names})"


def _block_number(name: str) -> int:
    return int(name.split("/")[1].removeprefix("blocks."))


def _observation(row: StudyRow, config: RunConfig, readings: Mapping[str, Reading]) -> Observation:
    assert isinstance(config.model, DecoderConfig)
    summary = row.summary
    loss = summary["final_loss"]
    return Observation(
        run_id=row.ref.run_id,
        size=row.ref.size,
        width=config.model.width,
        depth=config.model.depth,
        num_params=summary["num_block_params"],
        lr=row.ref.lr,
        seed=row.ref.seed,
        initial_loss=summary["initial_loss"],
        final_loss=loss if loss is not None and np.isfinite(loss) else None,
        fails=False,
        seconds=summary["seconds"],
        readings=readings,
    )
