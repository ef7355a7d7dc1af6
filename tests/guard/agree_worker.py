"""One rank of guarded runs: argv = way (ddp, fsdp), file, troubles. Started by test_agree.py under torchrun."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from aftershock.guard.guard import Guard


def train(way: str, trouble: str) -> dict[str, Any]:
    """40 steps with trouble on rank 1 alone; what this rank did."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    if way == "fsdp":
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
    else:
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    guard = Guard(model, optimizer, clip_norm=1.0, snapshot_every=10)
    data = torch.Generator().manual_seed(rank)
    done = []
    for i, x in enumerate(guard.batches([torch.randn(4, 8, generator=data) for _ in range(40)])):
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        if rank == 1:
            if trouble == "loss" and i in (20, 21, 22):
                loss = loss * math.nan
            if trouble == "number" and i == 20:
                loss.backward()
                guard.step(math.nan)
                continue
        loss.backward()
        if trouble == "cleared" and i == 20 and rank == 1:
            optimizer.zero_grad()
        outcome = guard.step(loss)
        done.append([outcome.taken, type(outcome.action).__name__, outcome.step, outcome.batch_id, outcome.grad_norm])
    weights = [p.detach().full_tensor() if way == "fsdp" else p.detach() for p in model.parameters()]  # pyright: ignore[reportAttributeAccessIssue]
    return {"done": done, "weights": [w.tolist() for w in weights], "steps": guard.step_count, "report": guard.report()}


def main() -> None:
    """Write what happened under each trouble, an error in words included."""
    torch.set_num_threads(1)
    way, out, *troubles = sys.argv[1:]
    dist.init_process_group("gloo")
    found: dict[str, Any] = {}
    for trouble in troubles:
        try:
            found[trouble] = train(way, trouble)
        except ValueError as error:
            found[trouble] = {"error": str(error)}
    Path(f"{out}.{dist.get_rank()}").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # threads of gloo's now and then abort a process that takes its ordinary end


if __name__ == "__main__":
    main()
