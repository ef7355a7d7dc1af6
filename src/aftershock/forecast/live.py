"""The live forecast of one run: the probability that it spikes or diverges within the next steps, and `follow`, which
reads a run as it grows and says when that changes.

Must not import torch or rich; must not train anything.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from aftershock.forecast.hazard import (
    MOST,
    SLOTS,
    WINDOW,
    WITHIN,
    Hazard,
    Slot,
    Track,
    feature_names,
    features_of,
    model_for,
    probability,
    read_hazards,
)
from aftershock.forecast.live_rows import run_rows
from aftershock.signals.detect.logs.rows import Problems, Row
from aftershock.signals.detect.roles import role_of

SOON = 8
"""The k that is put into a word: time enough for a snapshot."""
CLASSES: tuple[tuple[float, str], ...] = ((0.03, "calm"), (0.1, "watch"), (0.3, "warning"), (1.01, "alarm"))
"""Upper ends of the probability within 8 steps, and what it is called below them. In the corpus its base rate is 0.008:
watch begins at some four times that."""
CALM = CLASSES[0][0]
SPEAKS = 0.7
"""Natural-log odds above the usual from which a feature is named: twice the odds."""
MOST_REASONS = 2

WORDS: dict[Slot, str] = {
    "loss": "loss",
    "gradient": "gradient norm",
    "update": "update norm",
    "rms_t_share": "RMS_t",
    "log_z": "log Z",
    "logit": "attention logit",
}


class Prospect(NamedTuple):
    """What lies ahead after `step`. `within`: by k, the probability of an onset in the next k steps, empty until the
    loss has a baseline; `level`: in one word, which rises at once and falls after `SOON` calmer steps in a row;
    `reasons`: what speaks for it now, empty where nothing does."""

    step: int
    within: dict[int, float]
    level: str
    reasons: tuple[str, ...]


class LiveForecast:
    """Say the signals of each step, get the probability of trouble ahead. Memory does not grow.

    Signals go by any names that logs have (`slot_of`): a training loss, and where there are any the norms of gradients
    (before clipping) and of the update. A signal that has no value at a step keeps its last. The model asked is the
    one for the signals that are there.

    Example:
        live = LiveForecast()
        prospect = live.update(step, {"loss": loss, "grad_norm": norm})
        if prospect.within.get(8, 0.0) > 0.1:
            take_a_snapshot()
    """

    def __init__(self, hazards: Sequence[Hazard] | None = None) -> None:
        self._hazards = tuple(read_hazards() if hazards is None else hazards)
        self._wanted: frozenset[Slot] = frozenset(slot for hazard in self._hazards for slot in hazard.signals)
        self._tracks: dict[Slot, Track] = {}
        self._slots: dict[str, Slot | None] = {}
        self._armed: frozenset[Slot] = frozenset()
        self._model: Hazard | None = None
        self._level = _Level()

    @property
    def wanted(self) -> frozenset[Slot]:
        """What the models could make use of."""
        return self._wanted

    @property
    def signals(self) -> dict[str, Slot]:
        """Names seen, and what each is to the model; others are left aside."""
        return {name: slot for name, slot in self._slots.items() if slot is not None}

    @property
    def model(self) -> Hazard | None:
        """The model that speaks now; None until the loss has a baseline."""
        return self._model

    def update(self, step: int, signals: Mapping[str, float]) -> Prospect:
        """After a step's signals: what lies ahead. Some seven microseconds for loss and gradient norm."""
        slots = self._slots
        if not slots.keys() >= signals.keys():
            self._assign(signals)
        values: dict[Slot, float] = {}
        for name, value in signals.items():
            slot = slots[name]
            if slot is not None:  # of several attention logits the largest; nan stays what it is
                values[slot] = value if slot not in values or not value <= values[slot] else values[slot]
        tracks = self._tracks
        for slot, value in values.items():
            tracks[slot].add(value)
        if len(self._armed) < len(tracks):
            self._armed = frozenset(slot for slot, track in tracks.items() if track.armed)
            self._model = model_for(self._hazards, self._armed)
        loss = values.get("loss")
        if loss is not None and loss - loss != 0:
            self._level.update(1.0)
            return Prospect(step, dict.fromkeys(WITHIN, 1.0), CLASSES[-1][1], ("the loss is not finite now",))
        model = self._model
        if model is None:
            return Prospect(step, {}, "unknown", ())
        row = features_of(tracks, model.signals)
        top, within = 0.0, dict[int, float]()
        for k, line in zip(WITHIN, model.lines, strict=True):
            p = probability(line.log_odds(row))
            if p > top:  # what comes within 8 comes within 32 too
                top = p
            within[k] = top
        soon = within[SOON]
        level = self._level.update(soon)
        return Prospect(step, within, level, self._reasons(model, row) if soon >= CALM else ())

    def to_dict(self) -> dict[str, Any]:
        """The state as JSON types."""
        return {
            "slots": dict(self._slots),
            "tracks": {slot: track.to_dict() for slot, track in self._tracks.items()},
            "level": self._level.to_list(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, hazards: Sequence[Hazard] | None = None) -> LiveForecast:
        """The forecast that `to_dict` wrote, at the step where it was. Raises ValueError when it is not one."""
        live = cls(hazards)
        try:
            live._slots = dict(data["slots"])
            live._tracks = {slot: Track.from_dict(slot, track) for slot, track in data["tracks"].items()}
            live._level = _Level(*data["level"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this is no state of a live forecast ({error!r}); start with LiveForecast()") from None
        live._armed = frozenset(slot for slot, track in live._tracks.items() if track.armed)
        live._model = model_for(live._hazards, live._armed)
        return live

    def _assign(self, signals: Mapping[str, float]) -> None:
        """Names to slots; of several that fit one slot the best, except that all attention logits count."""
        taken = {slot for slot in self._slots.values() if slot is not None}
        fresh = [name for name in signals if name not in self._slots]
        for name in sorted(fresh, key=_rank):
            slot = slot_of(name)
            if slot not in self._wanted or (slot in taken and slot != "logit"):
                slot = None
            self._slots[name] = slot
            if slot is not None:
                taken.add(slot)
                self._tracks.setdefault(slot, Track(slot))

    def _reasons(self, model: Hazard, row: Sequence[float]) -> tuple[str, ...]:
        """The features that raise the log-odds most, in words, one a signal."""
        names, coef = feature_names(model.signals), model.lines[WITHIN.index(SOON)].coef
        parts = [(c * (x - usual), name) for c, x, usual, name in zip(coef, row, model.usual, names, strict=True)]
        found: dict[str, str] = {}
        for part, name in sorted(parts, reverse=True):
            slot = name.split("/")[0]
            if part >= SPEAKS and slot not in found and len(found) < MOST_REASONS:
                found[slot] = self._words(name)
        return tuple(found.values())

    def _words(self, feature: str) -> str:
        for slot, what in WORDS.items():
            if feature.startswith(f"{slot}/"):
                track = self._tracks[slot]
                if feature.endswith("/fast") and track.fast > track.z:
                    return f"{what} was {track.fast:.1f} sigmas high a few steps ago"
                if track.z >= MOST:
                    return f"{what} is not finite, or far beyond its last {WINDOW} steps"
                return f"{what} {track.z:.1f} sigmas above its last {WINDOW} steps"
        raise AssertionError(feature)


class _Level:
    """The word for a probability. At a limit between two words it would flicker, so it falls only after `SOON` steps in
    a row below, to the highest of theirs. `at`: number in `CLASSES`; `below`: steps since; `next_at`: their highest."""

    __slots__ = ("at", "below", "next_at")

    def __init__(self, at: int = 0, below: int = 0, next_at: int = 0) -> None:
        self.at, self.below, self.next_at = at, below, next_at

    def update(self, soon: float) -> str:
        """After the next step's probability within `SOON`."""
        if soon < CALM and self.at == 0:
            return CLASSES[0][1]
        at = next(number for number, (limit, _) in enumerate(CLASSES) if soon < limit)
        if at >= self.at:
            self.at, self.below, self.next_at = at, 0, 0
        else:
            self.below += 1
            self.next_at = max(self.next_at, at)
            if self.below == SOON:
                self.at, self.below, self.next_at = self.next_at, 0, 0
        return CLASSES[self.at][1]

    def to_list(self) -> list[int]:
        """What `__init__` takes."""
        return [self.at, self.below, self.next_at]


def slot_of(name: str) -> Slot | None:
    """What the signal of that name is to the forecast; None where it is none of its signals.

    >>> slot_of("train_loss"), slot_of("grad_norm"), slot_of("eval/loss"), slot_of("update/all/cosine")
    ('loss', 'gradient', None, None)
    """
    if name in SLOTS:
        return SLOTS[SLOTS.index(name)]
    role = role_of(name)
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    if role == "loss":
        return None if words & {"val", "valid", "validation", "eval", "test", "dev", "held", "max", "min"} else "loss"
    if role in ("gradient", "update"):
        is_norm = any("norm" in word or word == "rms" for word in words) and not words & {"clipped", "after", "max"}
        return None if not is_norm else "gradient" if role == "gradient" else "update"
    if role == "rms_t":
        return "rms_t_share" if "share" in words else None
    return "log_z" if role == "log_z" else "logit" if role == "logit" else None


def _rank(name: str) -> tuple[int, int, str]:
    """Which of several names for one slot comes first: of the whole model, then the shortest."""
    whole = bool({"all", "global", "total", "train", "mean"} & set(re.split(r"[^a-z0-9]+", name.lower())))
    return (0 if whole else 1, len(name), name)


# ------------------------------------------------------------------------------------------------------- a run


def follow(run: str, *, poll_s: float, as_json: bool, out: TextIO | None = None) -> int:
    """Read `run` as it grows, print a line whenever the level changes, and a summary at its end or on Ctrl-C.

    A run folder, a guard's folder (the steps that it kept around its incidents), or a log as `aftershock detect` reads
    it. A run that is over is read once. Returns 0. Raises ValueError when there is nothing to read, or no loss in it.
    """
    told = sys.stdout if out is None else out
    problems = Problems(run, _complain)
    teller = _Teller(told, as_json=as_json)
    try:
        for row in run_rows(Path(run), problems, poll_s=poll_s):
            teller.add(row)
    except KeyboardInterrupt:
        pass
    teller.finish(run)
    return 0


def _complain(sentence: str) -> None:
    sys.stderr.write(f"aftershock: {sentence}\n")


class _Teller:
    """Rows in, lines out; and what to say at the end."""

    def __init__(self, out: TextIO, *, as_json: bool) -> None:
        self._out, self._as_json = out, as_json
        self._live = LiveForecast()
        self._level, self._spoke = "", 0
        self._losses: list[float] = []
        self._steps: list[int] = []
        self._highest: Prospect | None = None
        self._probabilities: list[float] = []

    def add(self, row: Row) -> None:
        prospect = self._live.update(row.step, row.values)
        names = [name for name, slot in self._live.signals.items() if slot == "loss"]
        if names and names[0] in row.values:
            self._losses.append(row.values[names[0]])
            self._steps.append(row.step)
            self._probabilities.append(prospect.within.get(SOON, math.nan))
        model = self._live.model
        if model is not None and len(model.signals) != self._spoke:
            self._spoke = len(model.signals)
            self._say_signals(model)
        top = prospect.within.get(SOON)
        if top is not None and (self._highest is None or top > self._highest.within[SOON]):
            self._highest = prospect
        if prospect.level != self._level and prospect.within:
            self._level = prospect.level
            self._say(prospect)

    def finish(self, run: str) -> None:
        """The summary. Raises ValueError when there was no loss to go by."""
        if not self._losses:
            raise ValueError(f"{run}: no training loss in it; the forecast needs one, and a gradient norm helps")
        from aftershock.lab.zoo.labels import label

        spikes = label(self._losses)
        foreseen = sum(self._warned(spike.onset) for spike in spikes)
        onsets = [self._steps[spike.onset] for spike in spikes]
        highest = self._highest
        if self._as_json:
            summary = {
                "kind": "summary",
                "steps": len(self._losses),
                "signals": self._live.signals,
                "highest": None if highest is None else _plain(highest),
                "onsets": onsets,
                "warned": foreseen,
            }
            self._line(json.dumps(summary))
            return
        said = (
            "no forecast: it begins after 20 finite losses"
            if highest is None
            else f"highest probability within {SOON} steps: {highest.within[SOON]:.1%}, at step "
            f"{highest.step}" + (f": {'; '.join(highest.reasons)}" if highest.reasons else "")
        )
        came = (
            "no spike came, by the rule of the zoo's labels"
            if not spikes
            else f"{len(spikes)} {'spike' if len(spikes) == 1 else 'spikes'} came, from step "
            f"{', '.join(map(str, onsets[:5]))}{' and on' if len(onsets) > 5 else ''}; {foreseen} with "
            f"{CALM:.0%} or more within {SOON} in the {WITHIN[-1]} steps before"
        )
        self._line(f"{len(self._losses):,} steps; {said}")
        self._line(came)

    def _warned(self, onset: int) -> bool:
        return any(p >= CALM for p in self._probabilities[max(0, onset - WITHIN[-1]) : onset])

    def _say_signals(self, model: Hazard) -> None:
        missing = [WORDS[slot] for slot in SLOTS if slot in self._live.wanted and slot not in model.signals]
        if self._as_json:
            self._line(json.dumps({"kind": "model", "signals": list(model.signals)}))
            return
        without = f"; it would take {', '.join(missing)} too" if missing else ""
        self._line(f"forecast from {', '.join(WORDS[slot] for slot in model.signals)}{without}")

    def _say(self, prospect: Prospect) -> None:
        if self._as_json:
            self._line(json.dumps({"kind": "level", **_plain(prospect)}))
            return
        numbers = ", ".join(f"{p:.1%} within {k}" for k, p in prospect.within.items())
        reasons = f": {'; '.join(prospect.reasons)}" if prospect.reasons else ""
        self._line(f"step {prospect.step:>8}  {prospect.level:<7}  {numbers}{reasons}")

    def _line(self, text: str) -> None:
        self._out.write(text + "\n")
        self._out.flush()


def _plain(prospect: Prospect) -> dict[str, Any]:
    return prospect._asdict() | {"within": {str(k): float(f"{p:.4g}") for k, p in prospect.within.items()}}
