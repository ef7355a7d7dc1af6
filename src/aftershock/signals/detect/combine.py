"""Several signals together: what kind of trouble it is, from which of them moved and in which order.

The rules are those of the fault injections in the survey of causes: a rate or state fault moves the update and not the
gradient; bad data and hardware move both; second-moment lag moves curvature, then RMS_t, then the loss; growth shows in
logits or log Z long before anything fast. A cause is a first guess that a replay can confirm, never a finding.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from aftershock.signals.detect.events import SignalEvent
from aftershock.signals.detect.roles import Role, role_of
from aftershock.signals.detect.rule import Verdict

Cause = Literal[
    "rate_or_state_fault",
    "data_or_hardware",
    "second_moment_lag",
    "growth",
    "improvement",
    "nonfinite",
    "unknown",
]

CAUSES: dict[Cause, str] = {
    "rate_or_state_fault": "the update moved and the gradient did not: learning rate or optimizer state",
    "data_or_hardware": "update and gradient moved together: data or hardware (a plain re-run tells them apart)",
    "second_moment_lag": "RMS_t rose before the loss: Adam's second moment lags behind the gradient",
    "growth": "logits or log Z rose slowly before anything fast: growth of logits",
    "improvement": "a sudden lasting improvement, no fault",
    "nonfinite": "nothing moved before the values stopped being finite: numerics",
    "unknown": "these signals do not tell the kind",
}
"""Each cause in words."""

HORIZON = 200
"""Steps over which fast signals belong to one incident: the longest lead of a fast precursor is about 30, and a spike
recovers within about 100."""
SLOW_HORIZON = 10_000
"""Steps over which a slow rise may precede what it causes (section 3 of the survey of causes: 10^2 to 10^4)."""


class Moved(NamedTuple):
    """A signal left its normal range: `kind` as the first verdict, from step `onset` to step `last`."""

    signal: str
    kind: Verdict
    onset: int
    last: int


class Incident(NamedTuple):
    """Events that belong together, and the kind of trouble they are."""

    cause: Cause
    onset: int
    end: int
    events: tuple[SignalEvent, ...]


def name_cause(moved: Iterable[Moved], measured: Collection[Role]) -> Cause:
    """The cause of one incident. `measured` are the roles that were watched: what did not move counts only then.

    >>> name_cause(
    ...     [Moved("update/all/norm", "spike", 7, 7), Moved("loss", "spike", 8, 9)], {"update", "gradient", "loss"}
    ... )
    'rate_or_state_fault'
    """
    moves = list(moved)
    slow = [m.onset for m in moves if role_of(m.signal) in ("logit", "log_z") and m.kind in ("drift", "shift")]
    fast: dict[Role, int] = {}
    for move in moves:
        if move.kind in ("spike", "shift"):
            role = role_of(move.signal)
            fast[role] = min(move.onset, fast.get(role, move.onset))
    slow_only = {role: step for role, step in fast.items() if role not in ("logit", "log_z")}
    if slow and min(slow) < min(slow_only.values(), default=min(slow) + 1):
        return "growth"
    update, gradient = fast.get("update"), fast.get("gradient")
    if _lags(fast, measured):
        return "second_moment_lag"
    if update is not None and "gradient" in measured:
        return "rate_or_state_fault" if gradient is None or gradient > update else "data_or_hardware"
    holes = [m.onset for m in moves if m.kind == "nonfinite"]
    if holes and min(holes) <= min(fast.values(), default=min(holes)):
        return "nonfinite"
    if moves and all(m.kind == "jump" for m in moves):
        return "improvement"
    return "unknown"


def _lags(fast: Mapping[Role, int], measured: Collection[Role]) -> bool:
    """Curvature, then RMS_t, then loss; without curvature, the gradient has to grow no later than RMS_t.

    The last part keeps apart a second moment that was lost: it too moves RMS_t first, but with no gradient before.
    """
    rms, loss = fast.get("rms_t"), fast.get("loss")
    if rms is None or loss is None or not rms < loss:
        return False
    first = fast.get("curvature") if "curvature" in measured else fast.get("gradient")
    return first is not None and (first < rms or ("curvature" not in measured and first == rms))


class CombinerState(NamedTuple):
    """What has moved within the horizons."""

    moved: tuple[Moved, ...]


class Named(NamedTuple):
    """The next state, and the cause so far; None while no signal says anything."""

    state: CombinerState
    cause: Cause | None


@dataclass(frozen=True, kw_only=True)
class Combiner:
    """Names the kind of trouble while it happens, from the verdicts on several signals at each step.

    Example:
        combiner = Combiner(signals=("loss", "grad_norm", "update_norm"))
        state = combiner.init()
        state, cause = combiner.update(state, step, {"loss": "ok", "grad_norm": "ok", "update_norm": "spike"})
    """

    signals: tuple[str, ...]
    """Names of all signals that are watched."""

    def init(self) -> CombinerState:
        return CombinerState(())

    def update(self, state: CombinerState, step: int, verdicts: Mapping[str, Verdict]) -> Named:
        """`verdicts` by signal; those that are ok may be left out."""
        loud: list[tuple[str, Verdict]] = [(signal, verdict) for signal, verdict in verdicts.items() if verdict != "ok"]
        if not loud and not state.moved:
            return Named(state, None)
        known: dict[tuple[str, Verdict], Moved] = {
            (m.signal, m.kind): m for m in state.moved if step - m.last <= _horizon(m.kind)
        }
        for signal, verdict in loud:
            old = known.get((signal, verdict))
            known[signal, verdict] = Moved(signal, verdict, old.onset if old else step, step)
        new = CombinerState(tuple(known.values()))
        measured: set[Role] = {role_of(name) for name in self.signals}
        return Named(new, name_cause(new.moved, measured) if loud else None)


def incidents(events: Iterable[SignalEvent], signals: Iterable[str]) -> list[Incident]:
    """Events grouped by closeness (`HORIZON` steps between the end of one and the onset of the next), each named.

    `signals` are all that were watched. A slow rise of logits up to `SLOW_HORIZON` before an incident counts for it.
    """
    measured: set[Role] = {role_of(name) for name in signals}
    ordered = sorted(events, key=lambda e: (e.onset, e.end))
    groups: list[list[SignalEvent]] = []
    end = 0
    for event in ordered:
        if groups and event.onset - end <= HORIZON:
            groups[-1].append(event)
            end = max(end, event.end)
        else:
            groups.append([event])
            end = event.end
    found = []
    for group in groups:
        onset = group[0].onset
        before = [
            e for e in ordered if e.kind in ("drift", "shift") and e.onset < onset and onset - e.end <= SLOW_HORIZON
        ]
        slow = [e for e in before if role_of(e.signal) in ("logit", "log_z")]
        cause = name_cause([Moved(e.signal, e.kind, e.onset, e.end) for e in [*slow, *group]], measured)
        found.append(Incident(cause, onset, max(e.end for e in group), tuple(group)))
    return found


def _horizon(kind: Verdict) -> int:
    return SLOW_HORIZON if kind in ("drift", "shift") else HORIZON
