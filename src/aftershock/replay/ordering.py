"""Which of several places is first, over replays: a sign test against each of the others, with Holm's correction.

Must not import the runner or the lab: it reads steps, it takes none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

ALPHA = 0.05
SHOWN = 4
"""Names that a sentence lists."""


class First(NamedTuple):
    """Which place of a `level` moved first, over `replays`.

    - `place`: the one that is most often (`times`) first or among the first; None where none moved in any replay
    - `lead`: steps from its move to the loss's onset in the first replay; None where it did not move in that one
    - `before`: by other place, in how many replays `place` moved strictly before it; never to move is to move later
    - `p`: by other place, exact one-sided sign test of that count (a tie speaks against), after Holm's correction
    - `clear`: every p is below 0.05. `tied`: the place, and all of which that cannot be said
    - `needed`: with fewer replays not even the same order in all of them could be clear
    """

    level: str
    place: str | None
    times: int
    replays: int
    lead: int | None
    before: dict[str, int]
    p: dict[str, float]
    tied: tuple[str, ...]
    clear: bool
    needed: int

    def words(self) -> str:
        """One sentence."""
        if self.place is None:
            return f"No {self.level} left its calm band before the peak."
        if self.clear:
            count = f"first in {self.times} of {self.replays} replays, p = {max(self.p.values()):.2g}"
            lead = "though not in the unchanged one" if self.lead is None else lead_words(self.lead)
            return f"Of all {self.level}s {self.place} moved first, {lead} ({count})."
        if not self.p:
            return f"{self.place} is the only {self.level}, so there is no order."
        more = f" and {len(self.tied) - SHOWN} more" if len(self.tied) > SHOWN else ""
        few = f" (fewer than {self.needed} cannot be clear)" if self.replays < self.needed else ""
        names = ", ".join(self.tied[:SHOWN]) + more
        return f"No {self.level} is clearly first in {self.replays} replays{few}: {names} are not told apart."


def rank(level: str, moved: Sequence[Mapping[str, float]], *, onset: int) -> First:
    """Which place is first, from the step at which each moved, one mapping a replay; inf for never.

    `onset` is the loss's, of the first replay. Of places that are first equally often it is the one that is so by the
    median step.
    """
    names, total = list(moved[0]), len(moved)
    firsts = [{name for name in names if steps[name] == min(steps.values()) < math.inf} for steps in moved]
    times = {name: sum(name in first for first in firsts) for name in names}
    place = max(names, key=lambda name: (times[name], -float(np.median([steps[name] for steps in moved]))))
    if not times[place]:
        return First(level, None, 0, total, None, {}, {}, (), False, needed(len(names)))
    before = {other: sum(bool(steps[place] < steps[other]) for steps in moved) for other in names if other != place}
    p = holm({other: sign_test(wins, total) for other, wins in before.items()})
    tied = (place, *sorted((other for other in p if p[other] >= ALPHA), key=lambda other: before[other]))
    lead = onset - moved[0][place]
    return First(
        level=level,
        place=place,
        times=times[place],
        replays=total,
        lead=int(lead) if math.isfinite(lead) else None,
        before=before,
        p=p,
        tied=tied,
        clear=bool(p) and len(tied) == 1,
        needed=needed(len(names)),
    )


def sign_test(wins: int, total: int) -> float:
    """P(at least `wins` of `total`) of a fair coin, exactly.

    >>> sign_test(6, 6)
    0.015625
    """
    return sum(math.comb(total, k) for k in range(wins, total + 1)) / 2**total


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down correction (1979): the i-th smallest of m times m - i + 1, never below a smaller one's.

    >>> holm({"a": 0.01, "b": 0.03})
    {'a': 0.02, 'b': 0.03}
    """
    corrected: dict[str, float] = {}
    largest = 0.0
    for i, name in enumerate(sorted(p, key=lambda name: p[name])):
        largest = max(largest, min(1.0, (len(p) - i) * p[name]))
        corrected[name] = largest
    return {name: corrected[name] for name in p}


def needed(count: int) -> int:
    """Fewest replays of which the same order in all can be clear among `count` places: 2^-n (count - 1) < 0.05.

    >>> needed(4), needed(100)
    (6, 11)
    """
    return math.floor(math.log2(max(count - 1, 1) / ALPHA)) + 1


def lead_words(lead: int) -> str:
    """How long before the loss.

    >>> lead_words(12)
    '12 steps before the loss'
    """
    if lead == 0:
        return "at the same step as the loss"
    return f"{abs(lead)} step{'s' if abs(lead) > 1 else ''} {'before' if lead > 0 else 'after'} the loss"
