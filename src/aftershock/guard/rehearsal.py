"""Running recorded steps again before a resumed run goes on, with the user's loss of a batch and nothing else of his.

Must not import the guard.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from aftershock.guard import shelf
from aftershock.guard.audit import AuditResult, Rerun, Tail, replay
from aftershock.guard.batches import Stream
from aftershock.guard.disk import load_own
from aftershock.guard.rates import Scale
from aftershock.guard.state import Training
from aftershock.guard.steps import Steps
from aftershock.guard.team import Team
from aftershock.guard.witness import steps_after

_log = logging.getLogger("aftershock.guard")


class _Found(NamedTuple):
    tail: Tail
    stream: Mapping[str, Any]


class Rehearsal:
    """Takes the steps after a snapshot once more: loader, forward, backward, clip, optimizer, schedule.

    A policy that edits gradients or weights is not asked, so under one only the first loss is compared.
    """

    def __init__(
        self,
        steps: Steps,
        training: Training,
        stream: Stream,
        loss: Callable[[Any], Tensor],
        *,
        accumulate: int,
        tolerance: float,
    ) -> None:
        self._steps, self._training, self._stream, self._loss = steps, training, stream, loss
        self._accumulate, self._tolerance = accumulate, tolerance

    def run(self, folder: Path, *, rank: int) -> AuditResult:
        """From the newest snapshot below `folder` after which every rank has recorded steps; the run stays as it is."""
        found = self._choose(folder, rank)
        if found is None:
            return AuditResult(True, (), 0)
        try:
            batches = self._stream.again(found.stream)
        except ValueError as error:
            _log.warning("no recorded step can be run again: %s", error)
            return AuditResult(True, (), 0)
        findings, count = replay(self._training, found.tail, lambda _: self._rerun(batches), self._tolerance)
        self._steps.put_back()
        return AuditResult(not findings, tuple(findings), count)

    def _choose(self, folder: Path, rank: int) -> _Found | None:
        team = Team(alone=False)
        for path in reversed(team.first(lambda: shelf.listed(folder))):
            try:
                shelf.choose(path, team)
                rows = steps_after(path, rank)
                own = team.own(lambda path=path: load_own(path, rank))
            except (ValueError, OSError):
                continue  # damaged: said when the run was loaded
            plain = own is not None and Scale(*own["scale"]).now() == 1.0
            num_rows = min(team.each(lambda rows=rows, plain=plain: len(rows) if plain else 0))
            if own is not None and num_rows:
                rows = rows[: 1 if self._steps.edits else num_rows]
                return _Found(Tail(rows, None, own["surroundings"], path), own["stream"])
        return None

    def _rerun(self, batches: Iterator[Any]) -> Rerun:
        first, total = None, None
        for index in range(self._accumulate):
            batch = next(batches)
            first = batch if index == 0 else first
            loss = self._loss(batch)
            self._steps.backward(loss)
            part = loss.detach().reshape(())
            total = part if total is None else total + part
        assert total is not None
        return Rerun(self._steps.rehearse(total), first)
