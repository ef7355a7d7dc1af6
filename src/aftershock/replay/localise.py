"""Where a spike began: which place of the model left its calm band first, and whether that order holds across replays.

    found = localise(subject)
    print(found.words())

Legend: T steps, K kinds (gradient, update), P places. Must not import the lab.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from aftershock.numerics import median_mad
from aftershock.replay.cells import cells, grid
from aftershock.replay.norms import KINDS, Level, Place, Recorded, places_of, shared
from aftershock.replay.ordering import ALPHA, First, lead_words, needed, rank, sign_test
from aftershock.replay.run import CONTROL, Cell
from aftershock.replay.runner import CellResult, run_grid
from aftershock.replay.subject import Subject

SIGMAS = 4.0
"""Robust z of a log norm from which a place has left its band."""
FLOOR = math.log(1.5)
"""The band is at least this wide, in log units: in a full batch every drift is many of its own tiny sigmas."""
IN_A_ROW, STAYS = 2, 0.5
"""A place has moved when it is outside this often in a row, and for this share of the steps up to the peak."""
CALM = 8
"""Fewer calm steps have no spread to speak of."""
LEAST = 5
"""Shams beside the unchanged replay."""
TINY = 1e-30
"""What the norm of a place without a gradient counts as."""
SHAMS = ("ulp", "permute", "seed")
LEVELS: tuple[Level, ...] = ("layer", "tensor", "head")
OUT_OF_TIME = "the time was up"


class Move(NamedTuple):
    """When a place moved in the unchanged replay: its `gradient`, its `update`, and `moved`, the earlier of the two.

    None where it stayed in its band up to the peak. `lead`: steps from there to the loss's onset, negative after it.
    """

    place: str
    level: Level
    gradient: int | None
    update: int | None
    moved: int | None
    lead: int | None


class Order(NamedTuple):
    """The whole model's gradient norm and relative update norm against the loss: steps in the unchanged replay.

    `gradient_first`, `update_first`: replays in which one moved strictly before the other; `first` is the one that
    does so with p < 0.05 (sign test, both ways tried), else "together".
    """

    gradient: int | None
    update: int | None
    loss: int
    gradient_first: int
    update_first: int
    replays: int
    p: float
    first: Literal["gradient", "update", "together"]

    def words(self) -> str:
        """One sentence."""
        which = {
            "gradient": "the gradient moved before the update",
            "update": "the update moved before the gradient, as with a fault in rate or optimizer state",
            "together": "which of them is first is not clear",
        }[self.first]
        gradient, update = (
            "stayed in its band" if step is None else f"left its band {lead_words(self.loss - step)}"
            for step in (self.gradient, self.update)
        )
        return f"The norm of the whole gradient {gradient}, that of the whole update {update}: {which}."


class Places(NamedTuple):
    """Where the spike began.

    - `onset`: from here on the unchanged replay's loss stays above its calm band up to `peak`
    - `moves`: of every place of every level; `z_KPT`: the heat map, robust z of log norms in the unchanged replay, by
      kind (`norms.KINDS`), place (as in `moves`) and step (of `steps`); inf where a norm was not finite
    - `first`: by level; `order`: gradient and update
    - `replays`: names of those with the spike, the unchanged one first; `left_out`: the others, and why
    """

    onset: int
    peak: int
    steps: range
    moves: tuple[Move, ...]
    z_KPT: np.ndarray
    first: dict[Level, First]
    order: Order
    replays: tuple[str, ...]
    left_out: dict[str, str]

    def words(self) -> str:
        """What is first at each level, how long before the loss, and which kind."""
        return " ".join([*(first.words() for first in self.first.values()), self.order.words()])


class _Replay(NamedTuple):
    """One replay with the spike: first steps out of the band, inf for never."""

    name: str
    onset: int
    peak: int
    z_KPT: np.ndarray
    moved_KP: np.ndarray


def localise(subject: Subject, *, shams: int | None = None, processes: int = 2, deadline: float = math.inf) -> Places:
    """Replay the spike unchanged and under shams, and say which place moved first.

    The band of a place in a replay: median +- max(4 scaled MAD, ln 1.5) of its log norm over the first half of the
    steps from the snapshot to the recorded onset, 8 at least. It moves at the first step from which its gradient norm
    (before clipping) or its update norm over its weight norm is outside for 2 steps in a row, and for half of the steps
    up to that replay's own peak.

    - `shams`: replays with the spike that are wanted beside the unchanged one; other rounding (1 ulp), other order of
      the calm batches, other random numbers. By default 5, or as many more as a clear order of the model's places
      needs. Where shams lose the spike others are tried, twice as many in all
    - `processes`: see `run_grid`; `deadline`: of `time.monotonic()`. Fewer replays are then in `replays`

    What is clear is so for this spike however it is perturbed; it says nothing of other spikes of the same run. The
    workload stands at the snapshot afterwards. Raises ValueError when the spike does not come back unchanged, or fewer
    than 8 steps lie before it.

    Example:
        found = localise(subject)
        found.first["tensor"].place, found.first["tensor"].clear
    """
    start, before = subject.window.start, subject.window.onset - subject.window.start
    if shams is not None and shams < 1:
        raise ValueError(f"shams is {shams}; one replay has no order to hold across, give at least {LEAST}")
    if before < CALM:
        raise ValueError(
            f"{before} steps lie between the snapshot and the onset, too few to say what is calm; record with a margin "
            f"of at least {CALM}"
        )
    places = places_of(subject)
    wanted = max(LEAST, *(needed(_count(places, level)) - 1 for level in LEVELS)) if shams is None else shams
    calm = range(max(CALM, before // 2))
    left_out: dict[str, str] = {}
    replays: list[_Replay] = []
    waiting = [CONTROL, *_shams(subject, 2 * wanted)]
    while waiting and len(replays) <= wanted and time.monotonic() < deadline and CONTROL.name not in left_out:
        now = wanted + 1 - len(replays)
        replays += _replays(subject, waiting[:now], places, calm, left_out, processes=processes, deadline=deadline)
        waiting = waiting[now:]
    subject.restore()
    if not replays or replays[0].name != CONTROL.name:
        why = left_out.get(CONTROL.name, OUT_OF_TIME)
        raise ValueError(f"the spike does not come back in the unchanged replay ({why}), so it has no place")
    return _judged(start, places, replays, left_out)


def robust_z(norms_TKP: np.ndarray, calm: range) -> np.ndarray:
    """[K, P, T]: (log norm - median) / max(scaled MAD, ln 1.5 / 4), both over the `calm` rows that are finite.

    Norms of 0 count as 1e-30; inf where a norm is not finite, and everywhere when no calm one is.
    """
    finite_TKP = np.isfinite(norms_TKP)
    log_KPT = np.log(np.clip(np.where(finite_TKP, norms_TKP, 1.0), TINY, None)).transpose(1, 2, 0)
    z_KPT = np.full(log_KPT.shape, np.inf)
    for k, p in np.ndindex(*log_KPT.shape[:2]):
        finite_T = finite_TKP[:, k, p]
        values = log_KPT[k, p, calm.start : calm.stop][finite_T[calm.start : calm.stop]]
        if values.size:
            median, mad = median_mad(values)
            z_KPT[k, p, finite_T] = (log_KPT[k, p, finite_T] - median) / max(mad, FLOOR / SIGMAS)
    return z_KPT


def first_move(z_T: Sequence[float] | np.ndarray, *, peak: int) -> int | None:
    """Row of the first of 2 in a row with |z| > 4 from which on, up to the row `peak`, half of them at least are so.

    None where there is none: what left its band and came back is not where the spike began.

    >>> first_move([0.0, 9.0, 9.0, 0.0, 0.0, 0.0, 0.0, 0.0, 5.0, -5.0], peak=9)
    8
    """
    out = np.abs(np.asarray(z_T, dtype=np.float64)) > SIGMAS
    for row in range(min(peak, len(out) - IN_A_ROW) + 1):
        if out[row : row + IN_A_ROW].all() and out[row : peak + 1].mean() >= STAYS:
            return row
    return None


# ------------------------------------------------------------------------------------------------------- replays


def _shams(subject: Subject, most: int) -> list[Cell]:
    fit = [one.name.removesuffix("#1") for one in grid(subject, [f"sham:{kind}#1" for kind in SHAMS]).cells[1:]]
    return cells([f"{name}#{draw}" for draw in range(1, most + 1) for name in fit][:most], subject)


def _replays(
    subject: Subject,
    chosen: Sequence[Cell],
    places: Sequence[Place],
    calm: range,
    left_out: dict[str, str],
    *,
    processes: int,
    deadline: float,
) -> list[_Replay]:
    """Those of the cells that have the spike, in their order; why the others do not count goes into `left_out`."""
    shape = (subject.short - subject.window.start, len(KINDS), len(places))
    norms = {one.name: shared(shape) for one in chosen}
    recorded = [
        Cell(name=one.name, family=one.family, edit=Recorded(one.edit, places, norms[one.name])) for one in chosen
    ]
    minutes = None if math.isinf(deadline) else max(deadline - time.monotonic(), 1e-3) / 60
    results = {result.name: result for result in run_grid(subject, recorded, processes=processes, minutes=minutes)}
    found = []
    for name, norms_TKP in norms.items():
        replay = _read(subject, results[name], norms_TKP, calm)
        if isinstance(replay, str):
            left_out[name] = replay
        else:
            found.append(replay)
    return found


def _read(subject: Subject, result: CellResult, norms_TKP: np.ndarray, calm: range) -> _Replay | str:
    response = result.response(subject.baseline)
    if result.error:
        return result.error
    if response is None or result.stopped == "budget":
        return OUT_OF_TIME
    if not response.present or response.onset is None:
        return f"its highest excess is {response.peak_excess:.3g}, the spike begins at {subject.baseline.threshold:.3g}"
    start = subject.window.start
    z_KPT = robust_z(norms_TKP[: len(result.losses)], calm)
    moved_KP = np.full(z_KPT.shape[:2], np.inf)
    for k, p in np.ndindex(*moved_KP.shape):
        row = first_move(z_KPT[k, p], peak=response.peak_step - start)
        moved_KP[k, p] = np.inf if row is None else start + row
    return _Replay(result.name, response.onset, response.peak_step, z_KPT, moved_KP)


# ------------------------------------------------------------------------------------------------------- judging


def _judged(start: int, places: Sequence[Place], replays: Sequence[_Replay], left_out: dict[str, str]) -> Places:
    own = replays[0]
    moves = tuple(
        Move(place.name, place.level, _step(g), _step(u), _step(min(g, u)), _step(own.onset - min(g, u)))
        for place, (g, u) in zip(places, own.moved_KP.T.tolist(), strict=True)
    )
    first: dict[Level, First] = {}
    for level in LEVELS:
        names = {i: place.name for i, place in enumerate(places) if place.level == level}
        if names:
            moved = [{name: float(replay.moved_KP[:, i].min()) for i, name in names.items()} for replay in replays]
            first[level] = rank(level, moved, onset=own.onset)
    until = own.peak + 1 - start
    return Places(
        onset=own.onset,
        peak=own.peak,
        steps=range(start, own.peak + 1),
        moves=moves,
        z_KPT=own.z_KPT[:, :, :until],
        first=first,
        order=_order(replays, next(i for i, place in enumerate(places) if place.level == "model")),
        replays=tuple(replay.name for replay in replays),
        left_out=left_out,
    )


def _order(replays: Sequence[_Replay], whole: int) -> Order:
    both = [replay.moved_KP[:, whole].tolist() for replay in replays]
    gradient_first, update_first = sum(g < u for g, u in both), sum(u < g for g, u in both)
    p = min(1.0, 2 * sign_test(max(gradient_first, update_first), len(both)))
    first = "together" if p >= ALPHA else "gradient" if gradient_first > update_first else "update"
    gradient, update = map(_step, both[0])
    return Order(gradient, update, replays[0].onset, gradient_first, update_first, len(both), p, first)


def _count(places: Sequence[Place], level: Level) -> int:
    return sum(place.level == level for place in places)


def _step(value: float) -> int | None:
    return int(value) if math.isfinite(value) else None
