"""Loaders behind one interface: start an epoch at any batch, if the loader can, with the order it had the first time.

A list is indexed. A map-style DataLoader starts late through its own sampler, loading nothing before. A loader with a
state of its own (torchdata's StatefulDataLoader) gets it back. Anything else is read from its beginning.
Must not import the guard.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from aftershock.guard.skiplist import Unit
from aftershock.guard.state import Stateful


@runtime_checkable
class _Epochal(Protocol):
    """A sampler whose order depends on the epoch, DistributedSampler for one."""

    def set_epoch(self, epoch: int, /) -> object: ...


@runtime_checkable
class _Sized(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Draws(NamedTuple):
    """What an epoch's order is drawn from, as it was before the epoch: torch's random numbers, and the loader's own."""

    torch: Tensor
    own: tuple[Tensor, ...]


class Source(ABC):
    """A loader of batches. `unit` is what one of its ids stands for; `positionable`: any batch can be gone back to."""

    unit: Unit
    positionable: bool = True

    @abstractmethod
    def start(self, epoch: int, index: int, *, draws: Draws | None, mark: Any | None) -> Iterator[Any]:
        """The batches of `epoch` from `index` on, in the order that `draws` give; none: a new order is drawn."""

    def draws(self) -> Draws:
        """What the next epoch will be drawn from."""
        return Draws(torch.get_rng_state(), ())

    def mark(self) -> Any | None:
        """The loader's own state now; None where it has none."""
        return None


class ListSource(Source):
    """Anything with a length and an index: a list of batches, a memory-mapped file."""

    def __init__(self, batches: _Sized, *, samples: int | None) -> None:
        self._batches = batches
        self.unit = Unit(samples, len(batches))

    def start(self, epoch: int, index: int, *, draws: Draws | None, mark: Any | None) -> Iterator[Any]:
        return (self._batches[i] for i in range(index, len(self._batches)))


class LoaderSource(Source):
    """A map-style DataLoader. Its order comes from its sampler, and that from the draws; workers start as they do.

    A subclass of DataLoader (Accelerate's, for one) may do more than torch's, so it is read from the epoch's beginning.
    With workers that draw random numbers of their own (augmentation), those after a late start are new ones.
    """

    def __init__(self, loader: DataLoader[Any], *, samples: int | None, num_ranks: int) -> None:
        self._loader = loader
        size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
        if samples is None and isinstance(size, int):
            samples = size * num_ranks
        self.unit = Unit(samples, len(loader))

    def start(self, epoch: int, index: int, *, draws: Draws | None, mark: Any | None) -> Iterator[Any]:
        for sampler in self._samplers():
            if isinstance(sampler, _Epochal):
                sampler.set_epoch(epoch)
        if draws is not None:
            for generator, state in zip(self._generators(), draws.own, strict=True):
                generator.set_state(state)
        if index == 0:
            return iter(self._loader)
        with _as_then(draws):
            return _tail(self._loader, index) if type(self._loader) is DataLoader else _late(self._loader, index)

    def draws(self) -> Draws:
        return Draws(torch.get_rng_state(), tuple(generator.get_state() for generator in self._generators()))

    def _samplers(self) -> list[Any]:
        batch_sampler: Any = self._loader.batch_sampler
        return [self._loader.sampler, batch_sampler, getattr(batch_sampler, "sampler", None)]

    def _generators(self) -> list[torch.Generator]:
        found = [self._loader.generator, *(getattr(sampler, "generator", None) for sampler in self._samplers())]
        own = {id(one): one for one in found if isinstance(one, torch.Generator)}
        return list(own.values())


class StatefulSource(Source):
    """A loader that gives its position and takes it back; where no mark is kept, it is iterated anew and read past."""

    def __init__(self, loader: Any, *, samples: int | None, num_ranks: int) -> None:
        self._loader = loader
        size = getattr(loader, "batch_size", None)
        length = len(loader) if isinstance(loader, DataLoader) and not _streams(loader) else None
        self.unit = Unit(size * num_ranks if samples is None and isinstance(size, int) else samples, length)

    def start(self, epoch: int, index: int, *, draws: Draws | None, mark: Any | None) -> Iterator[Any]:
        if mark is not None:
            self._loader.load_state_dict(mark)
            return iter(self._loader)
        with _as_then(draws if index else None):
            return _late(self._loader, index)

    def mark(self) -> Any | None:
        return self._loader.state_dict()


