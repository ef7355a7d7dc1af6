"""Resume audit: is the resumed run the one that was saved? If not, what was not restored?

With each checkpoint go a digest of the whole state and the last steps: batch, loss, rates, random numbers. On resume
the loaded state is compared with the digest; then the steps run again from the snapshot before them, and their losses
are compared. The run is left as it was found. Must not import the guard or a policy.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import torch

from aftershock.guard import digest
from aftershock.guard.digest import StateDigest
from aftershock.guard.disk import restore_from
from aftershock.guard.state import State, Training
from aftershock.guard.surroundings import differences, surroundings
from aftershock.store import folder as fs

if TYPE_CHECKING:
    from aftershock.guard.recorder import FlightRecorder

TAIL = "tail-{rank}.json"
"""One for each rank: its own random numbers, batches and pieces."""
SNAPSHOT = "tail-snapshot"
COMPARED = 8
"""Steps that a tail holds at least, where there are as many."""
NAN = float("nan")
CAPACITY = 256
"""Steps remembered: the snapshot before the last `COMPARED` ones must still be among them."""

What = Literal[
    "weights",
    "optimizer",
    "settings_from_config",
    "settings_from_checkpoint",
    "scheduler",
    "scaler",
    "extra",
    "rng",
    "loader",
    "nan_filter",
    "unexplained",
]

ADVICE: dict[What, str] = {
    "weights": "load the model's state_dict (strict, all ranks) from this checkpoint, and nothing over it afterwards",
    "optimizer": "load the optimizer's state_dict too (DeepSpeed: load_optimizer_states=True); without moments and "
    "step counters the first updates are as large as at the start of training",
    "settings_from_config": "something writes the optimizer's settings after loading; leave them to the checkpoint, "
    "or change them on purpose and record anew",
    "settings_from_checkpoint": "load_state_dict put the checkpoint's settings over the ones in your config; set them "
    "in optimizer.param_groups after loading",
    "scheduler": "load the scheduler's state_dict, after the optimizer's, and do not step it before training goes on",
    "scaler": "load the GradScaler's state_dict",
    "extra": "load this part's state_dict",
    "rng": "restore the random numbers of python, numpy, torch and every device last, just before training goes on: "
    "dropout and shuffling draw from them",
    "loader": "seed the sampler by epoch and skip to the recorded batch, or use a loader with a state_dict "
    "(torchdata.StatefulDataLoader); a shuffle buffer cannot be restored",
    "nan_filter": "set logging_nan_inf_filter=False in TrainingArguments: as it is, a dead run shows a finite loss",
    "unexplained": "everything recorded agrees and the losses do not: compare code, model.train() and dropout, "
    "kernels, device, thread count; run the audit twice to see whether it is chance",
}


class TailStep(NamedTuple):
    """One accepted step: `step` steps came before it; `rng` and `batch` are digests from before its forward."""

    step: int
    batch_id: int
    loss: float
    lr: tuple[float, ...]
    rng: str
    batch: str | None


class Tail(NamedTuple):
    """Some steps, oldest first, and the state at their end; `end` is None where it was not recorded.

    `snapshot`: folder of the state before the first of the steps, None where there was none.
    """

    steps: tuple[TailStep, ...]
    end: StateDigest | None
    surroundings: dict[str, Any]
    snapshot: Path | None


class Rerun(NamedTuple):
    """What a rerun step gives: its loss, and the batch as the loader gave it (None: the order cannot be compared)."""

    loss: float
    batch: Any = None


class Finding(NamedTuple):
    """One thing that was not restored, what shows it, and what to do."""

    what: What
    evidence: str
    advice: str


class AuditResult(NamedTuple):
    """`ok` when nothing was found; `num_replayed` steps were run again (0: only the loaded state was compared)."""

    ok: bool
    findings: tuple[Finding, ...]
    num_replayed: int


class TrainerArguments(Protocol):
    """The part of a Hugging Face TrainingArguments that hides NaN losses from the log; its default is True."""

    logging_nan_inf_filter: bool


class TailLog:
    """Remembers the last accepted steps. Cost a step: three hashes of a few kB on the host, and at most 64 kB of batch.

    Example:
        log.before(step, batch_id, batch)  # before the forward: random numbers are read here
        log.after(loss)                    # the step was taken
        record_tail(checkpoint, log, training, recorder)
    """

    def __init__(self, training: Training, *, capacity: int = CAPACITY) -> None:
        if capacity < 1:
            raise ValueError(f"tail capacity must be at least 1, got {capacity}")
        self._training = training
        self._steps: deque[TailStep] = deque(maxlen=capacity)
        self._next: dict[int, TailStep] = {}

    @property
    def steps(self) -> tuple[TailStep, ...]:
        """Oldest first."""
        return tuple(self._steps)

    def before(self, step: int, batch_id: int, batch: Any = None, *, rng: str | None = None) -> None:
        """A step begins. `batch` as the loader gave it, on the host: of tensors on a device only shapes count.

        `rng`: what `digest.of_rng` gave before the batch was loaded, where loading may draw random numbers.
        """
        lr = digest.rates(self._training)
        content = None if batch is None else digest.of_batch(batch)
        draws = digest.of_rng() if rng is None else rng
        # The step under way may not be judged yet: with late reading it is judged during the next one.
        self._next = {
            **dict(list(self._next.items())[-2:]),
            batch_id: TailStep(step, batch_id, NAN, lr, draws, content),
        }

    def begun(self, batch_id: int) -> bool:
        """Whether `before` was called for it."""
        return batch_id in self._next

    def after(self, loss: float, *, batch_id: int | None = None) -> TailStep:
        """The step on `batch_id` (by default the newest) was taken; what is remembered of it.

        Raises ValueError when `before` was not called for it.
        """
        known = next(reversed(self._next), None) if batch_id is None else batch_id
        if known not in self._next:
            raise ValueError("TailLog.after without before; call before() ahead of the forward of each step")
        row = self._next.pop(known)._replace(loss=float(loss))
        self._steps.append(row)
        return row

    def clear(self) -> None:
        """Forget all: after a skipped step or a rewind, a plain rerun would not come to the same state."""
        self._steps.clear()
        self._next = {}


def record_tail(
    folder: Path, log: TailLog, training: Training, recorder: FlightRecorder | None = None, *, compare: int = COMPARED
) -> Tail:
    """Write the tail into a checkpoint's `folder`: tail-<rank>.json, and the snapshot before the steps to run again.

    The snapshot is the newest healthy one at least `compare` steps back, else the oldest that the steps still reach
    back to; without one a resume compares the state only. Cost: one pass over the state (crc32, about 1 GB/s), and
    writing one snapshot. With several ranks all of them call this. Raises ValueError when `compare` is below 1.
    """
    if compare < 1:
        raise ValueError(f"tail compare must be at least 1, got {compare}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    steps = log.steps
    start = None if recorder is None or not steps else _start(steps, recorder.healthy, compare)
    kept = steps[-compare:] if start is None else tuple(row for row in steps if row.step >= start)
    if recorder is not None and start is not None:
        recorder.save(folder / SNAPSHOT, start)
    tail = Tail(
        steps=kept,
        end=digest.of_state(training),
        surroundings=surroundings(training.params.values()),
        snapshot=None if start is None else folder / SNAPSHOT,
    )
    record = {
        "schema": fs.SCHEMA,
        "steps": [row._asdict() for row in tail.steps],
        "end": None if tail.end is None else tail.end._asdict(),
        "surroundings": tail.surroundings,
        "snapshot": None if tail.snapshot is None else SNAPSHOT,
    }
    fs.atomic_write(folder / _name(), (json.dumps(fs.plain(record, "tail"), indent=1) + "\n").encode())
    return tail


def read_tail(folder: Path) -> Tail:
    """This rank's tail in a checkpoint's folder.

    Raises ValueError when there is none (saved without it, or by fewer ranks), or a newer aftershock wrote it.
    """
    path = Path(folder) / _name()
    if not path.exists():
        raise ValueError(
            f"{folder} holds no {path.name}: it was saved without record_tail or by fewer ranks, "
            "so this resume cannot be audited"
        )
    data = json.loads(path.read_bytes())
    fs.check_schema(data.get("schema"), str(path))
    return Tail(
        steps=tuple(TailStep(**(row | {"lr": tuple(row["lr"])})) for row in fs.unspell(data["steps"])),
        end=None if data["end"] is None else StateDigest(**data["end"]),
        surroundings=data["surroundings"],
        snapshot=None if data["snapshot"] is None else path.parent / data["snapshot"],
    )


def audit(
    training: Training,
    tail: Tail,
    rerun: Callable[[int], Rerun] | None = None,
    *,
    tolerance: float = 0.0,
    arguments: TrainerArguments | None = None,
) -> AuditResult:
    """Compare the run as it was just loaded with the one that was saved. Call it before anything draws or steps.

    - `rerun(batch_id)`: takes one step of the user's loop on that batch of the user's loader: forward, backward, clip,
      optimizer, scheduler, zero_grad. None compares the loaded state only
    - `tolerance`: losses agree when |new - recorded| <= tolerance |recorded|; 0 is bit for bit
    - `arguments`: a Hugging Face TrainingArguments, or anything with `logging_nan_inf_filter`

    State, rates and random numbers are put back before this returns; what only `rerun` knows (a loader that is no
    `extra` of the training) is not. With several ranks all of them call this, and each has findings of its own.
    Raises ValueError when the tail is of another model.

    Example:
        result = audit(training, read_tail("ckpt/guard"), rerun)
        for finding in result.findings:
            print(finding.what, finding.evidence, finding.advice, sep="\\n  ")
    """
    if not tolerance >= 0:
        raise ValueError(f"audit tolerance must be at least 0, got {tolerance}")
    findings = [] if tail.end is None else compare_state(training, tail.end)
    if arguments is not None and arguments.logging_nan_inf_filter:
        findings.append(
            finding("nan_filter", "logging_nan_inf_filter=True replaces NaN and infinite losses in the log")
        )
    num_replayed = 0
    if rerun is not None and tail.snapshot is not None and tail.steps:
        found, num_replayed = replay(training, tail, rerun, tolerance)
        named: set[What] = {one.what for one in findings}
        # A loop that sets its own settings in each step differs in the rerun too: that is named already.
        covered: set[What] = named | ({"unexplained"} if "settings_from_config" in named else set())
        findings += [one for one in found if one.what not in covered]
    return AuditResult(not findings, tuple(findings), num_replayed)


def compare_state(training: Training, then: StateDigest) -> list[Finding]:
    """What of the state as it is now is not as it was. Raises ValueError when it is another model's."""
    return [finding(*fault) for fault in digest.faults(then, digest.of_state(training))]


