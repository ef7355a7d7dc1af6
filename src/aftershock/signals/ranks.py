"""Which part of a tensor this process holds, and how the parts of all processes become one number.

Legend: P places, C columns, W processes.
Plain tensors (one process, or DDP, where every rank holds the same) need no talk at all. DTensors (FSDP2, tensor
parallel) give the local piece; the packed columns of all places then meet in one all-gather per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Sharding(NamedTuple):
    """`mine_P`: this process counts for the place (one copy of each piece does); `group`: who meets, or None."""

    mine_P: Tensor | None
    group: ProcessGroup | None


def is_sharded(tensor: Tensor) -> bool:
    """Whether `tensor` is a DTensor."""
    if type(tensor) in (Tensor, nn.Parameter):
        return False  # without loading torch.distributed.tensor, which costs seconds
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """The piece of `tensor` that lies here, detached; all of it where it is no DTensor. It may have no elements."""
    if not is_sharded(tensor):
        return tensor.detach()
    return tensor.detach().to_local()  # pyright: ignore[reportAttributeAccessIssue]


def sharding(places: dict[str, Tensor], *, group: ProcessGroup | None = None) -> Sharding:
    """How `places` are spread: over `group`, by default all processes, as soon as one of them is a DTensor.

    The processes of `group` must hold pieces of the same places (with pipeline parallelism: those of one stage).
    Raises ValueError for a place whose DTensor waits for a sum (Partial): its pieces are not parts of one tensor.
    """
    if not any(is_sharded(tensor) for tensor in places.values()):
        return Sharding(None, None)
    import torch.distributed as dist

    members = dist.group.WORLD if group is None else group
    assert members is not None, "a DTensor exists without a process group"
    first = dist.get_rank(members) == 0
    mine = [_counts_here(name, tensor) if is_sharded(tensor) else first for name, tensor in places.items()]
    device = local(next(iter(places.values()))).device
    return Sharding(torch.tensor(mine, device=device), members)


def meet(columns_PC: Tensor, how: Sequence[str], spread: Sharding) -> Tensor:
    """The columns over all processes: "sum" or "max" as `how` says for each; shape P,C, the same on every rank.

    Cost: one all-gather of W*P*C float64, and nothing at all where no place is sharded. Ranks are added in their order,
    so every rank has the same bits.
    """
    if spread.group is None:
        return columns_PC
    import torch.distributed as dist

    mine = spread.mine_P
    assert mine is not None
    is_sum = [kind == "sum" for kind in how]
    # 0 is neutral for both: every maximum here is one of absolute values.
    own_PC = torch.where(mine[:, None], columns_PC, 0.0).contiguous()
    world = dist.get_world_size(spread.group)
    all_WPC = own_PC.new_empty(world * own_PC.shape[0], own_PC.shape[1])
    dist.all_gather_into_tensor(all_WPC, own_PC, group=spread.group)
    all_WPC = all_WPC.view(world, *own_PC.shape)
    summed, top = all_WPC.sum(0), all_WPC.amax(0)
    return torch.stack([summed[:, c] if is_sum[c] else top[:, c] for c in range(len(how))], dim=1)


def _counts_here(name: str, tensor: Tensor) -> bool:
    """True on the one process per piece that speaks for it: the first along every axis that only repeats it."""
    mesh, coordinate = tensor.device_mesh, tensor.device_mesh.get_coordinate()  # pyright: ignore[reportAttributeAccessIssue]
    placements = tensor.placements  # pyright: ignore[reportAttributeAccessIssue]
    if any(placement.is_partial() for placement in placements):
        raise ValueError(
            f"{name} is a DTensor with a pending sum (Partial) over {mesh}; redistribute it before measuring"
        )
    if coordinate is None:
        return False
    return all(at == 0 for at, placement in zip(coordinate, placements, strict=True) if placement.is_replicate())
