"""The suspect batches left out, replaced by others, or mixed with their neighbours; single rows taken out of a batch.

The suspects are the batches from two steps before the spike's onset to its end: a loss is measured before the update
that its own batch makes, so what it shows was done at least one step before. Must not import other edits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from aftershock.guard.digest import of_batch
from aftershock.guard.tree import is_named_tuple
from aftershock.replay.edits.checked import Checked, first_part
from aftershock.replay.run import Run, Window
from aftershock.signals.ranks import is_sharded

LEAD = 2
"""Steps before the onset that are suspect too."""
FAR = 10
"""Spike lengths after its end where batches are taken from that the replay itself never reaches."""


def suspects(window: Window) -> range:
    """The steps whose batches are suspected.

    >>> suspects(Window(460, 500, 501, 510))
    range(498, 510)
    """
    return range(max(window.start, window.onset - LEAD), window.end)


def calm(window: Window) -> range:
    """The steps from the snapshot to the first suspect."""
    return range(window.start, suspects(window).start)


@dataclass(frozen=True, kw_only=True)
class Skipped(Checked):
    """The batches of `steps` are left out, and each later step takes the batch after: the run sees that data sooner.

    `stop`: the first step without a batch; the replay ends where it would need it.
    """

    steps: tuple[int, ...]
    stop: int | None = None

    @property
    def first_step(self) -> int | None:
        return min(self.steps, default=None)

    def check(self, run: Run) -> None:
        if not self.steps:
            raise ValueError("no steps are given whose batches to leave out")
        require_other_batches(run)

    def change(self, run: Run) -> None:
        index_of, keep_going, skipped = run.index_of, run.keep_going, sorted(self.steps)

        def later(step: int) -> int:
            for one in skipped:
                if one > step:
                    break
                step += 1
            return step

        run.index_of = lambda step: index_of(later(step))
        if self.stop is not None:
            stop = self.stop
            run.keep_going = lambda step, loss: keep_going(step, loss) and later(step + 1) < stop


@dataclass(frozen=True, kw_only=True)
class Replaced(Checked):
    """Each of `steps` takes the batch of another step; all others take their own.

    `source`: "later", the batches from step `later` on, which the replay does not reach; or "before", those of the
    calm steps before the suspects once more, last first, which every recording holds.
    """

    steps: range
    source: Literal["later", "before"] = "later"
    later: int | None = None
    stop: int | None = None

    @property
    def first_step(self) -> int | None:
        return self.steps.start

    def check(self, run: Run) -> None:
        require_other_batches(run)
        if self.source == "before" and not calm(run.window):
            raise ValueError("no step lies between the snapshot and the suspects whose batch could stand in")
        if self.source == "later" and self.stop is not None and self._later(run) + len(self.steps) > self.stop:
            raise ValueError(
                f"batches are to be had up to step {self.stop - 1} only; replace them by those before (replace:before)"
            )

    def change(self, run: Run) -> None:
        index_of, first = run.index_of, self.steps.start
        later, standing = self._later(run), calm(run.window)[::-1]

        def other(step: int) -> int:
            if step not in self.steps:
                return index_of(step)
            at = step - first
            return index_of(later + at if self.source == "later" else standing[at % len(standing)])

        run.index_of = other

    def _later(self, run: Run) -> int:
        return far(run.window) if self.later is None else self.later


def far(window: Window) -> int:
    """The first step that no replay reaches, not even one of full length that has skipped the suspects."""
    after = max(FAR * window.length, window.end - window.start)
    return window.end + after + len(suspects(window))


@dataclass(frozen=True, kw_only=True)
class Shuffled(Checked):
    """The batches of `steps` in another order, drawn from `seed`; all others stay in their place."""

    steps: range
    seed: int = 0

    @property
    def first_step(self) -> int | None:
        return self.steps.start

    def check(self, run: Run) -> None:
        if len(self.steps) < 2:
            raise ValueError(f"{len(self.steps)} steps have one order only; there must be two at least")
        require_other_batches(run)

    def change(self, run: Run) -> None:
        index_of, steps = run.index_of, self.steps
        order = torch.randperm(len(steps), generator=torch.Generator().manual_seed(self.seed)).tolist()
        if order == list(range(len(steps))):
            order.reverse()
        run.index_of = lambda step: index_of(steps[order[step - steps.start]] if step in steps else step)


class Row(NamedTuple):
    """One example: of step `step`, micro-batch `part`, and its place `row` there."""

    step: int
    part: int
    row: int


@dataclass(frozen=True, kw_only=True)
class WithoutRows(Checked):
    """Single rows out of their batches, which get that much smaller.

    Rows are the first axis, as long as that of the batch's first tensor; tensors of another length stay whole. A
    micro-batch of which no row is left is replaced by the same part of a calm step before the suspects.
    """

    rows: frozenset[Row]

    @property
    def first_step(self) -> int | None:
        return min((row.step for row in self.rows), default=None)

    def check(self, run: Run) -> None:
        if not self.rows:
            raise ValueError("no rows are given to take out")
        num_rows(first_part(run))
        whole = {(row.step, row.part) for row in self.rows}
        if not calm(run.window) and any(self._left(run, step, part) == 0 for step, part in whole):
            raise ValueError("no row of a batch is left, and no calm step lies before the suspects to stand in")

    def change(self, run: Run) -> None:
        transform, standing, stands_in = run.transform, calm(run.window)[::-1], run.index_of
        gone: dict[tuple[int, int], set[int]] = {}
        for row in self.rows:
            gone.setdefault((row.step, row.part), set()).add(row.row)

        def without(batch: Any) -> Any:
            out = gone.get((run.step, run.part))
            if out is None:
                return transform(batch)
            left = [row for row in range(num_rows(batch)) if row not in out]
            if left:
                return transform(take_rows(batch, left))
            other = run.batch(stands_in(standing[run.step % len(standing)]))
            return transform(other if run.workload.accumulate == 1 else other[run.part])

        run.transform = without

    def _left(self, run: Run, step: int, part: int) -> int:
        batch = run.batch(run.index_of(step))
        out = {row.row for row in self.rows if (row.step, row.part) == (step, part)}
        whole = num_rows(batch if run.workload.accumulate == 1 else batch[part])
        return len(set(range(whole)) - out)


def num_rows(batch: Any) -> int:
    """Length of the first axis of the batch's first tensor. Raises ValueError when no tensor has one."""
    for leaf in leaves(batch):
        if isinstance(leaf, Tensor) and leaf.ndim and not is_sharded(leaf):
            return leaf.shape[0]
    raise ValueError(f"a {type(batch).__name__} holds no tensor whose first axis could be its rows")


