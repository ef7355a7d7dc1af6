"""Run by test_disk.py: trainings with snapshots in memory and on disk; what they saw to a JSON file.

Under torchrun, DDP and FSDP2 one after the other; without it, one process reads what the two of FSDP2 wrote.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from aftershock.guard.disk import restore_from
from aftershock.guard.recorder import FlightRecorder
from aftershock.guard.shelf import newest
from aftershock.guard.state import Training
from aftershock.signals.ranks import is_sharded


class Odd:
    """State that differs from rank to rank, and on one of them cannot be written."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def build(way: str) -> Training:
    """Rows of 5 and 3 do not divide by 2, and the bias of one element lies on one rank only."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(
        nn.Embedding(9, 5), nn.Linear(5, 3), nn.Dropout(0.3), nn.BatchNorm1d(3), nn.Linear(3, 1)
    )
    if way == "ddp":
        model = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    else:
        from torch.distributed.fsdp import fully_shard

        fully_shard(model[1])
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    return Training(model, optimizer, scheduler=schedule, extra={"odd": Odd(dist.get_rank())})


def train(training: Training, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        batch = torch.randint(0, 9, (8,), generator=torch.Generator().manual_seed(step))
        part = batch.chunk(dist.get_world_size())[dist.get_rank()]
        loss = F.mse_loss(training.model(part).flatten(), part.float() / 9)
        loss.backward()
        training.optimizer.step()
        training.scheduler.step()  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
        training.optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def whole(training: Training) -> dict[str, Tensor]:
    """Parameters and moments, unsharded."""
    found: dict[str, Any] = dict(training.params)
    for name, parameter in training.params.items():
        found |= {f"{name}/{key}": value for key, value in training.optimizer.state[parameter].items()}
    return {name: (t.full_tensor() if is_sharded(t) else t).detach().clone() for name, t in found.items()}


def refused(work: Any) -> str:
    try:
        work()
    except (ValueError, OSError) as error:
        return str(error)
    raise AssertionError("nothing was refused")


def main(way: str, folder: Path) -> dict[str, Any]:
    training = build(way)
    torch.manual_seed(100 + dist.get_rank())
    recorder = FlightRecorder(training)
    fresh = recorder.take(0, 0)
    train(training, 0, 3)
    kept = recorder.take(3, 3)
    path = recorder.save(folder, 3)
    everything = whole(training)
    if dist.get_rank() == 0:
        torch.save(everything, folder / "whole.pt")
    losses = train(training, 3, 7)
    recorder.restore(3, rng=True)
    again = train(training, 3, 7)
    other = build(way)
    other.extra["odd"].value = 77  # pyright: ignore[reportAttributeAccessIssue]
    at = restore_from(folder, other)
    resumed = train(other, 3, 7)
    odd = other.extra["odd"].value  # pyright: ignore[reportAttributeAccessIssue]
    recorder.restore(0, rng=False)
    emptied = len(training.optimizer.state)

    training.extra["odd"] = Odd(print if dist.get_rank() == 1 else 1)
    recorder.take(1, 1)
    unwritable = refused(lambda: recorder.save(folder, 1))
    survivors = sorted(p.name for p in folder.glob("snap-*"))
    sizes = [(path / f"rank-{rank}.safetensors").stat().st_size for rank in range(2)]
    dist.barrier()
    file = path / "rank-1.safetensors"
    whole_file = file.read_bytes()
    dist.barrier()
    if dist.get_rank() == 0:
        file.write_bytes(whole_file[:-1] + bytes([whole_file[-1] ^ 1]))
    dist.barrier()
    damaged = refused(lambda: restore_from(path, other))
    none_left = refused(lambda: newest(folder))
    dist.barrier()
    if dist.get_rank() == 0:
        file.write_bytes(whole_file)
    return {
        "losses": losses,
        "again": again,
        "resumed": resumed,
        "at": list(at),
        "odd": odd,
        "emptied": emptied,
        "unwritable": unwritable,
        "survivors": survivors,
        "damaged": damaged,
        "none_left": none_left,
        "sizes": sizes,
        "taken": [fresh, kept],
    }


def alone(folder: Path) -> dict[str, Any]:
    """What two processes wrote, in one: same numbers in another layout."""
    training = build("fsdp")
    words = refused(lambda: restore_from(folder, training))
    restore_from(folder, training, rng=False)
    then = torch.load(folder / "whole.pt")
    now = whole(training)
    return {
        "words": words,
        "same": {n: torch.equal(then[n], now[n]) for n in then | now},
        "loss": train(training, 3, 5),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    top = Path(sys.argv[1])
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        result = {way: main(way, top / way) for way in ("ddp", "fsdp")}
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        result = alone(top / "fsdp")
    (top / f"{dist.get_world_size()}.{dist.get_rank()}").write_text(json.dumps(result), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # threads of gloo's now and then abort a process that takes its ordinary end
