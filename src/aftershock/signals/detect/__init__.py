"""Detectors: what a signal's values mean, one value at a time.

`Robust` is ours; `DETECTORS` has it and the rules of other tools by name; `Combiner` names the kind of trouble from
several signals; `detect_file` finds the events in a log.
"""

from aftershock.signals.detect.combine import CAUSES, Cause, Combiner, Incident, incidents
from aftershock.signals.detect.events import EventTracker, SignalEvent
from aftershock.signals.detect.logs.rows import Follow
from aftershock.signals.detect.registry import DETECTORS, detector
from aftershock.signals.detect.robust import Robust, robust_for
from aftershock.signals.detect.roles import Role, role_of
from aftershock.signals.detect.rule import ALARMS, VERDICTS, Rule, Step, Verdict, verdicts
from aftershock.signals.detect.watch import Detection, detect_file

__all__ = [
    "ALARMS",
    "CAUSES",
    "Cause",
    "Combiner",
    "DETECTORS",
    "Detection",
    "SignalEvent",
    "EventTracker",
    "Follow",
    "Incident",
    "Robust",
    "Role",
    "Rule",
    "Step",
    "VERDICTS",
    "Verdict",
    "detect_file",
    "detector",
    "incidents",
    "robust_for",
    "role_of",
    "verdicts",
]