class Replayed(NamedTuple):
    """One step run again, beside the recorded one."""

    then: TailStep
    loss: float
    lr: tuple[float, ...]
    rng: str
    batch: str | None


def replay(
    training: Training, tail: Tail, rerun: Callable[[int], Rerun], tolerance: float
) -> tuple[list[Finding], int]:
    """Run the steps of `tail` again from its snapshot and judge them; the run is left as it was found."""
    live = training.read()
    found = State({name: t.detach().to("cpu", copy=True) for name, t in live.tensors.items()}, live.plain)
    rows: list[Replayed] = []
    try:
        assert tail.snapshot is not None
        restore_from(tail.snapshot, training, rng=True)
        training.optimizer.zero_grad(set_to_none=True)
        for then in tail.steps:
            rng, lr = digest.of_rng(), digest.rates(training)
            new = rerun(then.batch_id)
            rows.append(
                Replayed(then, float(new.loss), lr, rng, None if new.batch is None else digest.of_batch(new.batch))
            )
        end = None if tail.end is None else digest.of_state(training)
    finally:
        training.restore(found, rng=True)
        training.optimizer.zero_grad(set_to_none=True)
    return judge(rows, tail, end, tolerance), len(rows)


def judge(rows: list[Replayed], tail: Tail, end: StateDigest | None, tolerance: float) -> list[Finding]:
    """What the steps run again show; `end`: the state after them, where `tail` recorded that too."""
    found: list[Finding] = []
    wrong = [row for row in rows if not _same(row.then.loss, row.loss, tolerance)]
    data = [row for row in rows if None not in (row.then.batch, row.batch) and row.then.batch != row.batch]
    rates = [row for row in rows if row.then.lr != row.lr]
    draws = [row for row in rows if row.then.rng != row.rng]
    if data:
        order = _elsewhere(data, rows)
        found.append(
            finding("loader", f"{len(data)} of {len(rows)} batches differ from those recorded, {_at(data[0])}{order}")
        )
    if rates:
        row = rates[0]
        found.append(finding("scheduler", f"rates {row.then.lr} recorded, {row.lr} in the rerun, {_at(row)}"))
    # Random numbers drawn during a step show before the next one.
    if wrong and draws and not data and draws[0].then.step <= wrong[0].then.step + 1:
        found.append(
            finding("rng", f"random numbers differ before the forward, {_at(draws[0])}; {_losses(wrong, rows)}")
        )
    if found:
        return found
    if wrong:
        around = differences(tail.surroundings, surroundings(()) | _devices(tail))
        found.append(finding("unexplained", "; ".join([_losses(wrong, rows), *around])))
    elif not tolerance and tail.end is not None and end is not None:
        parts = [what for what, _ in digest.faults(tail.end, end) if what in ("weights", "optimizer")]
        if parts:
            text = f"all {len(rows)} losses agree and yet the rerun ends in other {' and '.join(parts)}"
            found.append(finding("unexplained", text + ": the steps themselves differ (clipping, optimizer)"))
    return found


