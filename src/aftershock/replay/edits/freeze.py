"""One module held still at a time, or the updates of one tensor withheld: where the spike needs something to move.

Must not import other edits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aftershock.guard.policies.kept import Kept
from aftershock.replay.edits.checked import Checked, around_step
from aftershock.replay.run import Run
from aftershock.signals.places import module_places, parameter_places
from aftershock.signals.ranks import local


@dataclass(frozen=True, kw_only=True)
class Frozen(Checked):
    """The modules whose names match take no step: weights and moments stay as they are, and nothing decays.

    Their gradients still count in the global norm, so all other modules are clipped as before. A tied tensor stands
    still wherever else it is used.

    Example:
        Frozen(modules="blocks.0")
    """

    modules: str

    def check(self, run: Run) -> None:
        self._chosen(run)

    def change(self, run: Run) -> None:
        chosen = self._chosen(run)

        def forget() -> None:
            for p in chosen:
                p.grad = None

        around_step(run, forget, _nothing)

    def _chosen(self, run: Run) -> list[Tensor]:
        places = module_places(run.workload.model, self.modules)
        found = {id(p): p for module in places.values() for p in module.parameters() if p.requires_grad}
        if not found:
            raise ValueError(f"{', '.join(places)} holds no parameter that is trained")
        return list(found.values())


@dataclass(frozen=True, kw_only=True)
class Withheld(Checked):
    """The parameters whose names match keep their weights, while their moments go on with each gradient."""

    parameters: str

    def check(self, run: Run) -> None:
        self._chosen(run)

    def change(self, run: Run) -> None:
        chosen, kept = self._chosen(run), Kept()
        weights = {name: local(p) for name, p in chosen.items()}

        @torch.no_grad()
        def take() -> None:
            kept.take(list(weights), list(weights.values()))

        @torch.no_grad()
        def put_back() -> None:
            for name in kept.names:
                weights[name].copy_(kept.old(name))
            kept.drop()

        around_step(run, take, put_back)

    def _chosen(self, run: Run) -> dict[str, Tensor]:
        found = parameter_places(run.workload.model, self.parameters)
        trained = {name: p for name, p in found.items() if p.requires_grad}
        if not trained:
            raise ValueError(f"{', '.join(found)} is not trained as it is")
        return trained


def _nothing() -> None:
    return None
