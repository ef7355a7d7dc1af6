"""A tiny decoder with every kind of attention, training that can be compared bit by bit, and real torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

Kernel = Literal["eager", "sdpa"]
SOURCE = Path(__file__).parents[2] / "src"
VOCAB, WIDTH, HEADS, CONTEXT = 17, 12, 3, 8


class Attention(nn.Module):
    """Causal attention, its scores made by hand or inside scaled_dot_product_attention."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self.kernel = kernel
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def scores(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        B, T, _ = x_BTD.shape
        q, k, v = self.qkv(x_BTD).view(B, T, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        hidden = torch.ones(T, T, dtype=torch.bool, device=x_BTD.device).triu(1)
        return (q @ k.mT / k.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf), v

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, _ = x_BTD.shape
        if self.kernel == "eager":
            scores, v = self.scores(x_BTD)
            mixed = F.softmax(scores, dim=-1) @ v
        else:
            q, k, v = self.qkv(x_BTD).view(B, T, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(B, T, -1))


class Block(nn.Module):
    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(WIDTH), Attention(kernel)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attn(self.norm(x_BTD))
        return x_BTD + self.mlp(x_BTD)


class Decoder(nn.Module):
    """Two blocks, dropout included: what measures must not draw from its dice."""

    def __init__(self, kernel: Kernel = "sdpa") -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList([Block(kernel), Block(kernel)])
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.embed(tokens_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.head(x_BTD)


def tokens(step: int, batch: int = 4) -> Tensor:
    return torch.randint(0, VOCAB, (batch, CONTEXT + 1), generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, tokens_BT: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens_BT[:, :-1]).flatten(0, 1), tokens_BT[:, 1:].flatten())


class Kit(NamedTuple):
    """What tests build on: `decoder(kernel, seed=0)`, `tokens(step)`, `loss(model, tokens_BT)`."""

    decoder: Callable[..., Decoder]
    tokens: Callable[..., Tensor]
    loss: Callable[[nn.Module, Tensor], Tensor]


@pytest.fixture
def kit() -> Kit:
    def decoder(kernel: Kernel = "sdpa", seed: int = 0) -> Decoder:
        torch.manual_seed(seed)
        return Decoder(kernel)

    return Kit(decoder, tokens, loss_of)


@pytest.fixture(scope="session")
def torchrun() -> Callable[..., list[Any]]:
    """`torchrun(worker, *args, out, num_processes)`: what each rank wrote to `<out>.<rank>`; 1 is without torchrun."""

    def run(worker: Path, *args: str, out: Path, num_processes: int) -> list[Any]:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
        env = os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, *(launch if num_processes > 1 else []), str(worker), *args, str(out)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-3000:]
        return [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(num_processes)]

    return run
