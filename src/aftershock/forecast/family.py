"""Along what the sizes of a study vary - width, depth, both jointly, or each on its own - and how far a fit may reach.

Legend: S sizes, C features. All in decades: n = log10 N with N = 12 depth width^2, w = log10 width, d = log10 depth.
Pure; must not import the rest of the forecast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from aftershock.lab.sizes import Size

OFF_LINE = 0.1
"""Decades by which a size may lie off the line of the others and still be of their family (a factor 1.26)."""
REACH = {2: 1.0}
DEFAULT_REACH = 2.0
"""How far beyond the sizes trained a forecast goes, in spans of their log N: once with two sizes, twice with more.
Ours: the paper went from 2.4M..1.2B (2.7 decades) to 4.8B (0.6)."""
MIN_FOR_BOTH = 4
MIN_SPAN = math.log10(1.5)


Point = tuple[float, float]
"""Width and depth; a fit may be asked between the whole numbers."""


class Family(NamedTuple):
    """`axes` [A, 2]: what (2 w, d) are summed with to give each coordinate, n alone or 2 w and d apart; `center` [2]
    the mean size; `spans` [A, 2] the lowest and highest coordinate; `line` [2] the direction of a family of one
    coordinate; `log_n` the range of n."""

    kind: Literal["width", "depth", "joint", "both"]
    axes: np.ndarray
    center: np.ndarray
    spans: np.ndarray
    line: np.ndarray
    log_n: tuple[float, float]
    num_sizes: int

    @property
    def reach(self) -> float:
        """Spans beyond the sizes trained that a forecast may go."""
        return REACH.get(self.num_sizes, DEFAULT_REACH)

    @property
    def num_slopes(self) -> int:
        return len(self.axes)

    def features(self, sizes: Sequence[Point]) -> np.ndarray:
        """[S, 1 + A + 1] of (width, depth): 1, the coordinates, and the square of n, centred."""
        points = _points(sizes) - self.center
        along = points @ self.axes.T
        squared = points.sum(axis=1, keepdims=True) ** 2
        return np.concatenate([np.ones((len(points), 1)), along, squared], axis=1)

    def point_at(self, log_n: float) -> Point:
        """The member of this log10 N. Raises ValueError where width and depth vary each on its own."""
        if self.kind == "both":
            raise ValueError("sizes that vary in width and depth each on its own have no single member of one N")
        twice_w, d = self.center + (log_n - math.log10(12) - self.center.sum()) / self.line.sum() * self.line
        return 10 ** (twice_w / 2), 10**d

    def check(self, target: Size) -> None:
        """Raises ValueError where `target` is no member of the family, or lies further out than the fit supports."""
        point = _points([(target.width, target.depth)])[0] - self.center
        off = 0.0 if self.kind == "both" else float(np.linalg.norm(point - (self.line @ point) * self.line))
        if off > OFF_LINE:
            vary = {"width": "width only", "depth": "depth only", "joint": "width and depth together"}[self.kind]
            raise ValueError(
                f"{target.label} lies off the family trained, whose sizes vary in {vary}; "
                "train sizes that vary in the other direction too, or name a target of the family"
            )
        along, spread = self.axes @ point, self.spans[:, 1] - self.spans[:, 0]
        beyond = np.maximum(along - self.spans[:, 1], self.spans[:, 0] - along)
        worst = int((beyond / spread).argmax())
        limit = self.reach * float(spread[worst])
        if beyond[worst] > limit:
            raise ValueError(
                f"{target.label} lies {10 ** float(beyond[worst]):.3g} times beyond the {self.num_sizes} sizes "
                "trained, "
                f"which span a factor {10 ** float(spread[worst]):.3g} in N; that supports a forecast {10**limit:.3g} "
                f"times beyond them: train {'a third' if self.num_sizes == 2 else 'a larger'} size, or name a nearer "
                "target"
            )


def find_family(sizes: Sequence[Point]) -> Family:
    """The family of these (width, depth). Raises ValueError where they determine none.

    >>> find_family([(16, 2), (32, 2), (64, 2)]).kind
    'width'
    """
    unique = sorted(set(sizes))
    points = _points(unique)
    center = points.mean(axis=0)
    log_n = points.sum(axis=1) + math.log10(12)
    if np.ptp(log_n) < MIN_SPAN:
        raise ValueError(
            f"the sizes {_words(unique)} have nearly the same N; train sizes a factor 2 apart or more in N"
        )
    line = np.linalg.svd(points - center)[2][0]
    off = points - center - ((points - center) @ line)[:, None] * line
    if np.linalg.norm(off, axis=1).max() <= OFF_LINE:
        axes = np.ones((1, 2))
        kind = "width" if np.ptp(points[:, 1]) < OFF_LINE else "depth" if np.ptp(points[:, 0]) < OFF_LINE else "joint"
    elif len(unique) >= MIN_FOR_BOTH:
        axes, kind = np.eye(2), "both"
    else:
        raise ValueError(
            f"the sizes {_words(unique)} vary in width and depth each on its own; that takes {MIN_FOR_BOTH} sizes "
            "at least: add one, or vary only one of the two"
        )
    along = (points - center) @ axes.T
    spans = np.stack([along.min(axis=0), along.max(axis=0)], axis=1)
    return Family(kind, axes, center, spans, line, (float(log_n.min()), float(log_n.max())), len(unique))


def _points(sizes: Sequence[Point]) -> np.ndarray:
    return np.array([(2 * math.log10(width), math.log10(depth)) for width, depth in sizes])


def _words(sizes: Sequence[Point]) -> str:
    return ", ".join(f"{width:g}x{depth:g}" for width, depth in sizes)
