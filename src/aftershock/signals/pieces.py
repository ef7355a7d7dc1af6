"""Lists of tensors cut into flat pieces, so that a chain of elementwise work stays in the cache or in few kernels.

Legend: P places, N pieces.
A piece is at most PIECE elements of one tensor; a group of pieces is worked on at once. On a CPU a group is half a
megabyte of float32, so that three of them and what is made of them stay in a core's cache; on a GPU it is large and a
group is one kernel per operation. Counts are sums of 0 and 1 in float32: exact, because a piece has at most 2^24
elements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

PIECE = {"cpu": 1 << 17, "other": 1 << 24}
GROUP = {"cpu": 1 << 17, "other": 1 << 26}


class Cut:
    """How tensors of `sizes` [P] (elements, local) are cut; the same cut serves all tensors of these sizes."""

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        kind = "cpu" if device.type == "cpu" else "other"
        self.num_places, self.device = len(sizes), device
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.groups: list[list[tuple[int, int]]] = [[]]
        self._piece, self._most = PIECE[kind], 0
        self._index: dict[tuple[int, ...], Tensor] = {}
        self._room: Tensor | None = None
        self._views: dict[tuple[tuple[torch.dtype, int], ...], list[Tensor]] = {}
        filled = 0
        for place, size in enumerate(sizes):
            for number, start in enumerate(range(0, size, self._piece)):
                length = min(size - start, self._piece)
                if self.groups[-1] and filled + length > GROUP[kind]:
                    self.groups.append([])
                    filled = 0
                self.groups[-1].append((place, number))
                filled += length
                self._most = max(self._most, filled)

    def columns(
        self,
        tensors: Sequence[Sequence[Tensor | None]],
        work: Callable[[list[int], list[list[Tensor]]], dict[str, Sequence[Tensor]]],
        *,
        names: Sequence[str],
    ) -> dict[str, Tensor]:
        """Per place, what `work` finds per piece: float64 [P] for each of `names`.

        `tensors` are lists of length P that are read side by side; a place with a None in any of them is left out and
        gets nan. `work(places, pieces)` gets the places of a group and, for every list, its pieces in float32 or
        float64, and returns by name one number per piece: a name that starts with `max_` is combined by maximum, any
        other is summed.
        """
        here = [all(one is not None for one in side) for side in zip(*tensors, strict=True)]
        whole = all(here)
        sides = [[() if t is None else self._split(t) for t in side] for side in tensors]
        places_N: list[int] = []
        found: dict[str, list[Tensor]] = {}
        for group in self.groups:
            if not whole:
                group = [one for one in group if here[one[0]]]
            if not group:
                continue
            places = [place for place, _ in group]
            pieces = [[_wide(side[place][number]) for place, number in group] for side in sides]
            for name, numbers in work(places, pieces).items():
                found.setdefault(name, []).extend(numbers)
            places_N += places
        index_N = self._places(tuple(places_N))
        absent_P = self._absent(tuple(here))
        zero_P = torch.zeros(self.num_places, dtype=self.dtype, device=self.device)
        # A process may hold no element of any place: its share of every sum is 0.
        sums = {name: self._combine(name, found[name], index_N) if found else zero_P for name in names}
        return {name: torch.where(absent_P, torch.nan, sum_P) for name, sum_P in sums.items()}

    def _split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Its pieces, by number: one call for all of them, where a slice each would cost more than the work on it."""
        flat = tensor.reshape(-1)
        return flat.split(self._piece) if flat.numel() > self._piece else (flat,)

    def scratch(self, pieces: Sequence[Tensor]) -> list[Tensor] | None:
        """On a CPU: room for results like `pieces`, the same memory for every group; elsewhere None.

        Fresh memory would be fetched and handed back once per operation and group, page by page.
        """
        if self.device.type != "cpu":
            return None
        key = tuple((piece.dtype, piece.numel()) for piece in pieces)
        if key not in self._views:
            if self._room is None:
                self._room = torch.empty(self._most, dtype=torch.float64)
            rooms = self._room[: sum(size for _, size in key)].split([size for _, size in key])
            self._views[key] = [room.view(dtype)[:size] for room, (dtype, size) in zip(rooms, key, strict=True)]
        return self._views[key]

    def _combine(self, name: str, numbers: list[Tensor], index_N: Tensor) -> Tensor:
        value_N = torch.stack(numbers).to(self.dtype)
        zero_P = torch.zeros(self.num_places, dtype=self.dtype, device=self.device)
        if name.startswith("max_"):
            return zero_P.scatter_reduce(0, index_N, value_N, "amax")
        return zero_P.index_add(0, index_N, value_N)

    def _places(self, places_N: tuple[int, ...]) -> Tensor:
        return self._kept(places_N, torch.int64)

    def _absent(self, here: tuple[bool, ...]) -> Tensor:
        return self._kept(tuple(-1 - int(not there) for there in here), torch.int64) == -2

    def _kept(self, key: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """On the device once: a copy from the host in every step would be a synchronisation in every step."""
        if key not in self._index:
            if len(self._index) > 64:
                self._index.clear()
            self._index[key] = torch.tensor(key, dtype=dtype, device=self.device)
        return self._index[key]


def _wide(piece: Tensor) -> Tensor:
    """In float32 at least: statistics of bf16 tensors are not taken in bf16."""
    return piece if piece.dtype in (torch.float32, torch.float64) else piece.float()
