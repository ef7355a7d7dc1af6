"""An explanation as JSON: everything that was found, for programs and for the page.

A number that was not measured is null. One that is not finite is "inf" or "-inf": a loss that is not finite counts as
higher than any number. Numbers have six significant digits, the z of a heat map two decimals. Steps are the loop's.
Must not import the runner: it writes what was found, it asks nothing.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from aftershock._version import __version__
from aftershock.causes import CAUSES
from aftershock.replay.norms import KINDS
from aftershock.replay.response import spike_of
from aftershock.replay.run import Window
from aftershock.replay.verdict import Answer, Ranked, zero_line

if TYPE_CHECKING:
    from aftershock.replay.controls import Controls
    from aftershock.replay.explain import Asked, Explanation
    from aftershock.replay.localise import Places
    from aftershock.replay.verdict import Verdict

DIGITS = 6
"""Significant digits: a loss is read from a figure, and bits are compared elsewhere."""
Z_DECIMALS = 2
RECORDED = 4
"""Times as many points as a replay's has the recorded curve, which began long before."""
Side = Literal["for", "against", ""]


def explanation_json(explanation: Explanation, *, points: int | None = None, places: int | None = None) -> str:
    """The explanation as JSON text.

    - `points`: of each replay's curve at most so many (of the recorded one 4 times that), the highest and lowest of
      each stretch; None keeps all
    - `places`: the heat map's rows of at most so many places a level, those that moved first; the others are null

    Example:
        json.loads(explanation_json(explanation))["verdict"]["cause"]
    """
    return json.dumps(explanation_data(explanation, points=points, places=places), allow_nan=False)


def explanation_data(
    explanation: Explanation, *, points: int | None = None, places: int | None = None
) -> dict[str, Any]:
    """What `explanation_json` writes, as plain dicts, lists, numbers and text."""
    found = explanation
    costs = {remedy.cell: remedy.cost for remedy in found.remedies}
    return {
        "version": __version__,
        "headline": headline(found),
        "words": found.words,
        "verdict": _verdict(found.verdict),
        "window": plain(found.window),
        "baseline": plain(found.baseline) | {"calm_loss": plain(found.baseline.calm_loss)},
        "controls": _controls(found.controls),
        "symptoms": plain(found.symptoms) | {"rate_jumped": found.symptoms.rate_jumped},
        "cells": [_cell(one, found.window, costs.get(one.name, math.nan)) for one in found.cells],
        "shams": shams(found),
        "left_out": found.left_out,
        "remedies": plain(found.remedies),
        "recorded": _curve(found.recorded, None if points is None else RECORDED * points),
        "curves": {name: _curve(curve, points) for name, curve in found.curves.items()},
        "places": None if found.places is None else _places(found.places, places),
        "no_return": None if found.no_return is None else plain(found.no_return) | {"words": found.no_return.words()},
        "thinking": None if found.thinking is None else plain(found.thinking),
        "guilty": plain(found.guilty),
        "notes": list(found.notes),
        "seconds": plain(found.seconds),
    }


def headline(explanation: Explanation) -> str:
    """The verdict without its reasons."""
    verdict = explanation.verdict
    if verdict.kind == "decided":
        return f"{verdict.ranked[0].words}, {verdict.ranked[0].share:.0%}"
    return re.split(r"[:;.] |[.]$", verdict.words, maxsplit=1)[0]


def shams(explanation: Explanation) -> dict[str, Any] | None:
    """How many shams ran, how many of them spike, and their peaks: lowest, median, highest; None where none ran.

    `zero_line`: how often something innocent is expected to remove the spike (`verdict.zero_line`).
    """
    ran = [one.response for one in explanation.cells if one.family == "sham" and one.response is not None]
    if not ran:
        return None
    peaks = sorted(response.peak_excess for response in ran)
    return {
        "number": len(ran),
        "spiking": sum(response.present for response in ran),
        "zero_line": plain(zero_line(ran)),
        "lowest": plain(peaks[0]),
        "median": plain(peaks[(len(peaks) - 1) // 2]),  # the lower one, as an effect's
        "highest": plain(peaks[-1]),
    }


def side_of(answer: Answer, one: Ranked) -> Side:
    """Whether an answer was counted among what speaks for a class, against it, or neither."""
    return "for" if answer.words in one.for_it else "against" if answer.words in one.against else ""


def plain(value: Any, *, decimals: int | None = None) -> Any:
    """Dicts, lists, text, numbers, booleans and None of what a replay finds."""
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, float):
        return _number(value, decimals)
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist(), decimals=decimals)
    if isinstance(value, tuple) and type(value) is not tuple:
        return {name: plain(part, decimals=decimals) for name, part in zip(value._fields, value, strict=True)}  # pyright: ignore[reportAttributeAccessIssue] - a NamedTuple
    if isinstance(value, Mapping):
        return {str(key): plain(part, decimals=decimals) for key, part in value.items()}
    return [plain(part, decimals=decimals) for part in value]


