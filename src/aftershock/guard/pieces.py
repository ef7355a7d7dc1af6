"""Sharded tensors on disk through torch.distributed.checkpoint: local pieces from the host in, local pieces out.

The pieces lie in host memory, whatever device trains, so no device needs room for a second state; a checkpoint written
by W processes can be read by any other number of them. Both functions are collective.
torch.distributed is imported where it is used. Must not import the recorder.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Size, Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.checkpoint import ChunkStorageMetadata, DefaultLoadPlanner, DefaultSavePlanner
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.metadata import MetadataIndex


class HostPiece(NamedTuple):
    """The `local` part, in host memory, of a tensor of `size`, beginning at `offset`."""

    local: Tensor
    size: tuple[int, ...]
    offset: tuple[int, ...]


def write_pieces(folder: Path, pieces: Mapping[str, HostPiece], group: ProcessGroup | None) -> None:
    """Write the pieces of all ranks as one checkpoint, each element once, synced to the disk."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    local = {name: piece.local for name, piece in pieces.items()}
    try:
        dcp.save(local, checkpoint_id=folder, planner=_save_planner(pieces), process_group=group)
    except CheckpointException as error:  # no Exception: it would pass by every handler
        raise OSError(errno.EIO, f"{folder}: {_reasons(error)}") from error


def read_pieces(folder: Path, pieces: Mapping[str, HostPiece], group: ProcessGroup | None) -> None:
    """Fill the `local` part of each piece from what any number of ranks wrote. Raises ValueError for a missing name."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    local = {name: piece.local for name, piece in pieces.items()}
    try:
        dcp.load(local, checkpoint_id=folder, planner=_load_planner(pieces), process_group=group)
    except CheckpointException as error:
        raise ValueError(f"{folder}: {_reasons(error)}") from error


def _reasons(error: CheckpointException) -> str:
    return "; ".join(f"rank {rank}: {what[0]}" for rank, what in error.failures.items())


def _chunk(piece: HostPiece) -> ChunkStorageMetadata:
    from torch.distributed.checkpoint import ChunkStorageMetadata

    return ChunkStorageMetadata(offsets=Size(piece.offset), sizes=piece.local.shape)


def _save_planner(pieces: Mapping[str, HostPiece]) -> DefaultSavePlanner:
    from torch.distributed.checkpoint import DefaultSavePlanner, SavePlan
    from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
    from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

    class SavePieces(DefaultSavePlanner):
        def create_local_plan(self) -> SavePlan:
            self.plan = SavePlan(
                [
                    WriteItem(
                        index=MetadataIndex(name, Size(piece.offset)),
                        type=WriteItemType.SHARD,
                        tensor_data=TensorWriteData(
                            chunk=_chunk(piece),
                            properties=TensorProperties.create_from_tensor(piece.local),
                            size=Size(piece.size),
                        ),
                    )
                    for name, piece in pieces.items()
                    if piece.local.numel()
                ]
            )
            return self.plan

        def lookup_object(self, index: MetadataIndex) -> Any:
            return pieces[index.fqn].local

    return SavePieces(flatten_state_dict=False, flatten_sharded_tensors=False)


def _load_planner(pieces: Mapping[str, HostPiece]) -> DefaultLoadPlanner:
    from torch.distributed.checkpoint import DefaultLoadPlanner, LoadPlan, TensorStorageMetadata
    from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

    class LoadPieces(DefaultLoadPlanner):
        def create_local_plan(self) -> LoadPlan:
            assert self.metadata is not None
            items = []
            for name, piece in pieces.items():
                stored = self.metadata.state_dict_metadata.get(name)
                if not isinstance(stored, TensorStorageMetadata) or stored.size != Size(piece.size):
                    have = "is not there" if stored is None else "has another shape"
                    raise ValueError(f"{name} {have} in the checkpoint; it is of another model")
                if piece.local.numel():
                    items += create_read_items_for_chunk_list(name, stored, [_chunk(piece)])
            return LoadPlan(items)

        def lookup_tensor(self, index: MetadataIndex) -> Tensor:
            return pieces[index.fqn].local

    return LoadPieces(flatten_state_dict=False, flatten_sharded_tensors=False)
