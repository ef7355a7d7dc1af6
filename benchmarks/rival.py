"""The rival: the decoder of the stability map as most people would write it, one model after another.

Legend: B batch, T positions, D width, H heads, E head dimension.
Eager float32, `scaled_dot_product_attention`, fused AdamW, clip to norm 1, z-loss; but for the initialisation the same
architecture as `aftershock.lab.models.decoder`. Its best mode adds torch.compile and bf16 autocast.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Pre-LayerNorm attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attn_norm = nn.LayerNorm(width, eps=1e-6, bias=False)
        self.mlp_norm = nn.LayerNorm(width, eps=1e-6, bias=False)
        self.q_norm = nn.LayerNorm(width // heads, eps=1e-6, bias=False)
        self.k_norm = nn.LayerNorm(width // heads, eps=1e-6, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x_BTD: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        qkv = self.qkv(self.attn_norm(x_BTD)).view(B, T, 3, self.heads, D // self.heads).transpose(1, 3)
        q, k, v = qkv.unbind(2)
        q, k = rope(self.q_norm(q), cos_TE, sin_TE), rope(self.k_norm(k), cos_TE, sin_TE)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.out(attended.transpose(1, 2).reshape(B, T, D))
        return x_BTD + self.down(F.gelu(self.up(self.mlp_norm(x_BTD)), approximate="tanh"))


class PlainDecoder(nn.Module):
    """Token ids [B, T] to logits [B, T, V]."""

    def __init__(self, *, width: int, depth: int, heads: int, vocab_size: int, context: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6, bias=False)
        self.head = nn.Linear(width, vocab_size, bias=False)
        head_dim = width // heads
        pair_E2 = torch.arange(0, head_dim, 2) / head_dim
        angle_TE = torch.outer(torch.arange(context), 10_000**-pair_E2).repeat(1, 2)
        self.register_buffer("cos_TE", angle_TE.cos())
        self.register_buffer("sin_TE", angle_TE.sin())

    def forward(self, ids_BT: Tensor) -> Tensor:
        x_BTD = self.embed(ids_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD, self.cos_TE, self.sin_TE)
        return self.head(self.norm(x_BTD))


def rope(x: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Rotary positions, the usual way."""
    first, second = x.chunk(2, dim=-1)
    return x * cos_TE.to(x.dtype) + torch.cat([-second, first], dim=-1) * sin_TE.to(x.dtype)


def training_step(
    model: PlainDecoder, *, lr: float, autocast: bool, compiled: bool
) -> Callable[[Tensor, Tensor], Tensor]:
    """A function (ids_BT, targets_BT) -> loss that takes one optimizer step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=1e-4 / lr, fused=True)

    def loss_of(ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        with torch.autocast(ids_BT.device.type, dtype=torch.bfloat16, enabled=autocast):
            logits = model(ids_BT)
        logits = logits.float().flatten(0, 1)
        return F.cross_entropy(logits, targets_BT.flatten()) + 1e-4 * logits.logsumexp(-1).square().mean()

    forward = torch.compile(loss_of) if compiled else loss_of

    def step(ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        loss = forward(ids_BT, targets_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step
