"""Rank agreement: a few numbers of every process become the same numbers, bit for bit, on all of them.

One all-gather of a short float64 row per call, added up in the order of the ranks. Whatever one process alone knows
(a NaN, a mistake of its user) goes in as a number, so nobody is left waiting in the next collective.
Must not import the guard.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

How = Literal["mean", "sum", "max", "same"]
"""How a number of each rank becomes one. Each lets a NaN of any rank through; "same" must not differ."""


class Ranks:
    """All processes that train one model: `group`, or the default group where one exists, or just this process.

    Example:
        ranks = Ranks(None)
        row = ranks.agree({"loss": (loss, "mean"), "step": (step, "same")})
    """

    def __init__(self, group: ProcessGroup | None) -> None:
        import torch.distributed as dist

        self.group = group
        ready = dist.is_available() and dist.is_initialized()
        if group is not None and not ready:
            raise ValueError("group was given and torch.distributed is not initialised; call init_process_group first")
        self.size = dist.get_world_size(group) if ready else 1
        self.rank = dist.get_rank(group) if ready else 0
        if self.rank < 0:
            raise ValueError("this process is not in the group given; make the guard on its members only")

    def agree(self, row: Mapping[str, tuple[Tensor | float, How]], *, device: torch.device | None = None) -> Tensor:
        """One float64 number per entry of `row`, in its order, the same on every rank; nan where "same" ones differ.

        `device`: where the numbers lie and meet (a GPU's for NCCL). Cost: one all-gather of len(row) numbers a rank,
        none when alone; no synchronisation with the host.
        """
        wide = torch.float32 if device is not None and device.type == "mps" else torch.float64
        own_C = torch.stack(
            [torch.as_tensor(value, dtype=wide, device=device).reshape(()) for value, _ in row.values()]
        )
        if self.size == 1:
            return own_C
        import torch.distributed as dist

        all_WC = own_C.new_empty(self.size * len(row))
        dist.all_gather_into_tensor(all_WC, own_C, group=self.group)
        all_WC = all_WC.view(self.size, len(row))
        # Added rank by rank: a reduction over dim 0 may order its sums by shape.
        total_C = all_WC[0].clone()
        for other_C in all_WC[1:]:
            total_C += other_C
        top_C, low_C = all_WC.amax(0), all_WC.amin(0)
        nan_C = torch.full_like(top_C, float("nan"))
        ways = {
            "mean": total_C / self.size,
            "sum": total_C,
            "max": top_C,
            "same": torch.where(top_C == low_C, top_C, nan_C),
        }
        return torch.stack([ways[how][at] for at, (_, how) in enumerate(row.values())])

    def all_true(self, flag: bool) -> bool:
        """Whether `flag` holds on every rank. Waits for all of them."""
        if self.size == 1:
            return flag
        return bool(self.agree({"no": (float(not flag), "max")}, device=self.device()).item() == 0)

    def device(self) -> torch.device:
        """Where numbers of the host can meet: the CPU with gloo, this process's GPU with NCCL."""
        if self.size > 1:
            import torch.distributed as dist

            if dist.get_backend(self.group) == "nccl":
                return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")
