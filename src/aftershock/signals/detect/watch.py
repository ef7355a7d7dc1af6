"""A log from its first row to its events: one detector a signal, in memory that does not grow with the log.

Example:
    found = detect_file("log.csv")
    for event in found.events:
        print(event.kind, event.signal, event.onset, event.peak, event.end)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from aftershock.config import nearest
from aftershock.signals.detect.combine import Incident, incidents
from aftershock.signals.detect.events import EventTracker, SignalEvent
from aftershock.signals.detect.logs.opening import log_rows
from aftershock.signals.detect.logs.rows import Follow, Problems, Row
from aftershock.signals.detect.registry import OURS, detector
from aftershock.signals.detect.robust import Robust, robust_for
from aftershock.signals.detect.roles import role_of
from aftershock.signals.detect.rule import Rule


class Detection(NamedTuple):
    """What was found in a log: `events` by onset, `incidents` named, `warnings` about the log, `signals` watched."""

    events: list[SignalEvent]
    incidents: list[Incident]
    warnings: list[str]
    signals: list[str]
    num_rows: int


class _Watch:
    """One signal: its rule, where the rule is, and its events."""

    def __init__(self, signal: str, rule: Rule[Any]) -> None:
        role = role_of(signal)
        self.rule: Rule[Any] = robust_for(role) if isinstance(rule, Robust) and rule == Robust() else rule
        self.state = self.rule.init()
        self.tracker = EventTracker(signal, sign=-1.0 if role == "accuracy" else 1.0)
        self.last: int | None = None
        self.num_finite = self.num_values = 0

    def add(self, step: int, value: float) -> list[SignalEvent]:
        self.last = step
        self.num_values += 1
        self.num_finite += math.isfinite(value)
        self.state, verdict = self.rule.update(self.state, value)
        return self.tracker.add(step, value, verdict, lag=self.rule.lag(self.state) if verdict != "ok" else 0)

    def rewind(self) -> list[SignalEvent]:
        self.state = self.rule.rewind(self.state)
        return self.tracker.close()


def detect_file(
    path: str | Path,
    *,
    rule: str = OURS,
    signals: Sequence[str] = (),
    follow: Follow | None = None,
    on_event: Callable[[SignalEvent], None] | None = None,
    on_warning: Callable[[str], None] | None = None,
) -> Detection:
    """Events in the log at `path`, with the detector `rule` (a name of `DETECTORS`) on each of `signals`.

    Without `signals` these are all numeric columns but settings and clocks (lr, epoch, tokens, ...); for another tool's
    rule, those of the roles that it is meant for, if the log has any. `follow` waits for more of the file;
    `on_event` hears of each event as it ends, `on_warning` of each oddity as it is met. KeyboardInterrupt while
    following ends the log there.
    Raises ValueError when the log cannot be read, has no rows, or lacks one of `signals`.
    """
    where = Path(path)
    chosen = detector(rule)
    problems = Problems(str(where), on_warning or (lambda sentence: None))
    rows = log_rows(where, follow, problems)
    watcher = Watcher(chosen, signals, problems, on_event)
    try:
        for row in rows:
            watcher.add(row)
    except KeyboardInterrupt:
        if follow is None:
            raise
    return watcher.finish(where)


class Watcher:
    """Rows in, events out; for logs that are not files too. Call `finish` at the end."""

    def __init__(
        self,
        rule: Rule[Any],
        signals: Iterable[str],
        problems: Problems,
        on_event: Callable[[SignalEvent], None] | None = None,
    ) -> None:
        self._rule = rule
        self._wanted = frozenset(signals)
        self._problems = problems
        self._on_event = on_event
        self._watches: dict[str, _Watch | None] = {}
        self._events: list[SignalEvent] = []
        self._held: dict[str, list[SignalEvent]] = {}
        self._num_rows = 0

    def add(self, row: Row) -> None:
        self._num_rows += 1
        step = row.step
        watches = self._watches
        for name, value in row.values.items():
            if name not in watches:
                watches[name] = _Watch(name, self._rule) if self._wants(name) else None
            watch = watches[name]
            if watch is None:
                continue
            if watch.last is not None and step <= watch.last:
                self._rewound(row, watch.last)
                self._publish(watch, watch.rewind())
            if (done := watch.add(step, value)) or self._held:
                self._publish(watch, done)

    def finish(self, path: Path) -> Detection:
        """Close what is open, and say what was odd. Raises ValueError when there was nothing to watch."""
        if self._num_rows == 0:
            raise ValueError(f"{path}: no rows to detect in; the log has a header or no metrics yet")
        for name in sorted(self._wanted - self._watches.keys()):
            raise ValueError(f"{path}: no signal {name!r}{nearest(name, self._watches)}")
        watched = {name: watch for name, watch in self._watches.items() if watch is not None}
        if not watched:
            raise ValueError(f"{path}: no column with numbers to watch; add one such as loss")
        for watch in watched.values():
            self._publish(watch, watch.tracker.close())
        for name, watch in watched.items():
            if watch.num_finite == 0:
                self._held.pop(name, None)
                rows = f"{watch.num_values:,} rows" if watch.num_values > 1 else "its one row"
                self._problems.add(f"nan {name}", f"{name} is not finite in all of {rows}; left out")
        if "loss" not in {role_of(name) for name in watched} and not self._wanted:
            self._problems.add("loss", f"no loss column (watched: {', '.join(watched)}); read on without")
        self._problems.summarise(_words)
        events = sorted(self._events, key=lambda e: (e.onset, e.end, e.signal, e.kind))
        return Detection(events, incidents(events, watched), self._problems.sentences, list(watched), self._num_rows)

    def open_events(self) -> list[SignalEvent]:
        """Events going on right now."""
        return [event for watch in self._watches.values() if watch for event in watch.tracker.open_events()]

    def _wants(self, name: str) -> bool:
        if self._wanted:
            return name in self._wanted
        role = role_of(name)
        return role != "setting" and (isinstance(self._rule, Robust) or role in self._rule.reads)

    def _rewound(self, row: Row, last: int) -> None:
        if row.step == last:
            self._problems.add("again", f"{row.where}: step {row.step} comes again; read as a rewound run")
        else:
            self._problems.add("back", f"{row.where}: step {row.step} comes after {last}; read as a rewound run")

    def _publish(self, watch: _Watch, done: list[SignalEvent]) -> None:
        """Events of a signal that was never finite wait: it may be a column that nobody filled."""
        name = watch.tracker.signal
        if done and watch.num_finite == 0:
            self._held.setdefault(name, []).extend(done)
            return
        for event in [*self._held.pop(name, []), *done] if watch.num_finite else []:
            self._events.append(event)
            if self._on_event is not None:
                self._on_event(event)


def _words(kind: str) -> str:
    word, _, name = kind.partition(" ")
    return {
        "again": "a step that comes again",
        "back": "a step that comes after a later one",
        "cell": f"no number in {name}",
        "width": "a row of another width",
        "line": "a line that is no JSON object",
        "step": "a row without a step" if not name else "a step that is no number",
        "cut": "a file cut short",
    }.get(word, kind)
