"""The data's clock: ids over epochs, skips and resumes, for every kind of loader."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, TensorDataset

from aftershock.guard.batches import Mode, Stream
from aftershock.guard.skiplist import SkipList, SkipRange, Unit

SAMPLES = 24


class Noisy(Dataset[torch.Tensor]):
    """Items that draw random numbers while they are loaded, as augmentations do."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> torch.Tensor:
        return index + 0.1 * torch.rand(())


class Streaming(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(SAMPLES))


class Resumable:
    """As torchdata's StatefulDataLoader: a shuffled order of its own, a position that can be taken back."""

    batch_size = 4

    def __init__(self) -> None:
        self.epoch, self.at, self._go_on = 0, 0, False

    def __iter__(self) -> Iterator[list[int]]:
        if not self._go_on:
            self.epoch, self.at = self.epoch + 1, 0
        self._go_on = False
        order = random.Random(self.epoch).sample(range(SAMPLES), SAMPLES)
        while self.at * 4 < SAMPLES:
            self.at += 1
            yield order[self.at * 4 - 4 : self.at * 4]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.at, self._go_on = state["epoch"], state["at"], True


def _shuffled(**settings: Any) -> DataLoader[Any]:
    return DataLoader(Noisy(), batch_size=4, shuffle=True, **settings)


def _own_generator() -> DataLoader[Any]:
    return _shuffled(generator=torch.Generator().manual_seed(3))


def _by_epoch() -> DataLoader[Any]:
    sampler = DistributedSampler(Noisy(), num_replicas=2, rank=1, seed=5)
    return DataLoader(Noisy(), batch_size=2, sampler=sampler)


LOADERS: dict[str, Callable[[], Any]] = {
    "list": lambda: [torch.arange(4) + 4 * i for i in range(6)],
    "shuffled": _shuffled,
    "own_generator": _own_generator,
    "by_epoch": _by_epoch,
    "single_items": lambda: DataLoader(TensorDataset(torch.arange(6)), batch_size=None, shuffle=True),
    "resumable": Resumable,
    "streaming": lambda: DataLoader(Streaming(), batch_size=4),
}


class Subclassed(DataLoader[Any]):
    """More than torch's own loader may do: read from the epoch's beginning."""


LOADERS["subclassed"] = lambda: Subclassed(TensorDataset(torch.arange(SAMPLES)), batch_size=4, shuffle=True)


class Seen:
    """A stream and what it said."""

    def __init__(self, *, mode: Mode = "in_place", skips: SkipList | None = None, num_ranks: int = 1) -> None:
        self.ids: list[int] = []
        self.skipped: list[tuple[int, int]] = []
        self.stream = Stream(
            mode=mode,
            skips=SkipList() if skips is None else skips,
            num_ranks=num_ranks,
            before=lambda: None,
            fetched=lambda batch_id, _: self.ids.append(batch_id),
            skipped=lambda start, stop: self.skipped.append((start, stop)),
        )

    def run(self, loader: Any, *, epochs: int | None = 1, **settings: Any) -> Iterator[Any]:
        return self.stream.run(loader, epochs=epochs, start=settings.get("start"), samples=settings.get("samples"))


def _text(batches: Any) -> list[str]:
    return [repr(one) for one in batches]


@pytest.mark.parametrize("kind", LOADERS)
def test_batches_are_the_loaders_own(kind: str) -> None:
    """equivalence: against iterating the loader, random numbers included; ids go on over epochs."""
    torch.manual_seed(0)
    plain_loader, plain = LOADERS[kind](), []
    for epoch in range(2):
        if kind == "by_epoch":
            plain_loader.sampler.set_epoch(epoch)
        plain += _text(plain_loader)
    after = torch.rand(1)
    torch.manual_seed(0)
    seen = Seen()
    assert _text(seen.run(LOADERS[kind](), epochs=2)) == plain
    assert torch.equal(torch.rand(1), after)
    assert seen.ids == list(range(12))


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("stop", [3, 6, 8])
def test_a_resumed_run_sees_the_rest(kind: str, stop: int) -> None:
    """round trip: in an epoch, at its end, and in the second; the same batches and random numbers as uninterrupted."""
    torch.manual_seed(0)
    whole = _text(Seen().run(LOADERS[kind](), epochs=2))
    after = torch.rand(1)
    torch.manual_seed(0)
    first = Seen()
    got = _text(islice(iterator := first.run(LOADERS[kind](), epochs=2), stop))
    state, words = first.stream.state_dict(), torch.get_rng_state()
    del iterator
    torch.manual_seed(99)
    loader, second = LOADERS[kind](), Seen()
    second.stream.load_state_dict(state)
    torch.set_rng_state(words)
    got += _text(second.run(loader, epochs=2))
    assert got == whole
    assert second.ids == list(range(stop, 12))
    assert torch.equal(torch.rand(1), after)


@pytest.mark.parametrize("kind", [kind for kind in LOADERS if kind != "streaming"])
def test_restart_takes_the_data_back(kind: str) -> None:
    """round trip: with the random numbers of then, the batches are those of then; into the epoch before as well."""
    torch.manual_seed(0)
    seen, words, found = Seen(mode="restart"), {}, []

    def note() -> None:
        words.setdefault(seen.stream.next_id, torch.get_rng_state())
        if seen.stream.next_id in (0, 2, 6):
            seen.stream.mark()

    seen.stream._before = note
    # A loader with a state is gone back to where it was marked, which an epoch's first beginning is not.
    plan = {9: 2, 14: 6, 17: 2, 20: 2 if kind == "resumable" else 0}
    for batch in seen.run(LOADERS[kind](), epochs=2):
        found.append(repr(batch))
        back = plan.get(len(seen.ids))
        if back is not None:
            torch.set_rng_state(words[back])
            seen.stream.go_to(back)
    by_id: dict[int, set[str]] = {}
    for batch_id, batch in zip(seen.ids, found, strict=True):
        by_id.setdefault(batch_id, set()).add(batch)
    assert {batch_id: len(one) for batch_id, one in by_id.items()} == dict.fromkeys(range(12), 1)
    assert len(seen.ids) == (30 if kind == "resumable" else 32)


