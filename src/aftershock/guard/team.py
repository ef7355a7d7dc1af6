"""Work that several processes share step by step: what fails on one fails on all of them, so that none is left waiting.

For rare work only (snapshots on disk): objects travel pickled. Must not import anything else of the guard but `agree`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aftershock.guard.agree import Ranks


class Team:
    """All processes, or this one `alone`. Every member makes the same calls in the same order.

    Example:
        name = Team(alone=False).first(lambda: choose_a_name())
    """

    def __init__(self, *, alone: bool) -> None:
        ranks = Ranks(None)
        self.rank, self.size = (0, 1) if alone else (ranks.rank, ranks.size)

    def each(self, work: Callable[[], Any]) -> list[Any]:
        """What `work` gives on each rank, by rank, sent to all. Raises the error of the first rank that had one."""
        error: Exception | None = None
        value = None
        try:
            value = work()
        except Exception as caught:
            error = caught
        told: list[Any] = [(value, None)]
        if self.size > 1:
            import torch.distributed as dist

            number = error.errno if isinstance(error, OSError) else None
            told = [None] * self.size
            dist.all_gather_object(told, (value, error and (isinstance(error, OSError), number, str(error))))
        if error is not None:
            raise error
        for rank, (_, fault) in enumerate(told):
            if fault is not None:
                of_system, number, text = fault
                raise OSError(number, f"rank {rank}: {text}") if of_system else ValueError(f"rank {rank}: {text}")
        return [value for value, _ in told]

    def own(self, work: Callable[[], Any]) -> Any:
        """What `work` gives here, once it succeeded everywhere. It is not sent."""
        made = []
        self.each(lambda: made.append(work()))
        return made[0]

    def first(self, work: Callable[[], Any]) -> Any:
        """What `work` gives on rank 0, which alone does it."""
        return self.each(lambda: work() if self.rank == 0 else None)[0]