class StreamSource(Source):
    """An iterable that can only be read from its beginning, or not even that (an iterator, which goes on)."""

    positionable = False

    def __init__(self, batches: Iterable[Any], *, samples: int | None) -> None:
        self._batches = batches
        self.unit = Unit(samples, None)
        self.once = isinstance(batches, Iterator)
        self._begun = False

    def start(self, epoch: int, index: int, *, draws: Draws | None, mark: Any | None) -> Iterator[Any]:
        if not self.once:
            with _as_then(draws if index else None):
                return _late(self._batches, index)
        if index and not self._begun:
            raise ValueError(
                f"the run goes on at batch {index} of epoch {epoch}, and an iterator cannot be positioned; pass a "
                "list, a DataLoader or a loader with state_dict, or an iterator that is already there together with "
                "start=guard.batch_id"
            )
        self._begun = True
        return iter(self._batches)

    def begin_here(self) -> None:
        """The iterator stands where the run goes on: the user says so."""
        self._begun = True


def open_source(loader: Any, *, samples: int | None, num_ranks: int) -> Source:
    """The right source for `loader`. Raises ValueError for what gives no batches at all."""
    if isinstance(loader, Stateful) and isinstance(loader, Iterable):
        return StatefulSource(loader, samples=samples, num_ranks=num_ranks)
    if isinstance(loader, DataLoader):
        if _streams(loader):
            return StreamSource(loader, samples=samples)
        return LoaderSource(loader, samples=samples, num_ranks=num_ranks)
    if isinstance(loader, (Sequence, Tensor)) or (isinstance(loader, _Sized) and not isinstance(loader, (dict, str))):
        return ListSource(loader, samples=samples)  # pyright: ignore[reportArgumentType] - Sequence and Tensor are sized
    if isinstance(loader, Iterable) and not isinstance(loader, (dict, str)):
        return StreamSource(loader, samples=samples)
    raise ValueError(
        f"guard.batches needs a loader, a list or another iterable of batches, got {type(loader).__name__}"
    )


class _Tail:
    """A sampler's output from `start` on, once. Its random numbers are drawn at the first `next`, or at `prime`."""

    def __init__(self, whole: Any, start: int) -> None:
        self._whole, self._start = whole, start
        self._rest: Iterator[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self.prime()
        assert self._rest is not None
        return next(self._rest)

    def __len__(self) -> int:
        return max(0, len(self._whole) - self._start)

    def prime(self) -> None:
        """Draw what the epoch's order needs, and pass over what is behind."""
        if self._rest is None:
            rest = islice(iter(self._whole), self._start, None)
            self._rest = chain(list(islice(rest, 1)), rest)


def _tail(loader: DataLoader[Any], start: int) -> Iterator[Any]:
    """The same loader from batch `start` of its epoch on; nothing before it is loaded.

    Draws as the loader does: first the workers' seed, then the sampler's.
    """
    plain = loader.batch_sampler is None
    tail = _Tail(loader.sampler if plain else loader.batch_sampler, start)
    sampling: dict[str, Any] = {"sampler": tail, "batch_size": None} if plain else {"batch_sampler": tail}
    late = DataLoader(
        loader.dataset,
        **sampling,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
    )
    iterator = iter(late)
    tail.prime()
    return iterator


def _late(batches: Iterable[Any], count: int) -> Iterator[Any]:
    """Read past the first `count`."""
    iterator = iter(batches)
    for _ in islice(iterator, count):
        pass
    return iterator


@contextlib.contextmanager
def _as_then(draws: Draws | None) -> Iterator[None]:
    """With torch's random numbers of the epoch's beginning; afterwards those of now go on. None: just as it is."""
    if draws is None:
        yield
        return
    now = torch.get_rng_state()
    torch.set_rng_state(draws.torch)
    try:
        yield
    finally:
        torch.set_rng_state(now)


def _streams(loader: DataLoader[Any]) -> bool:
    return isinstance(loader.dataset, IterableDataset)
