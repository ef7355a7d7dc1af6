"""Ten steps of a tiny model under each policy that reads tensors, alone or under FSDP2; writes the weights at the end.

Both ranks see the same batches, so the run is the same however many there are.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from aftershock.guard.policies import policy
from aftershock.guard.policies.qk_clip import grouped
from aftershock.guard.policy import Continue, Live, Policy, Seen, SkipStep


def _qk() -> Policy:
    layer = grouped("1", query="1.weight", key="1.weight", heads=2, key_heads=2, width=1, fused=True)
    # The ranks differ: only their maximum is the same on both.
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 1
    return policy("qk_clip", layers=[layer], max_logits=lambda: {"1": [90.0 + 20 * rank, 50.0]})


BUILD: dict[str, Callable[[], Policy]] = {
    "adagc": lambda: policy("adagc", warmup=2),
    "tensor_clip": lambda: policy("tensor_clip", ratio=1.1),
    "unit_clip": lambda: policy("unit_clip"),
    "spam": lambda: policy("spam", period=4, warmup=2, grace=1, threshold=2.0),
    "stable_spam": lambda: policy("stable_spam", period=4),
    "momentum_reset": lambda: policy("momentum_reset", threshold=1.5, cooldown=0),
    "update_clip": lambda: policy("update_clip", arm_after=2),
    "rms_clip": lambda: policy("rms_clip", limit=0.5),
    "stable_adamw": lambda: policy("stable_adamw"),
    "adaptive_lr": lambda: policy("adaptive_lr", window=1, threshold=1.0),
    "decay_switch": lambda: policy("decay_switch", names=("0.weight",), at=0),
    "eps_switch": lambda: policy("eps_switch", eps=1e-3, below=1e9),
    "qk_clip": _qk,
}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # pyright: ignore[reportAttributeAccessIssue]


def train(name: str, *, sharded: bool) -> dict[str, list[float]]:
    """A name that is not in `BUILD` is a run without a policy."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 5), nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
    if sharded:
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
    if name == "update_clip":  # Adam's update hardly grows with a gradient
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95))
    one = BUILD[name]() if name in BUILD else policy("back_off", after=99)
    params = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(1)
    says: list[float] = []
    for step in range(10):
        tokens = torch.randint(9, (6,), generator=generator)
        optimizer.zero_grad()
        (model(tokens).square().mean() * (30.0 if step == 6 else 1.0)).backward()
        grads = [p.grad for p in params.values() if p.grad is not None]
        norm = math.sqrt(sum(float(whole(g).double().square().sum()) for g in grads))
        verdicts = {"grad_norm": "spike"} if step == 6 else {}
        seen = Seen(step, step, 1.0, norm, math.nan, 1e-2, verdicts, None, ())  # pyright: ignore[reportArgumentType]
        live = Live(model, optimizer, params)
        action = one.before_step(seen, live)
        says.append(float(isinstance(action, SkipStep)))
        if isinstance(action, Continue):
            optimizer.step()
            one.after_step(seen, live)
    return {"says": says} | {key: whole(p).detach().flatten().tolist() for key, p in params.items()}


def main() -> None:
    torch.set_num_threads(1)
    out = sys.argv[1]
    torch.distributed.init_process_group("gloo")
    found = {name: train(name, sharded=True) for name in BUILD}
    with open(f"{out}.{torch.distributed.get_rank()}", "w", encoding="utf-8") as file:
        json.dump(found, file)
    torch.distributed.destroy_process_group()
    os._exit(0)  # threads of gloo's now and then abort a process that takes its ordinary end


if __name__ == "__main__":
    main()
