"""Controls: the same steps again with nothing changed, and what it means when they do not give the same losses.

    result = run_controls(subject)
    print(result.words)

Must not import the lab.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from aftershock.guard.digest import checksum, of_batch
from aftershock.replay.loop import backward, take_steps
from aftershock.replay.response import Response
from aftershock.replay.run import Cell, Unchanged
from aftershock.replay.runner import CellResult, run_cell
from aftershock.replay.subject import Subject

LEAST = 3
"""Fewer replays say nothing of their spread."""

Kind = Literal["deterministic", "reproducible", "sometimes", "not_reproducible"]
"""deterministic: every control has the recorded losses bit for bit; reproducible: all have the spike, not the bits;
sometimes: some have it; not_reproducible: none has."""

Why = Literal["none", "nondeterminism", "hardware", "loader", "surroundings"]
"""What keeps the controls from the recorded bits."""


class Recompute(NamedTuple):
    """One step's loss and gradient, twice from the same state: `step`, the first whose loss is not the recorded one.

    `losses` are the two, `recorded` what was; `agree`: whether the two have the same bits, gradients included;
    `batch`: whether the batch is the recorded one, None where no digest of it was kept.
    """

    step: int
    losses: tuple[float, float]
    recorded: float
    agree: bool
    batch: bool | None


class Controls(NamedTuple):
    """What the unchanged replays did.

    - `came_back`: how many of them have the spike; `first_difference`: the earliest step at which one of them is not
      as recorded, None where all are
    - `spread`: largest difference between any two controls' ln loss at a step, 0 where they have the same bits;
      `off`: largest difference to the record
    - `responses`: of each. `words`: all of it in sentences
    """

    kind: Kind
    why: Why
    results: tuple[CellResult, ...]
    responses: tuple[Response, ...]
    came_back: int
    first_difference: int | None
    spread: float
    off: float
    recompute: Recompute | None
    words: str


def control_cells(number: int = LEAST) -> list[Cell]:
    """Controls for a grid, `control#1` first. Raises ValueError for less than 3."""
    if number < LEAST:
        raise ValueError(f"{number} controls say nothing of their spread; give at least {LEAST}")
    return [Cell(name=f"control#{i}", family="control", edit=Unchanged()) for i in range(1, number + 1)]


def run_controls(subject: Subject, *, number: int = LEAST, steps: int | None = None) -> Controls:
    """Replay unchanged `number` times in this process, and judge. Costs as many replays, and one more where they are
    not as recorded. Raises ValueError for less than 3, and what an unchanged replay itself raises as a note."""
    return judge_controls(subject, [run_cell(subject, cell, steps=steps) for cell in control_cells(number)])


def judge_controls(subject: Subject, results: Sequence[CellResult]) -> Controls:
    """What controls that have run say, from wherever they ran. Raises ValueError when none of them took a step."""
    base = subject.baseline
    answers = [(result, result.response(base)) for result in results]
    ran = [(result, response) for result, response in answers if response is not None]
    if not ran:
        errors = "; ".join(sorted({result.error for result in results if result.error})) or "no time was left"
        raise ValueError(f"no unchanged replay took a step: {errors}. Without a control no replay means anything")
    curves = [result.by_step for result, _ in ran]
    different = [step for curve in curves for step in curve if not _same(curve[step], subject.recorded.get(step))]
    first = min(different, default=None)
    came_back = sum(response.present for _, response in ran)
    redone = None if first is None else recompute(subject, first)
    spread = max(_gap(a, b) for a in curves for b in curves)
    why = _why(subject, redone, spread)
    if first is None:
        kind: Kind = "deterministic"
    else:
        kind = "reproducible" if came_back == len(ran) else "sometimes" if came_back else "not_reproducible"
    off = max(_gap(curve, subject.recorded) for curve in curves)
    words = _words(kind, why, subject, ran=len(ran), came_back=came_back, redone=redone, spread=spread)
    return Controls(
        kind=kind,
        why=why,
        results=tuple(result for result, _ in ran),
        responses=tuple(response for _, response in ran),
        came_back=came_back,
        first_difference=first,
        spread=spread,
        off=off,
        recompute=redone,
        words=words,
    )


def recompute(subject: Subject, step: int) -> Recompute:
    """Go back, train unchanged up to `step`, and take its loss and gradient twice from there. Nothing is stepped."""
    subject.restore()
    run = subject.run()
    for _ in take_steps(run, subject.window.start, step):
        pass
    digest = of_batch(subject.batch(step))
    subject.keep(step)
    try:
        (loss, grads), (again, grads_again) = _gradient(subject, step), _gradient(subject, step)
    finally:
        if step not in (subject.window.start, subject.earlier):
            del subject.states[step]
    known = subject.digests.get(step)
    recorded = subject.recorded.get(step, math.nan)
    agree = _same(loss, again) and grads == grads_again
    return Recompute(step, (loss, again), recorded, agree, None if known is None else known == digest)


def _gradient(subject: Subject, step: int) -> tuple[float, tuple[int | None, ...]]:
    """Loss and checksums of the gradients at a step, from the state kept for it."""
    subject.restore(step)
    run = subject.run()
    run.step = step
    loss = backward(run, step).item()
    sums = tuple(None if p.grad is None else checksum(p.grad) for p in subject.workload.model.parameters())
    subject.workload.model.zero_grad(set_to_none=True)
    return loss, sums


def _why(subject: Subject, redone: Recompute | None, spread: float) -> Why:
    """From the strongest evidence down: replays that differ among themselves, another batch, another machine."""
    if redone is None:
        return "none"
    if not redone.agree or spread > 0:
        return "nondeterminism"
    if redone.batch is False:
        return "loader"
    return "surroundings" if subject.changes or _same(redone.losses[0], redone.recorded) else "hardware"


def _words(
    kind: Kind, why: Why, subject: Subject, *, ran: int, came_back: int, redone: Recompute | None, spread: float
) -> str:
    if redone is None:
        spiked = "with the spike" if came_back else "and the loss shows no spike, as recorded"
        return f"{ran} of {ran} unchanged replays have the recorded losses bit for bit, {spiked}."
    opening = {
        "reproducible": f"The spike comes back in all {ran} unchanged replays, though not with the recorded bits",
        "sometimes": f"The spike comes back in {came_back} of {ran} unchanged replays",
        "not_reproducible": f"Not reproducible: the spike does not come back in any of {ran} unchanged replays",
        "deterministic": "",
    }[kind]
    a, b = redone.losses
    at = f"step {redone.step}: recorded {redone.recorded:.9g}, computed again {a:.9g} and {b:.9g}"
    reasons: dict[Why, str] = {
        "none": "",
        "nondeterminism": "the replays differ among themselves, so the loss is not deterministic; use "
        f"torch.use_deterministic_algorithms(True), or compare effects with the controls' spread ({spread:.2g} in ln)",
        "loader": "the replays agree and the batch is not the recorded one: the loader gave other data then or now",
        "surroundings": "the replays agree with each other and not with the record, and the machine differs: "
        + (
            "; ".join(subject.changes) or "one thread in the workers, and computed again in this process it is recorded"
        ),
        "hardware": "the replays agree with each other and not with the record: something struck the recorded run "
        "from outside the workload, such as a transient hardware error, the loader, or a value changed by hand"
        + (" (the batch is the recorded one)" if redone.batch else ""),
    }
    return f"{opening} ({at}): {reasons[why]}."


def _same(a: float, b: float | None) -> bool:
    """As bits, but that any NaN is any other; a step that was not recorded cannot differ."""
    return b is None or a == b or (math.isnan(a) and math.isnan(b))


def _gap(a: Mapping[int, float], b: Mapping[int, float]) -> float:
    """The largest |ln a - ln b| over the steps of both; inf where one is not finite and the other is."""
    largest = 0.0
    for step in a.keys() & b.keys():
        x, y = a[step], b[step]
        if _same(x, y):
            continue
        if not (math.isfinite(x) and math.isfinite(y)):
            return math.inf
        largest = max(largest, abs(math.log(x / y)) if x > 0 and y > 0 else abs(x - y))
    return largest


__all__ = ["Controls", "Recompute", "control_cells", "judge_controls", "recompute", "run_controls"]
