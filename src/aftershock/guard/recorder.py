"""The flight recorder: a ring of snapshots of the run in host memory, the log of its last steps, and their batches.

Memory: `slots` times the state's bytes (parameters, buffers, optimizer, EMA; this rank's pieces only), made at the
first snapshots and used again: with Adam in float32 that is `slots` x 12 bytes a parameter. On a GPU it is pinned, and
torch's allocator of pinned memory rounds each tensor up to a power of two. Batches are bounded by `batch_bytes`.
Must not decide anything: who judges a step, and when to take or restore, is the guard's business.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aftershock.guard.disk import Snapshot, write_snapshot
from aftershock.guard.state import Kept, State, StepRow, Training
from aftershock.guard.tree import join, split

_log = logging.getLogger("aftershock.guard")


@dataclass(kw_only=True)
class _Slot:
    """One snapshot in the ring. Its `buffers` outlive it: the next snapshot is copied into the same memory."""

    at: Kept
    plain: dict[str, Any]
    buffers: dict[str, Tensor]
    ready: tuple[torch.cuda.Event, ...]
    healthy: bool = True
    pinned: bool = False


class _Batch(NamedTuple):
    rest: Any
    tensors: dict[str, Tensor]
    ready: tuple[torch.cuda.Event, ...]
    nbytes: int


class FlightRecorder:
    """Snapshots of `training` to go back to, all on this rank's host memory; nothing here talks to other ranks.

    - `slots`: snapshots held at once, at least 2; a new one takes the place of the oldest that is not pinned
    - `every`: steps between snapshots, as `due` counts them
    - `num_rows`: steps in the log; `batch_bytes`: the most that copies of batches may take

    Example:
        recorder = FlightRecorder(Training(model, optimizer), slots=4, every=50)
        if recorder.due(step):
            recorder.take(step, batch_id)
        recorder.restore(recorder.healthy[-1], rng=False)
    """

    def __init__(
        self, training: Training, *, slots: int = 4, every: int = 50, num_rows: int = 512, batch_bytes: int = 1 << 26
    ) -> None:
        if slots < 2:
            raise ValueError(f"slots is {slots}; a ring needs at least 2, one to go back to while the next is made")
        if every < 1 or num_rows < 1 or batch_bytes < 0:
            raise ValueError(f"every={every}, num_rows={num_rows}, batch_bytes={batch_bytes}: give at least 1, 1 and 0")
        self.training = training
        self.slots = slots
        self.every = every
        self._ring: dict[int, _Slot] = {}  # by step, oldest first
        self._spare: list[dict[str, Tensor]] = []
        self._rows: deque[StepRow] = deque(maxlen=num_rows)
        self._batches: dict[int, _Batch] = {}  # oldest first
        self._batch_bytes = batch_bytes

    # ---- snapshots

    def due(self, step: int) -> bool:
        """Whether a snapshot should be taken at `step`: there is none, or the newest is `every` steps old."""
        return not self.healthy or step - self.healthy[-1] >= self.every

    def take(self, step: int, batch_id: int, *, finite: bool | None = None) -> bool:
        """Copy the state into the ring. False, with nothing kept and nothing lost, when it is not finite, or when a
        pinned snapshot of this step is held already.

        `finite`: whether it is, where that is known; None looks. Sharded ranks see only their own piece: agree first.

        Cost: `Training.is_finite` and one copy of the state; on a GPU the copy runs on the current stream and is not
        waited for.
        """
        held = self._ring.get(step)
        if held is not None and held.pinned:
            return False
        if not (self.training.is_finite() if finite is None else finite):
            return False
        state = self.training.read()
        self._forget_other_models(state)
        buffers = self._free_buffers(step)
        try:
            ready = _copy_all(state.tensors, buffers)
        except BaseException:
            self._spare.append(buffers)
            raise
        self._ring[step] = _Slot(at=Kept(step, batch_id), plain=state.plain, buffers=buffers, ready=ready)
        return True

    @property
    def healthy(self) -> tuple[int, ...]:
        """Steps that can be gone back to, oldest first."""
        return tuple(sorted(step for step, slot in self._ring.items() if slot.healthy))

    def restore(self, step: int, *, rng: bool) -> Kept:
        """The run as it was at `step`, bit for bit; with `rng` its random numbers too. Later snapshots are dropped
        (pinned ones stay, but are no longer healthy). Clear the gradients afterwards.

        Raises ValueError for a step that is not held, and as `Training.restore` does.
        """
        slot = self._slot(step)
        self.training.restore(_ready_state(slot), rng=rng)
        self.distrust(step + 1)
        return slot.at

    def distrust(self, from_step: int) -> None:
        """Drop the snapshots of `from_step` and later: their state was sick. Pinned ones stay, but not as healthy."""
        for step in [step for step in self._ring if step >= from_step]:
            self._ring[step].healthy = False
            self._drop_unless_needed(step)

    def pin(self, step: int) -> None:
        """Keep the snapshot of `step` until `unpin`. Raises ValueError when it is not held, or the last free slot."""
        slot = self._slot(step)
        others = sum(other.pinned for other in self._ring.values() if other is not slot)
        if others + 1 >= self.slots:
            raise ValueError(f"{others} of {self.slots} slots are pinned; unpin one before pinning step {step}")
        slot.pinned = True

    def unpin(self, step: int) -> None:
        """Let the ring have the snapshot of `step` again. Raises ValueError when it is not held."""
        self._slot(step).pinned = False
        self._drop_unless_needed(step)

    def save(
        self, folder: str | Path, step: int, *, keep: int = 3, alone: bool = False, batches_from: float = 0
    ) -> Path:
        """Write the snapshot of `step`, the log and the batches into a folder below `folder`, and give its path.

        `batches_from`: only batches with this id or a later one; `math.inf` for none. With several processes each of
        them calls it, unless `alone`. See `disk.write_snapshot`.
        """
        slot = self._slot(step)
        snapshot = Snapshot(slot.at, _ready_state(slot), self.rows, self._host_batches(batches_from))
        return write_snapshot(Path(folder), snapshot, keep=keep, alone=alone)

    def save_now(
        self, folder: str | Path, at: Kept, own: Any, *, keep: int = 3, held: bool = False, batches_from: float = 0
    ) -> Path:
        """Write the run as it stands, with the guard's `own` state, as `save` does; the ring stays as it is.

        `held`: a snapshot of exactly this moment has just been taken, and is written; else the state is copied first.
        """
        if held:
            state = _ready_state(self._slot(at.step))
        else:
            live = self.training.read()
            buffers: dict[str, Tensor] = {}
            for event in _copy_all(live.tensors, buffers):
                event.synchronize()
            state = State(buffers, live.plain)
        tensors: dict[str, Tensor] = {}
        rest = split(own, "guard", tensors)
        snapshot = Snapshot(at, state, self.rows, self._host_batches(batches_from), State(tensors, {"guard": rest}))
        return write_snapshot(Path(folder), snapshot, keep=keep)

    def adopt(self, at: Kept, state: State) -> None:
        """Take a snapshot read from disk into the ring, newest last; it was healthy when it was written."""
        buffers = self._free_buffers(at.step)
        ready = _copy_all(state.tensors, buffers)
        self._ring[at.step] = _Slot(at=at, plain=state.plain, buffers=buffers, ready=ready)

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that snapshots take now, before any rounding by the allocator."""
        sets = [slot.buffers for slot in self._ring.values()] + self._spare
        return sum(tensor.nbytes for buffers in sets for tensor in buffers.values())

    # ---- the log and the batches

    def note(self, row: StepRow) -> None:
        """Add a step to the log; the oldest goes."""
        self._rows.append(row)

    @property
    def rows(self) -> tuple[StepRow, ...]:
        """The last steps, oldest first, rewound ones included."""
        return tuple(self._rows)

    def keep_batch(self, batch_id: int, batch: Any) -> bool:
        """Copy `batch` (tensors in any nesting) to the host, and let the oldest go until all fit into `batch_bytes`.

        False, with nothing kept, when it is larger than that on its own.
        """
        self._batches.pop(batch_id, None)
        live: dict[str, Tensor] = {}
        rest = split(batch, "batch", live)
        nbytes = sum(tensor.nbytes for tensor in live.values())
        if nbytes > self._batch_bytes:
            return False
        total = nbytes + sum(kept.nbytes for kept in self._batches.values())
        while total > self._batch_bytes:
            total -= self._batches.pop(next(iter(self._batches))).nbytes
        buffers: dict[str, Tensor] = {}
        ready = _copy_all(live, buffers)
        self._batches[batch_id] = _Batch(rest, buffers, ready, nbytes)
        return True

    @property
    def batch_ids(self) -> tuple[int, ...]:
        """Ids of the batches at hand, in the order they were kept."""
        return tuple(self._batches)

    def batch(self, batch_id: int) -> Any:
        """A copy of a kept batch, its tensors where they were. Raises ValueError when it is not at hand."""
        if batch_id not in self._batches:
            have = f"there are {min(self._batches)} to {max(self._batches)}" if self._batches else "there are none"
            raise ValueError(f"batch {batch_id} was not kept or has gone: {have}; a larger batch_bytes keeps more")
        kept = self._batches[batch_id]
        return join(kept.rest, _wait(kept))

    def state_dict(self) -> dict[str, Any]:
        """The log and the batches. Snapshots are not in it, they are `save`d: a resumed ring starts empty."""
        return {
            "rows": [list(row) for row in self._rows],
            "batches": [[batch_id, self.batch(batch_id)] for batch_id in self._batches],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave; what this recorder's own bounds do not hold is left out."""
        self._rows.clear()
        self._rows.extend(StepRow(*row) for row in state["rows"])
        self._batches.clear()
        for batch_id, batch in state["batches"]:
            self.keep_batch(batch_id, batch)

    def adopt_log(self, snapshot: Snapshot) -> None:
        """Go on with the log and the batches of a snapshot read from disk."""
        self._rows.clear()
        self._rows.extend(snapshot.rows)
        self._batches.clear()
        for batch_id in snapshot.batches:
            self.keep_batch(batch_id, snapshot.batch(batch_id))

    def _host_batches(self, start: float) -> dict[int, State]:
        return {i: State(_wait(kept), {"batch": kept.rest}) for i, kept in self._batches.items() if i >= start}

    # ---- slots

    def _slot(self, step: int) -> _Slot:
        if step not in self._ring:
            have = ", ".join(str(s) for s in sorted(self._ring)) or "none"
            raise ValueError(f"no snapshot of step {step} is held; there are: {have}")
        return self._ring[step]

    def _drop(self, step: int) -> None:
        self._spare.append(self._ring.pop(step).buffers)

    def _drop_unless_needed(self, step: int) -> None:
        slot = self._ring[step]
        if not slot.healthy and not slot.pinned:
            self._drop(step)

    def _free_buffers(self, step: int) -> dict[str, Tensor]:
        """Memory for a snapshot of `step`: that of the same step, a spare one, new, or the oldest unpinned one's."""
        if step in self._ring:
            self._drop(step)
        elif not self._spare and len(self._ring) == self.slots:
            self._drop(next(s for s, slot in self._ring.items() if not slot.pinned))
        return self._spare.pop() if self._spare else {}

    def _forget_other_models(self, state: State) -> None:
        """Snapshots of a model or optimizer that has other parameters by now cannot be restored."""
        now = _signature(state.plain, state.tensors)
        for step, slot in list(self._ring.items()):
            if slot.healthy and _signature(slot.plain, slot.buffers) != now:
                _log.warning("the model or its optimizer changed: the snapshot of step %d cannot be gone back to", step)
                slot.healthy = False
                self._drop_unless_needed(step)


def _signature(plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Any, ...]:
    shapes = {name: (tensors[ref.name].shape, tensors[ref.name].dtype) for name, ref in plain["model"].items()}
    return shapes, [group["params"] for group in plain["group"]]


def _copy_all(live: Mapping[str, Tensor], buffers: dict[str, Tensor]) -> tuple[torch.cuda.Event, ...]:
    """Make `buffers` hold what `live` does, in the same memory where it fits; the events to wait for before reading."""
    for name in [name for name in buffers if name not in live]:
        del buffers[name]
    for name, tensor in live.items():
        have = buffers.get(name)
        if have is None or have.shape != tensor.shape or have.dtype != tensor.dtype:
            buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        buffers[name].copy_(tensor, non_blocking=True)
    return _events(tensor.device for tensor in live.values())


def _events(devices: Iterable[torch.device]) -> tuple[torch.cuda.Event, ...]:
    """One event on the current stream of each CUDA device: passed once the copies queued there are done."""
    events = []
    for device in {device for device in devices if device.type == "cuda"}:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        events.append(event)
    return tuple(events)


def _wait(kept: _Slot | _Batch) -> dict[str, Tensor]:
    for event in kept.ready:
        event.synchronize()
    return kept.buffers if isinstance(kept, _Slot) else kept.tensors


def _ready_state(slot: _Slot) -> State:
    return State(_wait(slot), slot.plain)
