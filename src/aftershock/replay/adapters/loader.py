"""The batches of a map-style DataLoader by epoch and number: as iterating it would give them, without iterating.

Refuses what is no function of the place: a stream, an order or a batch that is drawn from the process's own random
numbers. Must not import a trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from aftershock.guard.digest import of_rng


class Epochs:
    """What `loader` gives in any epoch. `set_epoch(epoch)` is what the trainer calls before it iterates.

    A generator of the loader's own (`DataLoader(generator=..)`) is followed from the state it has now, which is taken
    for that before epoch 0 (`begun`: for that after epoch 0's iterator was made), and left as it is. Nothing is read
    before the first batch is asked for. `limit`: batches that are read of an epoch, where its end is never reached:
    a sampler may draw once more there.

    Example:
        epochs = Epochs(loader, set_epoch=loader.batch_sampler.sampler.set_epoch)
        first, second = epochs.fetch(3, range(2))
    """

    def __init__(
        self, loader: Any, *, set_epoch: Callable[[int], object], begun: bool = False, limit: int | None = None
    ) -> None:
        self._loader, self._set_epoch, self._begun, self._limit = loader, set_epoch, begun, limit
        self._generators = generators(loader)
        self._states = [[generator.get_state() for generator in self._generators]]
        self._known: tuple[int, list[list[int]]] | None = None
        self._num_batches = 0

    @property
    def draws(self) -> int:
        """Random numbers of the process that beginning an epoch takes: the loader's seed for its workers."""
        return 0 if isinstance(self._loader.generator, torch.Generator) else 1

    @property
    def num_batches(self) -> int:
        """Batches of an epoch. Raises ValueError as `order` does."""
        self._num_batches = self._num_batches or len(self.order(0))
        return self._num_batches

    def order(self, epoch: int) -> list[list[int]]:
        """Indices into the data set, batch by batch. Raises ValueError where that is no function of the epoch."""
        if self._known is None or self._known[0] != epoch:
            self._refuse_streams()
            while len(self._states) <= epoch:
                self._draw(len(self._states) - 1)
            order = self._draw(epoch)
            if self._draw(epoch) != order:
                raise ValueError(
                    "the sampler gives another order each time it is asked for the same epoch: give it a set_epoch "
                    "from which it seeds itself"
                )
            self._known = epoch, order
        return self._known[1]

    def fetch(self, epoch: int, numbers: Sequence[int]) -> list[Any]:
        """These batches of an epoch, collated. Raises ValueError where one is drawn at random as it is made."""
        order = self.order(epoch)
        self._set_epoch(epoch)
        loader = DataLoader(
            self._loader.dataset,
            batch_sampler=[order[number] for number in numbers],
            collate_fn=self._loader.collate_fn,
            generator=torch.Generator(),  # else the seed for workers would come from the process
        )
        with drawing_nothing(
            "the data set or its collator draws from the process's random numbers, so the same index gives another "
            "batch each time; let it draw from a generator seeded with the example's index, or prepare the data before"
        ):
            return list(loader)

    def _draw(self, epoch: int) -> list[list[int]]:
        now = [generator.get_state() for generator in self._generators]
        for generator, state in zip(self._generators, self._states[epoch], strict=True):
            generator.set_state(state)
        self._set_epoch(epoch)
        with drawing_nothing(
            "the sampler draws each epoch's order from the process's random numbers, which no index tells; give the "
            "DataLoader generator=torch.Generator().manual_seed(..) (in transformers: accelerator_config with "
            "use_seedable_sampler=True, which is the default, and another train_sampling_strategy than by length)"
        ):
            if not self.draws and (epoch or not self._begun):
                torch.empty((), dtype=torch.int64).random_(generator=self._loader.generator)  # as its iterator does
            order = [list(batch) for batch in islice(self._loader.batch_sampler, self._limit)]
        if epoch + 1 == len(self._states):
            self._states.append([generator.get_state() for generator in self._generators])
        for generator, state in zip(self._generators, now, strict=True):
            generator.set_state(state)
        return order

    def _refuse_streams(self) -> None:
        if isinstance(self._loader.dataset, IterableDataset) or self._loader.batch_sampler is None:
            raise ValueError(
                "the training data are a stream, which cannot be asked for its i-th batch: give a data set with "
                "__getitem__ and a batch size, or replay the copies that the guard kept of the batches"
            )


def draw(times: int) -> None:
    """Take as many random numbers from the process as `times` iterators of a DataLoader do."""
    for _ in range(times):
        torch.empty((), dtype=torch.int64).random_()


def generators(loader: Any) -> list[torch.Generator]:
    """Those of the loader's own that its order is drawn from."""
    sampler = loader.sampler
    inner = getattr(loader.batch_sampler, "sampler", None)
    found = [loader.generator, getattr(sampler, "generator", None), getattr(inner, "generator", None)]
    return list({id(one): one for one in found if isinstance(one, torch.Generator)}.values())


@contextmanager
def drawing_nothing(otherwise: str) -> Iterator[None]:
    """Raises ValueError with these words when the process's random numbers have moved."""
    before = of_rng()
    yield
    if of_rng() != before:
        raise ValueError(otherwise)
