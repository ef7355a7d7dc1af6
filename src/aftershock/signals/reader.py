"""Numbers on their way from the device to the host: never waited for inside the step, read one step late.

`LateReader` brings the values; `Carrier` is what every tap holds: its hooks, and the names for the values under way.
On a GPU each push is one asynchronous copy into pinned memory and one event; on a CPU the values are there already.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

MAX_WAITING = 16
"""Copies under way at most: a reader that nobody empties waits for the oldest instead of growing for ever."""


SentT = TypeVar("SentT")


class Measured(NamedTuple):
    """The signals of one optimizer step: `kind/place/stat` to a number; nan and inf are numbers too."""

    step: int
    values: dict[str, float]


class Arrival(NamedTuple):
    """What came through: the step it was pushed with, and float64 values of the pushed shape."""

    step: int
    values: np.ndarray


class LateReader:
    """Carries one tensor a step to the host. `ready` holds back the newest push, so that the values of step t come
    after step t+1 was queued, on every device alike.

    Cost per push: one device-to-host copy, no synchronisation. Example:

    >>> reader = LateReader()
    >>> reader.push(0, torch.ones(2)), reader.push(1, torch.zeros(2))
    (None, None)
    >>> [arrival.step for arrival in reader.ready()]
    [0]
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()
        self._late: list[Arrival] = []

    def push(self, step: int, values: Tensor) -> None:
        """Send `values` on their way; they may be changed afterwards."""
        if len(self._waiting) >= MAX_WAITING:
            self._late.append(_arrived(*self._waiting.popleft()))
        if values.device.type == "cpu":
            self._waiting.append((step, values.detach().clone(), None))
            return
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.device.type == "cuda")
        host.copy_(values.detach(), non_blocking=values.device.type == "cuda")
        event = None
        if values.device.type == "cuda":
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(values.device))
        self._waiting.append((step, host, event))

    def ready(self, *, wait: bool = False) -> list[Arrival]:
        """All that has arrived, in order, without the newest push. `wait`: wait for copies still under way.

        Without `wait` the host never waits; how late a value comes on a GPU then depends on how far the host runs
        ahead. With it, it is one step exactly, which decisions that must replay bit for bit want.
        """
        done, self._late = self._late, []
        while len(self._waiting) > 1:
            step, host, event = self._waiting[0]
            if event is not None and not wait and not event.query():
                break
            self._waiting.popleft()
            done.append(_arrived(step, host, event))
        return done

    def drain(self) -> list[Arrival]:
        """Everything, the newest included; waits for it."""
        done = self.ready(wait=True)
        while self._waiting:
            done.append(_arrived(*self._waiting.popleft()))
        return done


class Carrier(Generic[SentT]):
    """The open hooks of a tap, and its numbers under way with what the host knows of them.

    `rows(sent, values)` gives the signals of one step once its values are here. Hooks are removed by `close`, after
    which everything that was sent can be read.
    """

    def __init__(self, rows: Callable[[SentT, np.ndarray], dict[str, float]]) -> None:
        self._rows, self._reader = rows, LateReader()
        self._handles: list[Any] = []
        self._sent: deque[SentT] = deque()
        self._done: list[Measured] = []

    def open(self, who: str) -> list[Any]:
        """The list that takes the handles of the hooks. Raises ValueError while hooks of an earlier entry live."""
        if self._handles:
            raise ValueError(f"this {who} is open already; make one per `with`")
        return self._handles

    def close(self) -> None:
        """Remove the hooks, and wait for all that is under way."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._done += self._named(self._reader.drain())

    def send(self, step: int, values: Tensor, sent: SentT) -> None:
        """`values` of `step`, and what `rows` will need to name them."""
        self._reader.push(step, values)
        self._sent.append(sent)

    def read(self, *, wait: bool) -> list[Measured]:
        """What has come through since the last call, oldest first (see `LateReader.ready`)."""
        done, self._done = self._done, []
        return done + self._named(self._reader.ready(wait=wait))

    def _named(self, arrivals: Iterable[Arrival]) -> list[Measured]:
        return [Measured(step, self._rows(self._sent.popleft(), values)) for step, values in arrivals]


def _arrived(step: int, host: Tensor, event: torch.cuda.Event | None) -> Arrival:
    if event is not None:
        event.synchronize()
    return Arrival(step, host.double().numpy())
