"""One rank of runs that are killed: argv = folder, kills as ddp:commit. Started by test_durable_ranks.py, by torchrun.

Rank 1 sees three NaN losses, and dies with -9 once in each place named; then it is to be started again. What each rank
did goes to a file.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from aftershock.guard import disk
from aftershock.guard.guard import Guard
from aftershock.guard.state import State, Training

WAYS = ("ddp", "fsdp")
FAULTS = (20, 21, 22)


def _die_once(folder: Path, place: str) -> None:
    """On rank 1, the first time it comes here: as if the machine had lost it."""
    marker = folder / f"died-{place}"
    if dist.get_rank() == 1 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def plant(folder: Path, places: tuple[str, ...]) -> Callable[[], None]:
    """Death in the middle of going back, and in the middle of writing the snapshot behind it; what takes it out."""
    restore, write = Training.restore, disk._write_part
    rewound = False

    def dying_restore(self: Training, state: State, *, rng: bool) -> None:
        nonlocal rewound
        rewound = True
        with torch.no_grad():
            for p in list(self.params.values())[:2]:
                p.fill_(7.0)  # half of it is written
        if "rewind" in places:
            _die_once(folder, "rewind")
        restore(self, state, rng=rng)

    def dying_write(tmp: Path, part: Any, rank: int) -> None:
        if rewound and "commit" in places:
            (tmp / f"rank-{rank}.json").write_text("{")
            _die_once(folder, "commit")
        write(tmp, part, rank)

    def undo() -> None:
        Training.restore, disk._write_part = restore, write

    Training.restore, disk._write_part = dying_restore, dying_write
    return undo


def train(way: str, folder: Path, *, kills: tuple[str, ...]) -> dict[str, Any]:
    """40 batches, from wherever the folder stands."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 1))
    if way == "fsdp":
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
    else:
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(10 + dist.get_rank())
    guard = Guard(
        model, optimizer, clip_norm=1.0, snapshot_every=10, save_every=10, mode="restart", folder=folder, resume=True
    )
    undo = plant(folder, kills)
    data = torch.Generator().manual_seed(dist.get_rank())
    done = []
    for x in guard.batches([torch.randn(4, 8, generator=data) for _ in range(40)]):
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        if dist.get_rank() == 1 and guard.batch_id - 1 in FAULTS:
            loss = loss * math.nan
        loss.backward()
        outcome = guard.step(loss)
        done.append([outcome.taken, type(outcome.action).__name__, outcome.step, outcome.batch_id])
    undo()
    guard.close()
    weights = [p.detach().full_tensor() if way == "fsdp" else p.detach() for p in model.parameters()]  # pyright: ignore[reportAttributeAccessIssue]
    return {
        "done": done,
        "weights": [w.tolist() for w in weights],
        "skips": [list(one[:2]) for one in guard.skips.ranges],
    }


def main() -> None:
    """Each way killed and whole, one after the other."""
    torch.set_num_threads(1)
    top = Path(sys.argv[1])
    dist.init_process_group("gloo")
    found: dict[str, Any] = {}
    for way in WAYS:
        kills = tuple(word.partition(":")[2] for word in sys.argv[2:] if word.startswith(f"{way}:"))
        path = top / f"{way}-cut.{dist.get_rank()}"
        if not path.exists():
            path.write_text(json.dumps(train(way, top / f"{way}-cut", kills=kills)))
        found[f"{way}-cut"] = json.loads(path.read_text())
        dist.barrier()
    for way in WAYS:
        found[f"{way}-whole"] = train(way, top / f"{way}-whole", kills=())
    (top / f"result.{dist.get_rank()}").write_text(json.dumps(found))
    dist.destroy_process_group()
    os._exit(0)  # threads of gloo's now and then abort a process that takes its ordinary end


if __name__ == "__main__":
    main()