def take_rows(batch: Any, rows: Sequence[int]) -> Any:
    """The batch with these rows of every tensor that has as many as the first."""
    length = num_rows(batch)

    def take(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == length:
            return leaf[torch.tensor(list(rows), dtype=torch.int64, device=leaf.device)]
        return leaf

    return mapped(batch, take)


def mapped(tree: Any, change: Callable[[Any], Any]) -> Any:
    """A batch of the same shape with each leaf changed: dicts, lists, tuples, named ones and dataclasses."""
    if isinstance(tree, Mapping):
        changed = {key: mapped(value, change) for key, value in tree.items()}
        return changed if type(tree) is dict else type(tree)(changed)  # pyright: ignore[reportCallIssue]
    if isinstance(tree, (list, tuple)):
        parts = [mapped(value, change) for value in tree]
        return type(tree)(*parts) if is_named_tuple(tree) else type(tree)(parts)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return dataclasses.replace(tree, **{f.name: mapped(getattr(tree, f.name), change) for f in _fields(tree)})
    return change(tree)


def require_other_batches(run: Run) -> None:
    """Raises ValueError when snapshot, onset, peak and end train on the very same batch."""
    window = run.window
    steps = sorted({window.start, window.onset, window.peak, window.end - 1})
    digests = {of_batch(run.batch(run.index_of(step))) for step in steps}
    if len(steps) > 1 and len(digests) == 1:
        raise ValueError("every step trains on the same batch, so none can be left out for another")


def leaves(tree: Any) -> Iterator[Any]:
    """What a batch is made of, in the order in which `mapped` goes through it."""
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        tree = [getattr(tree, field.name) for field in _fields(tree)]
    if not isinstance(tree, (list, tuple)):
        yield tree
        return
    for value in tree:
        yield from leaves(value)


def _fields(tree: Any) -> list[Any]:
    return [field for field in dataclasses.fields(tree) if field.init]
