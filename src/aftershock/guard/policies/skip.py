"""Skip the step: no rewind, no clip. Right for a bad batch, of no use once the moments are bad.

The guard carries the skip out with weights, moments, counters and schedule untouched. Must not import the guard.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from aftershock.guard.policies.incident import is_finite
from aftershock.guard.policies.saved import packed, require, unpacked
from aftershock.guard.policy import CONTINUE, Action, Continue, Live, Policy, Seen, SkipStep, Stop


@dataclass(kw_only=True, eq=False)
class Skip(Policy):
    """Skips steps whose loss or gradient is not finite, or spikes by the verdict on one of the signals `on`.

    At most `max_skips` in a row (10, as MindFormers). The next finite one is taken all the same ("take", as optax) or
    stops the run ("stop"); one that is not finite always stops it: it would destroy the weights. Skipping does not
    shorten the recovery once the moments are bad (Marin 32B): then use `Ladder`, or chain with `MomentumReset`.

    Example:
        guard = Guard(model, optimizer, policy=Skip(on=("grad_norm",)))
    """

    on: tuple[str, ...] = ("loss", "grad_norm")
    max_skips: int = 10
    then: Literal["take", "stop"] = "take"

    _run: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        require(self, max_skips=1)
        self.on = tuple(self.on)
        strange = [signal for signal in self.on if signal not in ("loss", "grad_norm")]
        if strange or self.then not in ("take", "stop"):
            raise ValueError(
                f"Skip: on names loss and grad_norm only (an update is taken before it is seen), and then is take or "
                f"stop; got on={self.on}, then={self.then!r}"
            )

    def before_step(self, seen: Seen, live: Live) -> Action:
        finite = is_finite(seen)
        loud = [signal for signal in self.on if seen.verdicts.get(signal) == "spike"]
        if finite and not loud:
            self._run = 0
            return CONTINUE
        what = f"{' and '.join(loud)} spiked" if finite else "loss or gradient not finite"
        self._run += 1
        if self._run <= self.max_skips:
            return SkipStep(f"{what} ({self._run} in a row)")
        if finite and self.then == "take":
            return Continue(f"{what}, but {self.max_skips} steps in a row were skipped: taken" if loud else "")
        return Stop(f"{what}, after {self.max_skips} skipped steps in a row")

    def after_rewind(self, step: int) -> None:
        self._run = 0

    def state_dict(self) -> dict[str, Any]:
        return packed(self, run=self._run)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._run = unpacked(self, state, ("run",))["run"]
