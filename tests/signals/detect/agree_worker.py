"""Run under torchrun by test_agree.py: every detector on what the ranks agree on, and on what this rank alone sees."""

from __future__ import annotations

import json
import math
import os
import random
import sys

import torch
import torch.distributed as dist

from aftershock.signals.detect.registry import DETECTORS, OURS, detector
from aftershock.signals.ranks import Sharding, meet

STEPS, SPIKES_AT, NAN_AT = 420, (200, 201, 202, 203, 204), 300


def losses(rank: int) -> list[float]:
    """Each rank's own noise; on rank 1 five spikes and, later, one NaN, which rank 0 does not see."""
    rng = random.Random(rank)
    found = [rng.gauss(2.2, 0.02) for _ in range(STEPS)]
    if rank == 1:
        found[NAN_AT] = math.nan
        for step in SPIKES_AT:
            found[step] = 50.0
    return found


def main(out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world, rank = dist.get_world_size(), dist.get_rank()
    spread = Sharding(torch.ones(1, dtype=torch.bool), dist.group.WORLD)
    rules = {name: detector(name) for name in DETECTORS}
    together, alone = ({name: rule.init() for name, rule in rules.items()} for _ in range(2))
    verdicts: dict[str, dict[str, list[str]]] = {name: {"together": [], "alone": []} for name in rules}
    values: list[str] = []
    num_answers = 0
    for own in losses(rank):
        agreed = float(meet(torch.tensor([[own]], dtype=torch.float64), ["sum"], spread)[0, 0]) / world
        values.append(agreed.hex())
        for name, rule in rules.items():
            together[name], verdict = rule.update(together[name], agreed)
            verdicts[name]["together"].append(verdict)
            alone[name], verdict = rule.update(alone[name], own)
            verdicts[name]["alone"].append(verdict)
        if verdicts[OURS]["together"][-1] != "ok":
            # What an answer to an alarm does: talk to the others, which waits for ever if they saw none.
            dist.barrier()
            num_answers += 1
    with open(f"{out}.{rank}", "w", encoding="utf-8") as file:
        found = {"values": values, "verdicts": verdicts, "num_answers": num_answers}
        json.dump(found | {"nan_at": NAN_AT, "spikes_at": SPIKES_AT}, file)
    dist.destroy_process_group()
    os._exit(0)  # threads of gloo's now and then abort a process that takes its ordinary end


if __name__ == "__main__":
    main(sys.argv[1])
