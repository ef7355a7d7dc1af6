"""Cells by name: "lr*0.5", "beta2=0.9:recompute", "sham:skip#3"; and the grid of them that fits an incident.

Imports every edit. Must not import the runner or the lab.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from aftershock.config import nearest
from aftershock.replay.candidates import candidates
from aftershock.replay.edits.architecture import QKClipped, QKNorm
from aftershock.replay.edits.checked import Checked
from aftershock.replay.edits.clips import Clip, RelativeClip, Treated
from aftershock.replay.edits.contents import OtherContents
from aftershock.replay.edits.data import Replaced, Shuffled, Skipped, suspects
from aftershock.replay.edits.decay import Decay
from aftershock.replay.edits.freeze import Frozen, Withheld
from aftershock.replay.edits.optimizer import Betas, Eps, Momentum
from aftershock.replay.edits.precision import DTYPES, Everything, WideParts
from aftershock.replay.edits.rates import FixedRate, RateBefore, ScaledRate
from aftershock.replay.edits.regularisation import Dropout, ZLoss
from aftershock.replay.edits.shams import OtherSeed, Ulp, random_order, random_skip
from aftershock.replay.edits.state import Earlier, HeldSecond, RefreshedSecond, Reset
from aftershock.replay.run import CONTROL, Cell, Edit, Unchanged
from aftershock.replay.subject import Subject


class Written(NamedTuple):
    """A name in its parts: head, then `*` or `=` with a value, then `:option`, then `#draw`."""

    head: str
    sign: str
    value: str
    option: str
    draw: int


class Kind(NamedTuple):
    """One head: its family, its edit from what is written after it, and how it is written."""

    family: str
    make: Callable[[Written, Subject], Edit]
    forms: tuple[str, ...]


class UnknownCell(ValueError):
    """A name that is no cell's, whatever the subject."""


class Grid(NamedTuple):
    """`cells` in order of information; `left_out`: names of those that mean nothing for this workload, and why."""

    cells: list[Cell]
    left_out: dict[str, str]


def cell(name: str, subject: Subject) -> Cell:
    """The cell of that name for a subject. See `KINDS` for all there is.

    Raises UnknownCell, with the nearest name, for one that does not exist or is written wrongly. Whether it means
    anything for the workload is found when it is applied, or by `grid`.

    Example:
        cell("lr*0.5", subject), cell("sham:skip#2", subject), cell("freeze:blocks.0", subject)
    """
    match = _NAME.fullmatch(name)
    if match is None or match["head"] not in KINDS:
        known = [form for kind in KINDS.values() for form in kind.forms]
        raise UnknownCell(f"no cell {name!r}{nearest(name, known)}")
    kind = KINDS[match["head"]]
    written = Written(
        match["head"], match["sign"] or "", match["value"] or "", match["option"] or "", int(match["draw"] or 0)
    )
    try:
        edit = kind.make(written, subject)
    except _WrongForm:
        forms = ", ".join(repr(form) for form in kind.forms)
        raise UnknownCell(f"no cell {name!r}; a {written.head} cell is written {forms}") from None
    except ValueError as error:
        raise ValueError(f"cell {name!r}: {error}") from None
    return Cell(name=name, family=kind.family, edit=edit)


def cells(names: Iterable[str], subject: Subject) -> list[Cell]:
    """The cells of these names, in their order. Raises as `cell` does."""
    return [cell(name, subject) for name in names]


def default_grid(subject: Subject, *, most: int = 40) -> list[Cell]:
    """The first `most` of the cells that fit the subject, the most informative first; `grid` has all, and says why the
    others do not fit. Raises ValueError for most below 1."""
    if most < 1:
        raise ValueError(f"most is {most}; a grid has at least the control")
    return grid(subject).cells[:most]


def grid(subject: Subject, names: Iterable[str] | None = None) -> Grid:
    """Those of `names` (by default `candidates`) that mean something for the subject, and why the others do not.

    Asks each edit, from the snapshot, with at most one forward pass each; the workload stands at the snapshot
    afterwards. The first is the control, and shams are spread among the cells, so that a grid cut short has some.
    Raises UnknownCell for a name that is no cell's.
    """
    found, left_out = [CONTROL], dict[str, str]()
    subject.restore()
    for name in candidates(subject) if names is None else names:
        try:
            one = cell(name, subject)
            if isinstance(one.edit, Checked):
                one.edit.check(subject.run())
        except UnknownCell:
            raise
        except ValueError as error:
            left_out[name] = str(error).removeprefix(f"cell {name!r}: ")
            continue
        found.append(one)
    subject.restore()
    return Grid(found, left_out)


