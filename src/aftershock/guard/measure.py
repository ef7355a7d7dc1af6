"""The norms that the guard decides on: of all gradients before clipping, and of the update just taken.

Everything stays on the device as 0-dim tensors; nothing here waits for it. Sharded tensors count with the piece that
lies here, and `agree` adds the pieces. Must not import the guard.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from aftershock.signals.ranks import local, sharding

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SAMPLE = 1 << 20
"""Elements of the whole model that the update is measured on, at least: the norm's standard error is then about
sqrt((kurtosis - 1) / SAMPLE) / 2, below 0.2 % for any plausible update."""
RUNS = 4
"""Contiguous runs that a tensor's sample is made of, evenly spread: a few rows of every part of a fused weight."""

LOW = (torch.float16, torch.bfloat16)


class Gradients:
    """Norm and clipping of all gradients of `params`; those without one today are left out, sparse ones work.

    Cost of `norm`: one read of the gradients, 0.27 ns a float32 parameter on one core.
    """

    def __init__(self, params: Mapping[str, Tensor], *, group: ProcessGroup | None = None) -> None:
        self._params = list(params.values())
        spread = sharding(dict(params), group=group)
        self.sharded = spread.group is not None
        self._mine = [True] * len(params) if spread.mine_P is None else [bool(one) for one in spread.mine_P.tolist()]

    def present(self) -> bool:
        """Whether any parameter has a gradient."""
        return any(p.grad is not None for p in self._params)

    def squares(self) -> Tensor:
        """What this rank adds to the squared norm: the sum over its own pieces. nan and inf are carried on."""
        return _norm(self._values(only_mine=True), device=self._device()).square()

    def norm(self) -> Tensor:
        """The norm of what lies here; that of all gradients where nothing is sharded.

        Squares are taken in float32 at least, so a gradient element beyond 1e19 counts as infinite. The same bits as
        `torch.nn.utils.clip_grad_norm_` returns for float32 gradients.
        """
        return _norm(self._values(only_mine=False), device=self._device())

    def clip(self, norm: Tensor, *, limit: float, known: bool) -> None:
        """Scale gradients of norm `norm` down to `limit`, in place; the arithmetic of torch's `clip_grad_norm_`.

        With `known`, the host may look at `norm` (it lies on the CPU), and nothing is written where nothing is clipped.
        Never call it with a norm that is not finite: every gradient would become so.
        """
        factor = torch.clamp(limit / (norm + 1e-6), max=1.0)
        if known and factor.item() >= 1.0:
            return
        grads = self._values(only_mine=False, for_writing=True)
        for kind in {g.dtype for g in grads}:
            same = [g for g in grads if g.dtype == kind]
            torch._foreach_mul_(same, factor.to(same[0].device))

    def _device(self) -> torch.device:
        return local(self._params[0]).device

    def _values(self, *, only_mine: bool, for_writing: bool = False) -> list[Tensor]:
        found = []
        for p, mine in zip(self._params, self._mine, strict=True):
            if p.grad is None or (only_mine and not mine):
                continue
            if not p.grad.is_sparse:
                found.append(local(p.grad))
            elif for_writing:
                found.append(p.grad._values())  # scaling the summands scales the sum
            else:
                found.append(p.grad.detach().coalesce().values())  # repeated rows add up before they are squared
        return found


class Sampled(NamedTuple):
    """One run of one tensor: `start` and `length` in its memory, and how many elements each of its own stands for."""

    place: int
    start: int
    length: int
    weight: float


