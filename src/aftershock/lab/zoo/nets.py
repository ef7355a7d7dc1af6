"""Small plain modules that the recipes of the zoo share, and what they are trained on.

Legend: B sequences, T positions, S keys, H heads, E head width, D width, V vocabulary, N examples, F hidden units.
Everything random is drawn under `seeded`, so a seed gives the same weights whatever was drawn before. A batch is a
pure function of (seed, index). Must not import specimens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aftershock.lab.data import Batch, LanguageBatches, load_tokens
from aftershock.lab.recipe import LanguageData

Net = TypeVar("Net", bound=nn.Module)
Kernel = Literal["sdpa", "explicit"]

CONTEXT = 64


def seeded(seed: int, make: Callable[[], Net]) -> Net:
    """`make()` with torch's random numbers started at `seed`; afterwards they stand where they stood before."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return make()


# ------------------------------------------------------------------------------------------------------ language


class Tokens(NamedTuple):
    """`inputs_BT`, and `targets_BT`: the byte after each; int64."""

    inputs_BT: Tensor
    targets_BT: Tensor


class Text:
    """Windows of the interpreter's own library source, as bytes: `batch(i)` depends on the seed and i alone.

    Example:
        text = Text(seed=0, batch_size=8)
        inputs_BT, targets_BT = text.batch(3)
    """

    def __init__(self, *, seed: int, batch_size: int, context: int = CONTEXT) -> None:
        self._seed, self._size, self._batches = np.array([seed]), batch_size, _windows(context)

    def batch(self, index: int) -> Tokens:
        return _tokens(self._batches.train(self._seed, index, self._size))

    def held_out(self, num_sequences: int = 32) -> Tokens:
        """The same for every seed: evenly spaced windows of files that no batch holds."""
        return _tokens(self._batches.eval(num_sequences))


@functools.cache
def _windows(context: int) -> LanguageBatches:
    config = LanguageData(context=context)
    return LanguageBatches(config, load_tokens(config))


def _tokens(batch: Batch) -> Tokens:
    return Tokens(batch.inputs_KBT[0], batch.targets_KBT[0])