def _devices(tail: Tail) -> dict[str, Any]:
    """Devices and dtypes are compared by the digest of the state, not here."""
    return {name: tail.surroundings.get(name) for name in ("devices", "dtypes", "accelerator")}


def _elsewhere(data: list[Replayed], rows: list[Replayed]) -> str:
    """Whether the wrong batches are known ones in another order."""
    known = {row.then.batch: row.then.batch_id for row in rows}
    moved = [(known[row.batch], row.then.batch_id) for row in data if row.batch in known]
    return f"; {len(moved)} are recorded ones out of order (batch {moved[0][0]} came as {moved[0][1]})" if moved else ""


def _losses(wrong: list[Replayed], rows: list[Replayed]) -> str:
    row = wrong[0]
    return f"{len(wrong)} of {len(rows)} losses differ, first {row.then.loss!r} recorded, {row.loss!r} now, {_at(row)}"


def _at(row: Replayed) -> str:
    return f"step {row.then.step}, batch {row.then.batch_id}"


def _same(then: float, now: float, tolerance: float) -> bool:
    if then == now or (then != then and now != now):
        return True
    return abs(now - then) <= tolerance * abs(then)


def _start(steps: tuple[TailStep, ...], healthy: tuple[int, ...], compare: int) -> int | None:
    """The step of the snapshot to run again from."""
    end = steps[-1].step + 1
    known = {row.step for row in steps}
    reach = [step for step in healthy if step in known]
    return max((step for step in reach if end - step >= compare), default=min(reach, default=None))


def _name() -> str:
    distributed = torch.distributed
    ready = distributed.is_available() and distributed.is_initialized()
    return TAIL.format(rank=distributed.get_rank() if ready else 0)


def finding(what: What, evidence: str) -> Finding:
    """With the advice that belongs to it."""
    return Finding(what, evidence, ADVICE[what])
