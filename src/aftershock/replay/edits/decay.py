"""Weight decay: scaled or set, everywhere or on embeddings or norms alone.

Must not import other edits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from aftershock.replay.edits.checked import Checked, around_step, kind
from aftershock.replay.edits.places import parameters_of
from aftershock.replay.run import Run

Of = Literal["all", "embeddings", "norms"]


@dataclass(frozen=True, kw_only=True)
class Decay(Checked):
    """The groups' weight_decay times `factor`, or set to `value` (the other one is nan), on parameters `of` a kind.

    What does not fill a group is a group of its own while the optimizer steps, so coupled (L2) and decoupled decay are
    both exactly that of a run with such groups. A tied weight counts as an embedding.

    Example:
        Decay(factor=0.0, of="embeddings")
    """

    factor: float = math.nan
    value: float = math.nan
    of: Of = "all"

    def __post_init__(self) -> None:
        given = [x for x in (self.factor, self.value) if not math.isnan(x)]
        if len(given) != 1 or not 0 <= given[0] < math.inf:
            raise ValueError(f"weight decay: give a factor or a value from 0 on, got {self.factor} and {self.value}")
        if self.of not in ("all", "embeddings", "norms"):
            raise ValueError(f"weight decay: of is all, embeddings or norms, got {self.of!r}")

    def check(self, run: Run) -> None:
        groups = run.workload.optimizer.param_groups
        if not all("weight_decay" in group for group in groups):
            raise ValueError(f"{kind(run.workload.optimizer)} has no weight_decay")
        chosen = self._chosen(run)
        there = {float(g["weight_decay"]) for g in groups if any(_is_in(p, chosen) for p in g["params"])}
        if all(self._new(decay) == decay for decay in there):
            what = "" if self.of == "all" else f" of {self.of}"
            raise ValueError(
                f"the weight decay{what} is {', '.join(f'{d:g}' for d in sorted(there)) or 'none'} already"
            )

    def change(self, run: Run) -> None:
        groups = run.workload.optimizer.param_groups
        chosen = self._chosen(run)
        if chosen is None:
            for group in groups:
                group["weight_decay"] = self._new(group["weight_decay"])
            return
        whole: list[dict[str, Any]] = []
        parts: list[tuple[dict[str, Any], dict[str, Any]]] = []

        def split() -> None:
            whole[:] = groups
            parts[:] = [(group, part) for group in whole for part in self._split(group, chosen)]
            groups[:] = [part for _, part in parts]

        def merge() -> None:
            for group, part in parts:  # an optimizer may count its steps in the group
                group.update((k, v) for k, v in part.items() if k not in ("params", "weight_decay"))
            if whole:
                groups[:] = whole
            whole.clear()
            parts.clear()

        around_step(run, split, merge)

    def _split(self, group: dict[str, Any], chosen: set[int]) -> list[dict[str, Any]]:
        inside = [p for p in group["params"] if id(p) in chosen]
        outside = [p for p in group["params"] if id(p) not in chosen]
        new = {"params": inside, "weight_decay": self._new(group["weight_decay"])}
        return [part for part in (group | {"params": outside}, group | new) if part["params"]]

    def _chosen(self, run: Run) -> set[int] | None:
        """By identity; None for all."""
        if self.of == "all":
            return None
        return {id(p) for p in parameters_of(run.workload.model, self.of).values()}

    def _new(self, old: float) -> float:
        return old * self.factor if math.isnan(self.value) else self.value


def _is_in(param: Any, chosen: set[int] | None) -> bool:
    return chosen is None or id(param) in chosen
