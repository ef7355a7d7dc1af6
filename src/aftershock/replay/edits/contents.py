"""The suspect batches with other tensors and all else of their own: is it the data, or what comes along with it?

A batch may carry more than data: a weight, a switch, a rate that the loss reads. Must not import other edits than those
of the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from aftershock.replay.edits.checked import Checked
from aftershock.replay.edits.data import calm, leaves, mapped
from aftershock.replay.loop import parts
from aftershock.replay.run import Run


@dataclass(frozen=True, kw_only=True)
class OtherContents(Checked):
    """Each of `steps` trains on the tensors of a calm step before the suspects, the last first, where they have the
    same shape and type; whatever is no tensor stays its own batch's."""

    steps: range

    @property
    def first_step(self) -> int | None:
        return self.steps.start

    def check(self, run: Run) -> None:
        standing = calm(run.window)
        if not standing:
            raise ValueError("no step lies between the snapshot and the suspects whose tensors could stand in")
        usual = _others(run.batch(run.index_of(standing[-1])))
        steps = [step for step in (self.steps.start, run.window.onset, run.window.peak) if step in self.steps]
        if all(_others(run.batch(run.index_of(step))) == usual for step in steps):
            raise ValueError("the suspect batches are tensors alone, or differ from calm ones in nothing else")

    def change(self, run: Run) -> None:
        transform, index_of, standing = run.transform, run.index_of, calm(run.window)[::-1]

        def mixed(batch: Any) -> Any:
            if run.step not in self.steps:
                return transform(batch)
            at = index_of(standing[(run.step - self.steps.start) % len(standing)])
            return transform(_mixed(batch, parts(run.workload, run.batch(at), at)[run.part]))

        run.transform = mixed


def _mixed(own: Any, other: Any) -> Any:
    """`own` with the tensors of `other`, where the two are made alike."""
    theirs = list(leaves(other))
    if len(theirs) != len(list(leaves(own))):
        return own
    waiting = iter(theirs)

    def choose(leaf: Any) -> Any:
        stand_in = next(waiting)
        if not (isinstance(leaf, Tensor) and isinstance(stand_in, Tensor)):
            return leaf
        return stand_in if (leaf.shape, leaf.dtype) == (stand_in.shape, stand_in.dtype) else leaf

    return mapped(own, choose)


def _others(batch: Any) -> list[Any]:
    """Everything in a batch that is no tensor."""
    return [leaf for leaf in leaves(batch) if not isinstance(leaf, Tensor)]