# ----------------------------------------------------------------------------------------------------- the names


class _WrongForm(Exception):
    """What is written after the head is not how such cells are written."""


def _number(written: Written, signs: str, *, options: tuple[str, ...] = ("",)) -> float:
    """The number after `*` or `=`, where one of `signs` must stand; the option is one of `options`."""
    if written.sign not in tuple(signs) or written.option not in options or written.draw:
        raise _WrongForm
    try:
        return float(written.value)
    except ValueError:
        raise _WrongForm from None


def _option(written: Written, *options: str, draws: bool = False) -> str:
    """The option, of a name without a number."""
    if written.sign or written.option not in options or bool(written.draw) != draws:
        raise _WrongForm
    return written.option


def _patterns(written: Written) -> str:
    if written.sign or not written.option or written.draw:
        raise _WrongForm
    return written.option


def _scaled_or_set(written: Written) -> dict[str, float]:
    return {"factor" if written.sign == "*" else "value": _number(written, "*=", options=(written.option,))}


def _rate(written: Written, subject: Subject) -> Edit:
    if (written.sign, written.value, written.option, written.draw) == ("=", "before", "", 0):
        return RateBefore()
    number = _number(written, "*=")
    return ScaledRate(factor=number) if written.sign == "*" else FixedRate(lr=number)


def _betas(written: Written, subject: Subject) -> Edit:
    value = _number(written, "=", options=("", "keep", "recompute", "refresh"))
    moments = written.option or "keep"
    assert moments in ("keep", "recompute", "refresh")
    if written.head == "beta1":
        return Betas(beta1=value, moments=moments)
    return Betas(beta2=value, moments=moments)


def _momentum(written: Written, subject: Subject) -> Edit:
    return Momentum(momentum=_number(written, "="))


def _eps(written: Written, subject: Subject) -> Edit:
    _number(written, "*=")
    return Eps(**_scaled_or_set(written))


def _decay(written: Written, subject: Subject) -> Edit:
    _number(written, "*=", options=("", "embeddings", "norms"))
    of = written.option or "all"
    assert of in ("all", "embeddings", "norms")
    return Decay(of=of, **_scaled_or_set(written))


def _clip(written: Written, subject: Subject) -> Edit:
    if (written.sign, written.value) == ("=", "off"):
        return Clip(norm=math.inf)
    number = _number(written, "*=")
    return RelativeClip(ratio=number) if written.sign == "*" else Clip(norm=number)


def _policy(written: Written, subject: Subject) -> Edit:
    return Treated(policy=_patterns(written))  # pyright: ignore[reportArgumentType] - it refuses what it does not know


def _dropout(written: Written, subject: Subject) -> Edit:
    _number(written, "*=")
    return Dropout(**_scaled_or_set(written))


def _z_loss(written: Written, subject: Subject) -> Edit:
    return ZLoss(coefficient=_number(written, "="))


def _qk_norm(written: Written, subject: Subject) -> Edit:
    if not written.option:
        _option(written, "")
        return QKNorm()
    return QKNorm(modules=tuple(part.strip() for part in _patterns(written).split(",")))


def _qk_clip(written: Written, subject: Subject) -> Edit:
    return QKClipped(tau=_number(written, "=")) if written.sign else QKClipped(tau=_nothing(written))


def _nothing(written: Written) -> float:
    _option(written, "")
    return math.nan


def _skip(written: Written, subject: Subject) -> Edit:
    _option(written, "")
    return Skipped(steps=tuple(suspects(subject.window)), stop=subject.stop)


def _replace(written: Written, subject: Subject) -> Edit:
    option = _option(written, "", "before", "content")
    if option == "content":
        return OtherContents(steps=suspects(subject.window))
    source = "before" if option else "later"
    return Replaced(steps=suspects(subject.window), source=source, stop=subject.stop)


def _reorder(written: Written, subject: Subject) -> Edit:
    _option(written, "")
    return Shuffled(steps=range(subject.window.start, subject.window.end))


def _earlier(written: Written, subject: Subject) -> Edit:
    if not _option(written, "", "replace"):
        return Earlier(subject=subject)
    later = subject.stop is None
    others = Replaced(steps=suspects(subject.window), source="later" if later else "before", stop=subject.stop)
    return Earlier(subject=subject, others=others)