class ByteLM(nn.Module):
    """A pre-norm decoder over bytes with learned positions and a separate head: 43k parameters at the defaults.

    - `qk_norm`: LayerNorm over each head of q and k (Dehghani et al. 2023): bounds the attention logits
    - `attention`: "sdpa" is torch's fused kernel; "explicit" is matmul, softmax, matmul
    - `softmax_dtype`: what the explicit softmax is taken in; the scores are cast to it, its result cast back
    - `embedding_std`: of the token and position tables at the start
    - `watch`: set it, and `max_logit()` tells the largest attention logit of the last forward pass

    Forward: tokens [B, T] to logits [B, T, V].
    """

    def __init__(
        self,
        *,
        width: int = 32,
        depth: int = 2,
        heads: int = 2,
        context: int = CONTEXT,
        vocab_size: int = 256,
        qk_norm: bool = False,
        dropout: float = 0.0,
        attention: Kernel = "sdpa",
        softmax_dtype: torch.dtype = torch.float32,
        embedding_std: float = 0.02,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width)
        self.position = nn.Embedding(context, width)
        for table in (self.embed, self.position):
            nn.init.normal_(table.weight, std=embedding_std)
        self.blocks = nn.ModuleList(
            Block(
                width,
                Attention(
                    width,
                    heads=heads,
                    qk_norm=qk_norm,
                    dropout=dropout,
                    kernel=attention,
                    softmax_dtype=softmax_dtype,
                ),
                dropout=dropout,
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size, bias=False)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.embed(tokens_BT) + self.position.weight[: tokens_BT.shape[1]]
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.head(self.norm(x_BTD))

    @property
    def watch(self) -> bool:
        return all(attention.watch for attention in self._attentions())

    @watch.setter
    def watch(self, on: bool) -> None:
        for attention in self._attentions():
            attention.watch = on
            attention.seen = None

    def max_logit(self) -> float:
        """The largest q k / sqrt(E) that a query could see in the last forward pass, over layers, heads and batch.

        Computed beside the training, from copies of q and k. Raises ValueError when `watch` was not set before it.
        """
        seen = [attention.seen for attention in self._attentions()]
        if any(pair is None for pair in seen):
            raise ValueError("no forward pass was watched; set model.watch = True, run the model, and ask again")
        return max(_max_score(*pair) for pair in seen if pair is not None)

    def _attentions(self) -> list[Attention]:
        return [module for module in self.modules() if isinstance(module, Attention)]


class Block(nn.Module):
    """x + attention(norm x), then x + mlp(norm x); the mlp is four times as wide, with GELU."""

    def __init__(self, width: int, attention: Attention, *, dropout: float) -> None:
        super().__init__()
        self.norm_attention, self.attention = nn.LayerNorm(width), attention
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attention(self.norm_attention(x_BTD))
        return x_BTD + self.mlp(self.norm_mlp(x_BTD))


class Attention(nn.Module):
    """Causal multi-head attention; what its arguments mean stands at `ByteLM`."""

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        qk_norm: bool,
        dropout: float,
        kernel: Kernel,
        softmax_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        if kernel == "sdpa" and softmax_dtype != torch.float32:
            raise ValueError(f"softmax_dtype={softmax_dtype} needs attention='explicit'; sdpa chooses its own")
        self.heads, self.kernel, self.softmax_dtype = heads, kernel, softmax_dtype
        self.query_key = nn.Linear(width, 2 * width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.norm_q = nn.LayerNorm(width // heads, bias=False) if qk_norm else nn.Identity()
        self.norm_k = nn.LayerNorm(width // heads, bias=False) if qk_norm else nn.Identity()
        self.watch = False
        self.seen: tuple[Tensor, Tensor] | None = None

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        q, k = self.query_key(x_BTD).view(B, T, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        v_BHTE = self.value(x_BTD).view(B, T, self.heads, -1).transpose(1, 2)
        q_BHTE, k_BHSE = self.norm_q(q), self.norm_k(k)
        if self.watch:
            self.seen = q_BHTE.detach(), k_BHSE.detach()
        if self.kernel == "sdpa":
            mixed_BHTE = F.scaled_dot_product_attention(q_BHTE, k_BHSE, v_BHTE, is_causal=True)
        else:
            scores_BHTS = _scores(q_BHTE, k_BHSE).to(self.softmax_dtype)
            mixed_BHTE = scores_BHTS.softmax(-1).to(v_BHTE.dtype) @ v_BHTE
        return self.dropout(self.out(mixed_BHTE.transpose(1, 2).reshape(B, T, D)))


def _scores(q_BHTE: Tensor, k_BHSE: Tensor) -> Tensor:
    """q k / sqrt(E), and -inf where the key is later than the query."""
    scores_BHTS = q_BHTE @ k_BHSE.transpose(-1, -2) / math.sqrt(q_BHTE.shape[-1])
    later_TS = torch.ones(scores_BHTS.shape[-2:], dtype=torch.bool).triu(1)
    return scores_BHTS.masked_fill(later_TS, -torch.inf)


@torch.no_grad()
def _max_score(q_BHTE: Tensor, k_BHSE: Tensor) -> float:
    return float(_scores(q_BHTE, k_BHSE).max())


def token_loss(model: nn.Module, batch: Tokens, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Mean cross-entropy over all positions, nats; logits are cast to `dtype` first, and the result back to float32."""
    logits_NV = model(batch.inputs_BT).flatten(0, 1)
    if logits_NV.dtype == torch.float64:
        return F.cross_entropy(logits_NV, batch.targets_BT.flatten())
    return F.cross_entropy(logits_NV.to(dtype), batch.targets_BT.flatten()).float()


# ---------------------------------------------------------------------------------------------------- regression


class Curve(NamedTuple):
    """Points of a curve: `x_N1` and `y_N1`."""

    x_N1: Tensor
    y_N1: Tensor


def two_sines(num_points: int = 200) -> Curve:
    """y = sin x + sin 4x at evenly spaced points of [-pi, pi]."""
    x_N1 = torch.linspace(-math.pi, math.pi, num_points)[:, None]
    return Curve(x_N1, x_N1.sin() + (4 * x_N1).sin())


class TanhNet(nn.Module):
    """One hidden tanh layer, 1-F-1, its input layer drawn from N(0, 1), its output layer from N(0, 1/F)."""

    def __init__(self, hidden: int = 100) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(1, hidden), nn.Linear(hidden, 1)
        nn.init.normal_(self.inner.weight)
        nn.init.normal_(self.inner.bias)
        nn.init.normal_(self.outer.weight, std=hidden**-0.5)
        nn.init.zeros_(self.outer.bias)

    def forward(self, x_N1: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(x_N1)))


def curve_loss(model: nn.Module, batch: Curve) -> Tensor:
    """Mean squared error."""
    return F.mse_loss(model(batch.x_N1), batch.y_N1)


# ------------------------------------------------------------------------------------------------------- modular


class Sums(NamedTuple):
    """Operands `a_N`, `b_N` and `sum_N` = (a + b) mod p; int64."""

    a_N: Tensor
    b_N: Tensor
    sum_N: Tensor


def sums(modulus: int, *, seed: int, train_frac: float = 0.5) -> tuple[Sums, Sums]:
    """All pairs mod `modulus`, split at random by `seed`: those to train on, and those held out."""
    order = torch.randperm(modulus**2, generator=torch.Generator().manual_seed(seed))
    a_N, b_N = order // modulus, order % modulus
    cut = round(train_frac * modulus**2)
    whole = Sums(a_N, b_N, (a_N + b_N) % modulus)
    return Sums(*(column[:cut] for column in whole)), Sums(*(column[cut:] for column in whole))


class ModularMlp(nn.Module):
    """Embeddings of a and of b, side by side, one hidden ReLU layer, and a head over the residues: N,N -> [N, V]."""

    def __init__(self, modulus: int, *, embed: int = 64, hidden: int = 128) -> None:
        super().__init__()
        self.embed_a, self.embed_b = nn.Embedding(modulus, embed), nn.Embedding(modulus, embed)
        self.hidden = nn.Linear(2 * embed, hidden)
        self.head = nn.Linear(hidden, modulus, bias=False)

    def forward(self, a_N: Tensor, b_N: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(torch.cat([self.embed_a(a_N), self.embed_b(b_N)], dim=-1))))


def sum_loss(model: nn.Module, batch: Sums) -> Tensor:
    """Mean cross-entropy, nats, in the model's own precision."""
    return F.cross_entropy(model(batch.a_N, batch.b_N), batch.sum_N)
