"""From actions to incident folders: when one opens, what belongs to it, and what came of it.

Must not import the guard or a policy.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from aftershock.guard.events import Event, EventKind
from aftershock.guard.incident import IncidentFile
from aftershock.guard.incidentrecord import Point
from aftershock.guard.policy import Action, Rewind, Seen, SkipStep, Stop
from aftershock.signals.detect.combine import Moved
from aftershock.signals.detect.roles import Role, role_of

QUIET = 50
"""Steps without any action after which a run has recovered: the cool-down of the policies."""


Kept = Literal["rewinds", "all"]


class Cases:
    """Opens an incident with the first action, adds what follows, closes it after `QUIET` quiet steps.

    `state`: which incidents keep a snapshot to replay from: those that end in a rewind or a stop, or every one.
    """

    def __init__(self, files: IncidentFile, *, signals: tuple[str, ...], state: Kept) -> None:
        self._files, self._state = files, state
        self._measured: set[Role] = {role_of(name) for name in signals}
        self._quiet = 0

    def open(self, action: Action, seen: Seen, moved: Iterable[Moved]) -> None:
        """Before the action is carried out: a new incident unless one is open. `moved`: with their onsets."""
        self._quiet = 0
        keep = self._state == "all" or isinstance(action, (Rewind, Stop))
        if self._files.current is not None:
            self._files.also_moved(moved)
            if keep:
                self._files.keep_state()
            return
        kind = {SkipStep: "skip", Rewind: "rewind", Stop: "stop"}.get(type(action), "scale")
        self._files.open(
            "nonfinite" if "nonfinite" in seen.verdicts.values() else kind,
            at=Point(seen.step, seen.batch_id),
            moved=moved,
            measured=self._measured,
            state=keep,
        )

    def did(self, kind: EventKind, seen: Seen, data: Mapping[str, Any], moved: Iterable[Moved]) -> None:
        """Something was done or seen while one is open."""
        if self._files.current is not None:
            self._files.also_moved(moved)
            self._files.did(Event(kind, seen.step, seen.batch_id, time.time(), dict(data)))

    def quiet(self, seen: Seen) -> None:
        """One step on which nothing was done."""
        if self._files.current is None:
            return
        self._quiet += 1
        if self._quiet >= QUIET:
            self.end("recovered", seen)

    def end(self, how: Literal["recovered", "stopped", "interrupted"], seen: Seen | None = None) -> None:
        """Close the open incident, if any."""
        current = self._files.current
        if current is not None:
            at = current.at if seen is None else Point(seen.step, seen.batch_id)
            self._files.close(how, at)
