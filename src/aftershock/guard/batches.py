"""The data's own clock: a stable id for every batch, over epochs, skips, rewinds and restarts.

id = batches before this epoch + index in the epoch. One id is one batch on every rank at once; how many samples that is
in all, and how many batches an epoch has, is its `Unit`. Must not import the guard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain, islice
from typing import Any, Literal

from aftershock.guard.skiplist import SkipList, Unit, convert_id
from aftershock.guard.sources import Draws, Source, StreamSource, open_source

Mode = Literal["in_place", "restart"]
"""What a rewind does to the data. in_place: it moves on, which skips what was behind; restart: it goes back as well."""

KEPT = 8
"""Epochs whose draws, and positions whose loader states, are kept for going back to."""


class Stream:
    """Batches with their ids, without those of the skip list; goes back when told to.

    - `before`: called before each batch is fetched; random numbers are then as they were before its loading
    - `fetched`: called with id and batch before the batch is handed out
    - `skipped`: called with [start, stop) once for each run of batches that the skip list takes out
    - `ended`: called when the last batch of a call was stepped on, before the epoch's end is counted
    """

    def __init__(
        self,
        *,
        mode: Mode,
        skips: SkipList,
        num_ranks: int,
        before: Callable[[], None],
        fetched: Callable[[int, Any], None],
        skipped: Callable[[int, int], None],
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        self.skips = skips
        self.next_id = 0
        self.epoch = 0
        self.running = self.stopped = False
        self._mode: Mode = mode
        self._num_ranks = num_ranks
        self._before, self._fetched, self._skipped, self._ended = before, fetched, skipped, ended
        self._call_epoch: int | None = None
        self._unit: Unit | None = None
        self._resumed = False
        self._moved = False
        self._starts: dict[int, int] = {0: 0}
        self._draws: dict[int, Draws] = {}
        self._marks: dict[int, Any] = {}
        self._source: Source | None = None

    def run(self, loader: Any, *, epochs: int | None, start: int | None, samples: int | None) -> Iterator[Any]:
        """The batches, see `Guard.batches`. Everything that can be refused is refused before the first one."""
        if epochs is not None and epochs < 1:
            raise ValueError(f"epochs must be at least 1, or None for no end, got {epochs}")
        source = open_source(loader, samples=samples, num_ranks=self._num_ranks)
        if self._mode == "restart" and not source.positionable:
            raise ValueError(
                f"mode='restart' takes the data back, and {type(loader).__name__} cannot be positioned; pass a list, a "
                "map-style DataLoader or a loader with state_dict and load_state_dict (torchdata's "
                "StatefulDataLoader), or use mode='in_place'"
            )
        self._open(source, start)
        return self._batches(source, epochs)

    def go_to(self, batch_id: int) -> None:
        """Fetch batch `batch_id` next."""
        self.epoch = max(epoch for epoch, first in self._starts.items() if first <= batch_id)
        self.next_id, self._moved = batch_id, True

    def mark(self) -> None:
        """A snapshot is taken here: keep what going back to it needs."""
        state = self._mark()
        if state is not None:
            self._marks[self.next_id] = state
            self._marks = dict(list(self._marks.items())[-KEPT:])

    def state_dict(self) -> dict[str, Any]:
        """JSON types and tensors."""
        coming = []
        if self._source is not None and self.epoch not in self._draws and self.next_id == self._starts[self.epoch]:
            coming = [(self.epoch, self._source.draws())]  # of the epoch that begins here
        return {
            "next_id": self.next_id,
            "epoch": self.epoch,
            "call_epoch": self._call_epoch,
            "unit": None if self._unit is None else list(self._unit),
            "starts": [list(pair) for pair in self._starts.items()],
            "draws": [[epoch, one.torch, list(one.own)] for epoch, one in [*self._draws.items(), *coming]],
            "mark": self._mark(),
            "skips": self.skips.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave; the skip lists of then and now both hold."""
        self.next_id, self.epoch, self._call_epoch = state["next_id"], state["epoch"], state["call_epoch"]
        self._unit = None if state["unit"] is None else Unit(*state["unit"])
        self._starts = dict(state["starts"])
        self._draws = {epoch: Draws(words, tuple(own)) for epoch, words, own in state["draws"]}
        self._marks = {} if state["mark"] is None else {self.next_id: state["mark"]}
        self.skips.merge(SkipList.from_state(state["skips"]))
        self._resumed = True

    def again(self, state: Mapping[str, Any]) -> Iterator[Any]:
        """The batches of the loader in use from where the stream stood in `state`; the stream itself stays here.

        Raises ValueError when the loader cannot be positioned, or its batches are others than they were.
        """
        source = self._source
        if source is None or not source.positionable:
            raise ValueError("the loader cannot be positioned")
        other = Stream(
            mode=self._mode,
            skips=SkipList(),
            num_ranks=self._num_ranks,
            before=lambda: None,
            fetched=lambda batch_id, batch: None,
            skipped=lambda start, stop: None,
        )
        other.load_state_dict(state)
        if other._unit != source.unit:
            raise ValueError(f"its batches were {other._unit} and are {source.unit}")
        other._source = source
        return other._batches(source, None)

    def _mark(self) -> Any | None:
        """The loader's own state in the middle of an epoch; at its beginning it has none that matters."""
        if self._source is None or not self.running or self.next_id == self._starts[self.epoch]:
            return None
        if self._moved:  # the loader itself has not gone there yet
            return self._marks.get(self.next_id)
        return self._source.mark()

    def _open(self, source: Source, start: int | None) -> None:
        """Read the ids that there are in the unit of this loader."""
        if start is not None:
            if not isinstance(source, StreamSource):
                raise ValueError(
                    "start= is for iterators, which stand where they stand; this loader is positioned by the guard"
                )
            if start != self.next_id:
                raise ValueError(
                    f"start={start} and the run goes on at batch {self.next_id}; pass an iterator that is there"
                )
            source.begin_here()
        if self._resumed and self._unit is not None and self._unit != source.unit:
            self._convert(self._unit, source.unit)
        elif not self._resumed and self._unit not in (None, source.unit):
            # Another loader in the same run: ids go on, and no longer follow from epoch and index.
            if self.next_id != self._starts[self.epoch]:
                raise ValueError(
                    f"another loader in the middle of epoch {self.epoch}: of {source.unit}, was {self._unit}; finish "
                    "the epoch first, or make a new Guard"
                )
            source.unit = source.unit._replace(batches_per_epoch=None)
            self.skips.unit = source.unit
        if not self._resumed:
            self._marks = {}
            if isinstance(source, StreamSource):
                source.begin_here()  # an iterator goes on where it stands
        self._unit, self._source = source.unit, source
        self.skips.convert(source.unit)

    def _convert(self, old: Unit, new: Unit) -> None:
        self.next_id = convert_id(self.next_id, old, new, up=True)
        self._starts = {epoch: convert_id(first, old, new, up=True) for epoch, first in self._starts.items()}
        self._marks = {}  # a loader's own state is of the batches it made

    def _batches(self, source: Source, epochs: int | None) -> Iterator[Any]:
        first = self.epoch if self._call_epoch is None else self._call_epoch
        self._call_epoch, self._resumed, self.running = first, False, True
        iterator: Iterator[Any] | None = None
        telling = -1
        try:
            while epochs is None or self.epoch < first + epochs:
                self._before()
                if self.stopped:
                    return
                if iterator is None or self._moved:
                    iterator = self._begin(source)
                batch_id = self.next_id
                try:
                    batch = next(iterator)
                except StopIteration:
                    if epochs is not None and self.epoch + 1 == first + epochs:
                        self._ended()
                    self._end_epoch()
                    iterator = None
                    continue
                self.next_id += 1
                kept = self.skips.first_kept(batch_id)
                if kept != batch_id:
                    if telling != kept:
                        self._skipped(batch_id, kept)
                    telling = kept
                    continue
                self._fetched(batch_id, batch)
                yield batch
                if self.stopped:
                    return
        finally:
            self.running = False
        self._call_epoch = None

    def _begin(self, source: Source) -> Iterator[Any]:
        self._moved = False
        index = self.next_id - self._starts[self.epoch]
        known = self._draws.get(self.epoch)
        if known is None and index == 0:
            self._draws[self.epoch] = source.draws()
            self._draws = dict(list(self._draws.items())[-KEPT:])
        mark = self._marks.get(self.next_id)
        iterator = source.start(self.epoch, index, draws=known, mark=mark)
        if mark is None or index > 0:
            return iterator
        # A mark at an epoch's beginning was taken at the end of the one before: nothing is left of that.
        left = list(islice(iterator, 1))
        return chain(left, iterator) if left else source.start(self.epoch, index, draws=known, mark=None)

    def _end_epoch(self) -> None:
        if self.next_id == self._starts[self.epoch]:
            raise ValueError(f"the loader gave no batch in epoch {self.epoch}; an iterator can be read only once")
        self.epoch += 1
        self._starts[self.epoch] = self.next_id
