"""From verdicts to events: which steps belong together, where each event began, was worst, and ended.

Must not import anything else of aftershock but the interface.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from aftershock.signals.detect.rule import Verdict

GAP = 8
"""Quiet values within one spike: a cluster is one event."""
SLOW_GAP = 512
"""Values within one drift without a verdict: a slow rise is named again and again."""
MEMORY = 1024
"""Values remembered to find the onset of what is named late."""


class SignalEvent(NamedTuple):
    """What happened to `signal`: steps as in the log, all of them part of the event. `kind` is a verdict but ok."""

    kind: Verdict
    signal: str
    onset: int
    peak: int
    end: int


class _Open(NamedTuple):
    """An event going on: `worst` is the value at `peak`, turned so that more is worse; `quiet` values since `end`."""

    kind: Verdict
    onset: int
    peak: int
    worst: float
    end: int
    quiet: int


class EventTracker:
    """The events of one signal. `sign` is -1 where higher is better.

    Example:
        tracker = EventTracker("loss")
        for step, value in enumerate(values):
            state, verdict = rule.update(state, value)
            events += tracker.add(step, value, verdict, lag=rule.lag(state))
        events += tracker.close()
    """

    def __init__(self, signal: str, *, sign: float = 1.0) -> None:
        self.signal = signal
        self._sign = sign
        self._past: deque[tuple[int, float]] = deque(maxlen=MEMORY)
        self._spike: _Open | None = None
        self._hole: _Open | None = None
        self._slow: _Open | None = None

    def add(self, step: int, value: float, verdict: Verdict, *, lag: int = 0) -> list[SignalEvent]:
        """The events that this value ends; `lag` is the rule's, for shift, drift and jump."""
        self._past.append((step, self._sign * value))
        if verdict == "ok" and self._spike is None and self._hole is None and self._slow is None:
            return []
        done: list[SignalEvent] = []
        if verdict == "nonfinite":
            self._hole = self._extend(self._hole, verdict, step, 0.0)
            return done
        if verdict == "spike":
            self._spike = self._extend(self._spike, verdict, step, self._sign * value)
        elif verdict == "shift":
            done.append(self._shift(step, lag))
        elif verdict == "drift":
            self._drift(step, lag)
        elif verdict == "jump":
            run = self._tail(lag)
            best = min(run, key=lambda pair: pair[1])
            done.append(SignalEvent("jump", self.signal, run[0][0], best[0], step))
        return done + self._quieten(verdict)

    def close(self) -> list[SignalEvent]:
        """The events still open: the log ends, or is rewound."""
        left = [event for event in (self._spike, self._hole, self._slow) if event is not None]
        self._spike = self._hole = self._slow = None
        self._past.clear()
        return [self._event(event) for event in left]

    def open_events(self) -> list[SignalEvent]:
        """The events going on, as far as they are known."""
        return [self._event(event) for event in (self._spike, self._hole, self._slow) if event is not None]

    def _extend(self, event: _Open | None, kind: Verdict, step: int, value: float) -> _Open:
        if event is None:
            return _Open(kind, step, step, value, step, 0)
        if value > event.worst:
            event = event._replace(peak=step, worst=value)
        return event._replace(end=step, quiet=0)

    def _shift(self, step: int, lag: int) -> SignalEvent:
        """The spike that turned out to be the new normal, from its first value on."""
        run = self._tail(lag)
        peak, worst = max(run, key=lambda pair: pair[1])
        onset = run[0][0]
        if self._spike is not None:
            onset = self._spike.onset
            peak = self._spike.peak if self._spike.worst >= worst else peak
        self._spike = None
        return SignalEvent("shift", self.signal, onset, peak, step)

    def _drift(self, step: int, lag: int) -> None:
        run = self._tail(lag)
        peak, worst = max(run, key=lambda pair: pair[1])
        if self._slow is None:
            self._slow = _Open("drift", run[0][0], peak, worst, step, 0)
        elif worst > self._slow.worst:
            self._slow = self._slow._replace(peak=peak, worst=worst, end=step, quiet=0)
        else:
            self._slow = self._slow._replace(end=step, quiet=0)

    def _quieten(self, verdict: Verdict) -> list[SignalEvent]:
        """Count the quiet values of each open event, and end those that had enough."""
        done = []
        if self._spike is not None and verdict != "spike":
            self._spike = self._spike._replace(quiet=self._spike.quiet + 1)
            if self._spike.quiet > GAP:
                done.append(self._event(self._spike))
                self._spike = None
        if self._hole is not None:
            self._hole = self._hole._replace(quiet=self._hole.quiet + 1)
            if self._hole.quiet > GAP:
                done.append(self._event(self._hole))
                self._hole = None
        if self._slow is not None and verdict != "drift":
            self._slow = self._slow._replace(quiet=self._slow.quiet + 1)
            if self._slow.quiet > SLOW_GAP:
                done.append(self._event(self._slow))
                self._slow = None
        return done

    def _tail(self, lag: int) -> list[tuple[int, float]]:
        """The last `lag` + 1 steps with their values, as far back as memory goes."""
        return list(self._past)[-(lag + 1) :]

    def _event(self, event: _Open) -> SignalEvent:
        return SignalEvent(event.kind, self.signal, event.onset, event.peak, event.end)
