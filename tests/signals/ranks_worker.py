"""Run under torchrun by test_ranks.py: one training, in the way the command line names; its signals to a JSON file."""

from __future__ import annotations

import json
import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from aftershock.signals.activations import ActivationTap
from aftershock.signals.tap import TensorTap
from aftershock.signals.tensors import STATS


def net() -> nn.Sequential:
    """Rows of 5 and 3 do not divide by 2: the shards are uneven, and the bias of one element is on one rank only."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(9, 5), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1))


def main(way: str, out: str) -> None:
    torch.set_num_threads(1)
    world, rank = 1, 0
    model: nn.Module = net()
    if way != "alone":
        dist.init_process_group("gloo")
        world, rank = dist.get_world_size(), dist.get_rank()
    if way == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    if way.startswith("fsdp"):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = (
            init_device_mesh("cpu", (2,))
            if way == "fsdp"
            else init_device_mesh("cpu", (2, 1), mesh_dim_names=("r", "s"))
        )
        for layer in (model[1], model[3]):  # pyright: ignore[reportIndexIssue]
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, betas=(0.8, 0.9))
    mode = "backward" if way in ("alone", "ddp") else "call"
    group = dist.group.WORLD if way != "alone" else None
    rows = []
    with (
        TensorTap(model, optimizer, stats=STATS, gradients=mode) as tap,
        ActivationTap(model, ["1", "3"], optimizer=optimizer, group=group) as outputs,
    ):
        for step in range(3):
            batch = torch.randint(0, 9, (8,), generator=torch.Generator().manual_seed(step))
            _loss(model, batch.chunk(world)[rank]).backward()
            if mode == "call":
                tap.measure_gradients()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    rows = [[a.values, b.values] for a, b in zip(tap.read(), outputs.read(), strict=True)]
    with open(f"{out}.{rank}", "w", encoding="utf-8") as file:
        json.dump({"rows": rows, "notes": tap.notes.sentences}, file)
    if way != "alone":
        dist.destroy_process_group()
        os._exit(0)  # threads of gloo's now and then abort a process that takes its ordinary end


def _loss(model: nn.Module, batch: Tensor) -> Tensor:
    return F.mse_loss(model(batch).flatten(), batch.float() / 9)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