def test_skipped_batches_are_left_out_and_told_once() -> None:
    """contract: over the end of an epoch; a resumed run honours the list of then and of now."""
    skips = SkipList([SkipRange(2, 4), SkipRange(5, 7)])
    seen = Seen(skips=skips)
    got = list(seen.run(list(range(6)), epochs=2))
    assert seen.ids == [0, 1, 4, 7, 8, 9, 10, 11]
    assert got == [0, 1, 4, 1, 2, 3, 4, 5]
    assert seen.skipped == [(2, 4), (5, 7)]
    resumed = Seen(skips=SkipList([SkipRange(9, 11)]))
    resumed.stream.load_state_dict(seen.stream.state_dict() | {"next_id": 4, "epoch": 0, "call_epoch": 0})
    assert list(resumed.run(list(range(6)), epochs=2)) == [4, 1, 2, 5]


@pytest.mark.parametrize(("ranks", "batch"), [(2, 2), (1, 2), (4, 4)])
def test_another_world_size_goes_on_at_the_same_sample(ranks: int, batch: int) -> None:
    """equivalence: 1 rank x 4 samples, then other ranks: each id is that many samples; the skip list follows."""
    data = TensorDataset(torch.arange(96))
    first = Seen()
    list(islice(first.run(DataLoader(data, batch_size=4), epochs=1), 8))
    first.stream.skips.add(12, 16, "samples 48 to 63")
    resumed = Seen(num_ranks=ranks)
    resumed.stream.load_state_dict(first.stream.state_dict())
    parts = []
    for rank in range(ranks):
        one = Seen(num_ranks=ranks)
        one.stream.load_state_dict(first.stream.state_dict())
        sampler = DistributedSampler(data, num_replicas=ranks, rank=rank, shuffle=False)
        parts.append(list(one.run(DataLoader(data, batch_size=batch, sampler=sampler))))
        assert one.ids[0] == 32 // (ranks * batch)
    samples = sorted(int(x) for part in parts for (batch_of,) in part for x in batch_of)
    assert samples == [*range(32, 48), *range(64, 96)]


def test_calls_per_epoch_and_calls_for_all() -> None:
    """contract: one call an epoch goes on counting; a call that was under way ends where it would have."""
    seen = Seen()
    assert [list(seen.run([1, 2])) for _ in range(3)] == [[1, 2]] * 3
    assert seen.ids == list(range(6))
    half = Seen()
    list(islice(half.run([1, 2], epochs=3), 3))
    rest = Seen()
    rest.stream.load_state_dict(half.stream.state_dict())
    assert list(rest.run([1, 2], epochs=3)) == [2, 1, 2]
    assert len(list(islice(Seen().run([1, 2], epochs=None), 9))) == 9


def test_an_iterator_goes_on_where_it_stands() -> None:
    """contract: within a run; on a resumed one only when told that it is there."""
    items, seen = iter(range(10)), Seen()
    assert list(islice(seen.run(items), 4)) == [0, 1, 2, 3]
    assert list(islice(seen.run(items), 2)) == [4, 5]
    resumed = Seen()
    resumed.stream.load_state_dict(seen.stream.state_dict())
    with pytest.raises(ValueError, match="an iterator cannot be positioned"):
        next(resumed.run(items))
    with pytest.raises(ValueError, match="start=3 and the run goes on at batch 6"):
        resumed.run(items, start=3)
    assert next(resumed.run(items, start=6)) == 6
    assert resumed.ids == [6]


@pytest.mark.parametrize(
    ("loader", "settings", "said"),
    [
        (DataLoader(Streaming()), {"mode": "restart"}, "cannot be positioned; pass a list"),
        ((i for i in range(3)), {"mode": "restart"}, "cannot be positioned"),
        (5, {}, "got int"),
        ({"a": 1}, {}, "got dict"),
        ([1], {"epochs": 0}, "epochs must be at least 1"),
        ([1], {"start": 0}, "start= is for iterators"),
    ],
)
def test_refused_before_the_first_batch(loader: Any, settings: dict[str, Any], said: str) -> None:
    """planted."""
    seen = Seen(mode=settings.pop("mode", "in_place"))
    with pytest.raises(ValueError, match=said):
        seen.run(loader, **settings)


def test_a_loader_without_batches_and_one_changed_in_the_middle() -> None:
    """planted."""
    with pytest.raises(ValueError, match="gave no batch"):
        list(Seen().run([]))
    seen = Seen()
    next(seen.run([1, 2, 3]))
    with pytest.raises(ValueError, match="another loader in the middle of epoch 0"):
        seen.run([1, 2])
    resumed = Seen()
    resumed.stream.load_state_dict(seen.stream.state_dict())
    with pytest.raises(ValueError, match="samples in a batch are not known"):
        resumed.run([1, 2])


def test_other_loaders_after_an_epoch_go_on_counting() -> None:
    """contract: a curriculum."""
    seen = Seen()
    assert list(seen.run([1, 2, 3])) + list(seen.run([7, 8])) == [1, 2, 3, 7, 8]
    assert seen.ids == list(range(5))
    assert seen.stream.skips.unit == Unit(None, None)
