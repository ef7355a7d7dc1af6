"""Where each parameter lives: K replicas in one [K, P] buffer, a row a replica, a column range a tensor.

Legend: K replicas, P parameters of one replica. A row is contiguous, so an optimizer call, a snapshot and a norm of a
replica are each one call; a tensor of the fleet is a view [K, *shape].
Must not import the fleet or any model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Role = Literal["matmul", "logits", "params"]

# Standard deviation of a unit normal truncated at two sigma (jax.nn.initializers.variance_scaling divides by it), so
# that the *final* standard deviation is the one asked for.
TRUNCATED_STD = 0.87962566103423978


class ParamSpec(NamedTuple):
    """One tensor of one replica. `std`: 0 gives zeros, None gives ones. `lr_scale` multiplies its learning rate."""

    name: str
    shape: tuple[int, ...]
    role: Role
    std: float | None
    truncated: bool = True
    lr_scale: float = 1.0

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class Place(NamedTuple):
    """The column range [start, stop) that a spec occupies."""

    spec: ParamSpec
    start: int
    stop: int


class Layout:
    """Column ranges of all specs: matmul weights first (they are cast together), then by learning-rate factor."""

    def __init__(self, specs: Sequence[ParamSpec]) -> None:
        names = [spec.name for spec in specs]
        assert len(set(names)) == len(names), "parameter names must be unique"
        self.places: list[Place] = []
        start = 0
        for spec in sorted(specs, key=lambda s: (s.role != "matmul", s.lr_scale)):
            self.places.append(Place(spec, start, start + spec.size))
            start += spec.size
        # Drawn in the order of the specs, not of the rates: muParam alone must not change where a run starts.
        order = {spec.name: i for i, spec in enumerate(specs)}
        self._drawn = sorted(self.places, key=lambda p: (p.spec.role != "matmul", order[p.spec.name]))
        self.size = start
        self.matmul_size = sum(spec.size for spec in specs if spec.role == "matmul")
        self.names = [place.spec.name for place in self.places]

    def views(self, buffer_KP: Tensor) -> dict[str, Tensor]:
        """Name to view [K, *shape] of a [K, P] buffer (or of its first columns, for the places that fit)."""
        num_replicas, columns = buffer_KP.shape
        return {
            place.spec.name: buffer_KP[:, place.start : place.stop].view(num_replicas, *place.spec.shape)
            for place in self.places
            if place.stop <= columns
        }

    def sections(self, *, per_tensor: bool = False) -> list[tuple[int, int, float]]:
        """Maximal column ranges (start, stop, lr_scale) of one learning-rate factor; or one range a tensor."""
        ranges: list[tuple[int, int, float]] = []
        for place in self.places:
            scale = place.spec.lr_scale
            if ranges and ranges[-1][2] == scale and not per_tensor:
                ranges[-1] = (ranges[-1][0], place.stop, scale)
            else:
                ranges.append((place.start, place.stop, scale))
        return ranges

    def rms(self, buffer_KP: Tensor) -> Tensor:
        """Root mean square of every tensor, [K, number of tensors], in the order of `names`."""
        norms = [
            torch.linalg.vector_norm(buffer_KP[:, place.start : place.stop], dim=1) / math.sqrt(place.spec.size)
            for place in self.places
        ]
        return torch.stack(norms, dim=1)

    def init(self, seeds: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Fresh parameters [K, P]; row k depends on `seeds[k]` alone, drawn in float32 on the CPU for every dtype."""
        rows = torch.empty(len(seeds), self.size)
        for row_P, seed in zip(rows, seeds, strict=True):
            generator = torch.Generator().manual_seed(seed)
            for place in self._drawn:
                _draw(row_P[place.start : place.stop], place.spec, generator)
        return rows.to(device=device, dtype=dtype)


def _draw(out: Tensor, spec: ParamSpec, generator: torch.Generator) -> None:
    if spec.std is None:
        out.fill_(1.0)
    elif spec.std == 0:
        out.zero_()
    elif spec.truncated:
        std = spec.std / TRUNCATED_STD
        torch.nn.init.trunc_normal_(out, std=std, a=-2 * std, b=2 * std, generator=generator)
    else:
        out.normal_(std=spec.std, generator=generator)
