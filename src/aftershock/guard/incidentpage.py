"""The page a person reads first, at 3 a.m.: what happened, what the guard did, what came of it, what to do now.

Plain words and commands that work as they stand. Must not import the guard, the recorder or a policy.
"""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Sequence

from aftershock.guard.events import KINDS
from aftershock.guard.incidentrecord import BATCHES, PAGE, SIGNALS, TENSORS, Incident, Row
from aftershock.signals.detect.combine import CAUSES

BEFORE = 50
"""Steps before the onset that say what was normal."""
MAX_ACTIONS = 40
"""Actions listed; incident.json has all."""

OUTCOMES = {
    "open": "Still going on, or the process was killed before the outcome was known.",
    "recovered": "The run has recovered",
    "recurred": "It came back: see the next incident",
    "stopped": "The run was stopped",
    "interrupted": "The process ended before the outcome was known.",
}

ADVICE = {
    "rate_or_state_fault": "Look at the learning-rate schedule and at what was changed or loaded just before; lower "
    "the peak rate if this comes again.",
    "data_or_hardware": "Read the batches below first. If they look innocent, run the same steps once more: a fault of "
    "the hardware does not come back.",
    "second_moment_lag": "Lower beta2 (0.95 instead of 0.999, say), or clip the update (StableAdamW).",
    "growth": "Logits grew for a long time: QK-norm, z-loss or weight decay treat that; going back alone will not.",
    "improvement": "Nothing to do: the loss fell suddenly and stayed down.",
    "nonfinite": "Look at precision: which operation overflows, and whether float32 there removes it.",
    "unknown": "Look at signals.csv and the batches; more signals watched would tell more.",
}


def page(incident: Incident) -> str:
    """The page as Markdown."""
    parts = [
        f"# {incident.kind} at step {incident.at.step}, batch {incident.at.batch_id}",
        f"**{_outcome(incident)}**",
        "## What happened",
        _happened(incident),
        "## What moved first",
        _moved(incident),
        "## What the guard did",
        _actions(incident),
        "## What to do now",
        _next(incident),
        "## What lies here",
        _files(incident),
    ]
    return "\n\n".join(parts) + "\n"


def _outcome(incident: Incident) -> str:
    words = OUTCOMES[incident.status]
    if incident.end is None or incident.status == "open":
        return words
    batches = max(0, incident.end.batch_id - incident.at.batch_id)
    return f"{words} (step {incident.end.step}, {batches} batches later)."


def _happened(incident: Incident) -> str:
    before = [r.loss for r in incident.rows if r.batch_id < incident.onset.batch_id and math.isfinite(r.loss)][-BEFORE:]
    lines = [f"- It began at step {incident.onset.step} (batch {incident.onset.batch_id})."]
    if before:
        lines.append(f"- Before that the loss was {statistics.median(before):.4g} (median of {len(before)} steps).")
    if incident.peak is not None:
        lines.append(f"- {_worst(incident.peak)}")
    holes = sum(not math.isfinite(r.loss) for r in incident.rows if r.batch_id >= incident.onset.batch_id)
    if holes:
        lines.append(f"- Steps whose loss was not finite: {holes}.")
    return "\n".join(lines)


def _worst(peak: Row) -> str:
    others = {"gradient norm": peak.grad_norm, "update norm": peak.update_norm, "rate": peak.lr}
    known = ", ".join(f"{name} {value:.4g}" for name, value in others.items() if not math.isnan(value))
    told = f" ({known})" if known else ""
    return f"At its worst, step {peak.step} (batch {peak.batch_id}), the loss was {peak.loss:.4g}{told}."


def _moved(incident: Incident) -> str:
    lines = [f"{i}. step {m.onset}: `{m.signal}` ({m.kind})" for i, m in enumerate(incident.moved, 1)]
    guess = f"First guess at the cause: {CAUSES[incident.cause]}. It rests on the order alone; a replay can confirm it."
    return "\n".join([*(lines or ["No signal did: see the events."]), "", guess])


def _actions(incident: Incident) -> str:
    if not incident.actions:
        return "Nothing yet."
    lines = []
    for event in incident.actions[:MAX_ACTIONS]:
        reason = f": {event.data['reason']}" if event.data.get("reason") else ""
        lines.append(f"- step {event.step}, batch {event.batch_id}: {KINDS[event.kind]}{reason}")
    more = len(incident.actions) - MAX_ACTIONS
    return "\n".join(lines + ([f"- and {more} more, in incident.json"] if more > 0 else []))


def _next(incident: Incident) -> str:
    calm = incident.status == "recovered"
    lines = ["- Nothing is urgent: the run goes on." if calm else f"- {_urgent(incident)}"]
    lines.append(f"- {ADVICE[incident.cause]}")
    if incident.batch_ids:
        lines.append(
            f"- Read the data: `{BATCHES}` says which rows were worst, and has their text where it could be had."
        )
    if incident.snapshot is not None:
        folder = shlex.quote(str(incident.folder.absolute()))
        lines.append(
            "- Find out why, by running it again with one thing changed at a time: "
            f"`aftershock replay {folder} --workload FILE.py:build`, where `build()` in FILE.py makes model, "
            "optimizer, batches and loss as this run did (`aftershock replay --help` shows one)"
        )
    lines += ["- Look at it in Python:", "", "```python", *_snippet(incident), "```"]
    return "\n".join(lines)


def _urgent(incident: Incident) -> str:
    if incident.status == "stopped":
        return "The run is stopped and its last healthy state is kept; it needs a decision before it goes on."
    if incident.status == "recurred":
        return "What was done did not help for good: read the next incident before letting the run go on."
    return "See whether the process still runs; if it does, nothing is needed until this page says what came of it."


def _snippet(incident: Incident) -> Sequence[str]:
    folder = repr(str(incident.folder.absolute()))
    lines = [
        "from aftershock.guard.incident import read_incident",
        f"incident = read_incident({folder})",
        "print(incident.cause, incident.moved, incident.peak)",
    ]
    if incident.batch_ids:
        lines.append(f"batch = incident.batch({incident.batch_ids[-1]})")
    if incident.snapshot is not None:
        lines.append("# to go back, with the model and optimizer made as for training:")
        lines.append("# from aftershock.guard.disk import restore_from; from aftershock.guard.state import Training")
        lines.append("# restore_from(incident.snapshot, Training(model, optimizer, scheduler=scheduler))")
    return lines


def _files(incident: Incident) -> str:
    lines = [f"- `{SIGNALS}`: loss, gradient norm, update norm and rate, {len(incident.rows)} steps around it"]
    ids = incident.batch_ids
    kept = f"copies of batches {ids[0]} to {ids[-1]} ({len(ids)})" if ids else "no batches were kept"
    gone = (
        "" if (incident.folder / TENSORS).exists() or not ids else "; the tensors had to make room for newer incidents"
    )
    lines.append(f"- `{BATCHES}`, `{TENSORS}`: {kept}{gone}")
    if incident.snapshot is not None and incident.start is not None:
        lines.append(
            f"- `snapshot/`: the state after {incident.start.step} steps, before all this: start a replay here"
        )
    else:
        lines.append(
            "- no snapshot: skipped steps keep none, nothing healthy was at hand, or it had to make room for newer ones"
        )
    return "\n".join([*lines, f"- `incident.json`: all of `{PAGE}` and more, for programs"])