# --------------------------------------------------------------------------------------------------------- parts


def _number(value: float, decimals: int | None) -> float | str | None:
    if math.isnan(value):
        return None
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return round(value, decimals) if decimals is not None else float(f"{value:.{DIGITS}g}")


def _verdict(verdict: Verdict) -> dict[str, Any]:
    return {
        "kind": verdict.kind,
        "cause": verdict.cause,
        "words": verdict.words,
        "unknown": plain(verdict.unknown),
        "ranked": [
            {
                "cause": one.cause,
                "meaning": CAUSES[one.cause],
                "way": one.way,
                "share": plain(one.share),
                "for": list(one.for_it),
                "against": list(one.against),
            }
            for one in verdict.ranked
        ],
        "answers": [
            {
                "question": answer.question,
                "yes": plain(answer.yes),
                "by": answer.by,
                "words": answer.words,
                "sides": {one.cause: side for one in verdict.ranked if (side := side_of(answer, one))},
            }
            for answer in verdict.answers
        ],
        "next_cells": list(verdict.next_cells),
    }


def _controls(controls: Controls) -> dict[str, Any]:
    return {
        "kind": controls.kind,
        "why": controls.why,
        "runs": len(controls.results),
        "came_back": controls.came_back,
        "first_difference": controls.first_difference,
        "spread": plain(controls.spread),
        "off": plain(controls.off),
        "recompute": plain(controls.recompute),
        "words": controls.words,
    }


def _cell(one: Asked, window: Window, cost: float) -> dict[str, Any]:
    return {
        "name": one.name,
        "family": one.family,
        "spike": spike_of(one.response, window),
        "cost": plain(cost),
        "stopped": one.stopped,
        "error": one.error,
        "seconds": plain(one.seconds),
        "response": plain(one.response),
        "effect": plain(one.effect),
    }


def _curve(curve: Mapping[int, float], points: int | None) -> dict[str, Any]:
    kept = thinned(curve, points)
    return {"steps": list(kept), "losses": [plain(x if math.isfinite(x) else math.inf) for x in kept.values()]}


def thinned(curve: Mapping[int, float], points: int | None) -> dict[int, float]:
    """At most `points` of a curve, and at least 4: first and last, and of every stretch the lowest and the highest.

    >>> thinned({0: 1.0, 1: 9.0, 2: 1.0, 3: 1.0, 4: 2.0, 5: 0.5, 6: 1.0, 7: 1.0}, 4)
    {0: 1.0, 1: 9.0, 5: 0.5, 7: 1.0}
    """
    steps = sorted(curve)
    if points is None or len(steps) <= points:
        return {step: curve[step] for step in steps}
    inner, stretches = steps[1:-1], max(1, (points - 2) // 2)
    kept = {steps[0], steps[-1]}
    for i in range(stretches):
        piece = inner[i * len(inner) // stretches : (i + 1) * len(inner) // stretches]
        kept |= {min(piece, key=lambda step: _height(curve[step])), max(piece, key=lambda step: _height(curve[step]))}
    return {step: curve[step] for step in sorted(kept)}


def _height(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def _places(found: Places, most: int | None) -> dict[str, Any]:
    kept = set(range(len(found.moves))) if most is None else _early(found, most)
    z = {
        kind: [plain(row, decimals=Z_DECIMALS) if i in kept else None for i, row in enumerate(rows)]
        for kind, rows in zip(KINDS, found.z_KPT, strict=True)
    }
    return {
        "onset": found.onset,
        "peak": found.peak,
        "steps": [found.steps.start, found.steps.stop],
        "moves": plain(found.moves),
        "z": z,
        "first": {level: plain(first) | {"words": first.words()} for level, first in found.first.items()},
        "order": plain(found.order) | {"words": found.order.words()},
        "replays": list(found.replays),
        "left_out": found.left_out,
        "words": found.words(),
    }


def _early(found: Places, most: int) -> set[int]:
    """Of each level the places that moved first."""
    kept = set[int]()
    for level in {move.level for move in found.moves}:
        own = [i for i, move in enumerate(found.moves) if move.level == level]
        kept.update(sorted(own, key=lambda i: _moved(found.moves[i].moved))[:most])
    return kept


def _moved(step: int | None) -> float:
    return math.inf if step is None else step