class Updates:
    """The norm of what the optimizer really did to the parameters, whatever it is: new minus old, on a fixed sample.

    norm^2 = sum over tensors of numel/sampled * sum over the sample of (new - old)^2. "sample" takes evenly spread runs
    of every tensor, `SAMPLE` elements in all or more, and is exact for models up to that size: a constant cost of 1-2
    ms on one core, 0.015 ns a parameter at 100M, and 4 MB of memory. "all" takes every element: about 2.2 ns a
    parameter, and one copy of them. A rate or state fault moves all elements alike, so a sample shows it as well.
    """

    def __init__(self, params: Mapping[str, Tensor], *, how: Literal["sample", "all"] = "sample") -> None:
        self._params = list(params.values())
        spread = sharding(dict(params))
        mine = [True] * len(params) if spread.mine_P is None else [bool(one) for one in spread.mine_P.tolist()]
        sizes = [local(p).numel() if own else 0 for p, own in zip(self._params, mine, strict=True)]
        share = 1.0 if how == "all" else min(1.0, SAMPLE / max(1, sum(sizes)))
        self._runs = [run for place, size in enumerate(sizes) for run in _spread(place, size, share)]
        device = local(self._params[0]).device
        # Squares are added in double where there is one; a weight is a count, exact in either.
        self._weight_N = torch.tensor([run.weight for run in self._runs], dtype=_wide(device), device=device)
        self._before: list[Tensor] = []
        self._views: list[Tensor] = []
        self._where: list[int] = []

    @torch.no_grad()
    def before(self) -> None:
        """Remember the parameters as they are."""
        views = self._look()
        if not self._before:
            self._before = [torch.empty(v.shape, dtype=_at_least_single(v.dtype), device=v.device) for v in views]
        if views:
            torch._foreach_copy_(self._before, views)

    @torch.no_grad()
    def squares(self) -> Tensor:
        """What this rank adds to the squared norm of the change since `before`; the copy is used up."""
        if not self._runs:
            return torch.zeros((), dtype=self._weight_N.dtype, device=self._weight_N.device)
        views = self._look()
        torch._foreach_sub_(self._before, views)
        norms = torch._foreach_norm(self._before, 2.0)
        return (torch.stack(norms).to(self._weight_N.dtype).square() * self._weight_N).sum()

    def _look(self) -> list[Tensor]:
        """The sampled runs as views. Made once, and again where a parameter's memory has moved."""
        where = [p.data_ptr() if type(p) in (Tensor, torch.nn.Parameter) else -1 for p in self._params]
        if where != self._where or -1 in where:
            flats = [_flat(local(p)) for p in self._params]
            self._views = [flats[run.place][run.start : run.start + run.length] for run in self._runs]
            self._where = where
        return self._views


def _spread(place: int, size: int, share: float) -> list[Sampled]:
    """RUNS evenly spread runs of at least 256 elements each, or the whole tensor where that is most of it."""
    if size == 0:
        return []
    length = max(256, -(-int(size * share) // RUNS))
    if length * RUNS >= size or share >= 1:
        return [Sampled(place, 0, size, 1.0)]
    gap = (size - length) // (RUNS - 1)
    return [Sampled(place, k * gap, length, size / (length * RUNS)) for k in range(RUNS)]


def _flat(piece: Tensor) -> Tensor:
    """All elements as one view in the order of memory; channels_last and the like included."""
    if piece.is_contiguous():
        return piece.view(-1)
    if torch.ops.aten.is_non_overlapping_and_dense.default(piece):
        return torch.as_strided(piece, (piece.numel(),), (1,))
    raise ValueError(
        f"a parameter of shape {tuple(piece.shape)} and strides {piece.stride()} has holes in its memory; "
        "make it contiguous before the optimizer is built"
    )


def _norm(tensors: Sequence[Tensor], *, device: torch.device) -> Tensor:
    if not tensors:
        return torch.zeros((), device=device)
    low = any(t.dtype in LOW for t in tensors)
    norms = [
        norm.to(device)
        for part in _by_device(tensors)
        for norm in (torch._foreach_norm(part, 2.0, dtype=torch.float32) if low else torch._foreach_norm(part, 2.0))
    ]
    return torch.linalg.vector_norm(torch.stack(norms), 2.0)


def _by_device(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    parts: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        parts.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return list(parts.values())


def _at_least_single(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in LOW else dtype


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