def _precision(written: Written, subject: Subject) -> Edit:
    where, dtype = _option(written, "", "attention", "norms", "loss"), DTYPES[written.head]
    if not where:
        return Everything(dtype=dtype)
    assert where in ("attention", "norms", "loss")
    return WideParts(where=where, dtype=dtype)


def _freeze(written: Written, subject: Subject) -> Edit:
    return Frozen(modules=_patterns(written))


def _withhold(written: Written, subject: Subject) -> Edit:
    return Withheld(parameters=_patterns(written))


def _reset(written: Written, subject: Subject) -> Edit:
    what = _option(written, "m", "v", "both")
    assert what in ("m", "v", "both")
    return Reset(what=what)


def _refresh(written: Written, subject: Subject) -> Edit:
    _option(written, "v")
    return RefreshedSecond()


def _hold(written: Written, subject: Subject) -> Edit:
    _option(written, "v")
    return HeldSecond()


def _control(written: Written, subject: Subject) -> Edit:
    _option(written, "", draws=bool(written.draw))
    return Unchanged()


def _sham(written: Written, subject: Subject) -> Edit:
    sham = _option(written, "skip", "permute", "ulp", "seed", draws=True)
    if sham == "skip":
        return random_skip(subject.window, draw=written.draw, stop=subject.stop)
    if sham == "permute":
        return random_order(subject.window, draw=written.draw)
    return Ulp(draw=written.draw) if sham == "ulp" else OtherSeed(draw=written.draw)


_NAME = re.compile(
    r"(?P<head>[a-z][a-z0-9-]*)(?:(?P<sign>[*=])(?P<value>[^:#]+))?(?::(?P<option>[^:#]+))?(?:#(?P<draw>\d+))?"
)

KINDS: dict[str, Kind] = {
    "control": Kind("control", _control, ("control", "control#1")),
    "sham": Kind("sham", _sham, ("sham:skip#1", "sham:permute#1", "sham:ulp#1", "sham:seed#1")),
    "skip": Kind("data", _skip, ("skip",)),
    "replace": Kind("data", _replace, ("replace", "replace:before", "replace:content")),
    "reorder": Kind("data", _reorder, ("reorder",)),
    "earlier": Kind("state", _earlier, ("earlier", "earlier:replace")),
    "reset": Kind("state", _reset, ("reset:m", "reset:v", "reset:both")),
    "hold": Kind("state", _hold, ("hold:v",)),
    "refresh": Kind("state", _refresh, ("refresh:v",)),
    "lr": Kind("rate", _rate, ("lr*0.5", "lr=1e-3", "lr=before")),
    "beta1": Kind("optimizer", _betas, ("beta1=0.5", "beta1=0.5:recompute")),
    "beta2": Kind("optimizer", _betas, ("beta2=0.9", "beta2=0.9:recompute", "beta2=0.9:refresh")),
    "momentum": Kind("optimizer", _momentum, ("momentum=0.5",)),
    "eps": Kind("optimizer", _eps, ("eps*1e3", "eps=1e-5")),
    "clip": Kind("clip", _clip, ("clip*2", "clip=0.1", "clip=off")),
    "policy": Kind("clip", _policy, ("policy:stable-adamw", "policy:zclip", "policy:tensor-clip")),
    "float32": Kind("precision", _precision, ("float32", "float32:attention", "float32:norms", "float32:loss")),
    "float64": Kind("precision", _precision, ("float64", "float64:attention", "float64:norms", "float64:loss")),
    "qk-norm": Kind("architecture", _qk_norm, ("qk-norm", "qk-norm:*.q_proj,*.k_proj")),
    "qk-clip": Kind("architecture", _qk_clip, ("qk-clip", "qk-clip=50")),
    "wd": Kind("regularisation", _decay, ("wd*0", "wd=0.1", "wd*0:embeddings", "wd*0:norms")),
    "dropout": Kind("regularisation", _dropout, ("dropout=0", "dropout*2")),
    "z-loss": Kind("regularisation", _z_loss, ("z-loss=1e-4",)),
    "freeze": Kind("freeze", _freeze, ("freeze:MODULE",)),
    "withhold": Kind("freeze", _withhold, ("withhold:PARAMETER",)),
}
"""Every head a cell's name can begin with."""
