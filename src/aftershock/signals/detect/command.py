"""`aftershock detect`: events in anyone's log, as text or JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

if TYPE_CHECKING:
    from aftershock.signals.detect.events import SignalEvent
    from aftershock.signals.detect.watch import Detection


@dataclass(frozen=True)
class Detect:
    """Find spikes, shifts, drifts, jumps and non-finite values in a training log."""

    file: Positional[Path]
    """CSV (step,loss[,grad_norm,...]), JSON lines, TensorBoard events, W&B offline run, or a run folder of ours."""
    rule: Annotated[str, arg(metavar="NAME")] = "robust"
    """Detector: robust (ours), or another tool's, such as lightning, olmo-skip, zclip; a wrong name lists them."""
    signals: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = ()
    """Columns to watch; all but settings and clocks by default."""
    json: bool = False
    """Print a JSON list of {kind, signal, onset, peak, end}; with --follow one object a line, as each event ends."""
    follow: bool = False
    """Wait for more rows until interrupted, and print each event as it ends."""

    def run(self) -> int:
        from aftershock.signals.detect.logs.rows import Follow
        from aftershock.signals.detect.watch import detect_file

        found = detect_file(
            self.file,
            rule=self.rule,
            signals=self.signals,
            follow=Follow() if self.follow else None,
            on_event=self._print_event if self.follow else None,
            on_warning=lambda sentence: _err(f"aftershock: {sentence}"),
        )
        if self.json and not self.follow:
            _out(json.dumps([event._asdict() for event in found.events], indent=1))
        elif not self.json:
            self._print(found)
        return 0

    def _print_event(self, event: SignalEvent) -> None:
        _out(json.dumps(event._asdict()) if self.json else _line(event, len(event.signal)))

    def _print(self, found: Detection) -> None:
        from aftershock.signals.detect.combine import CAUSES

        width = max(map(len, [*found.signals, "signal"]))
        if found.events and not self.follow:
            _out(f"{'kind':<9}  {'signal':<{width}}  {'onset':>9}  {'peak':>9}  {'end':>9}")
            for event in found.events:
                _out(_line(event, width))
        for incident in found.incidents:
            if incident.cause != "unknown":
                _out(f"steps {incident.onset} to {incident.end}: {CAUSES[incident.cause]}")
        several = "event" if len(found.events) == 1 else "events"
        _out(f"{len(found.events)} {several} in {found.num_rows:,} rows of {', '.join(found.signals)}")


def _line(event: SignalEvent, width: int) -> str:
    return f"{event.kind:<9}  {event.signal:<{width}}  {event.onset:>9}  {event.peak:>9}  {event.end:>9}"


def _out(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _err(text: str) -> None:
    sys.stderr.write(text + "\n")
