"""The decoder of Wortsman et al. 2023 (arXiv 2309.14322, section 2.1) for K replicas at once, with all its knobs.

Legend: K replicas, B batch, T positions, N = B*T tokens, D width, H heads, E head dimension, F hidden, V vocabulary.
Pre-LayerNorm, rotary positions after qk-layernorm, GELU MLP, untied head, no biases. Matmuls run in the `matmul` dtype;
parameters, residual stream and LayerNorm statistics in the `params` dtype; the head in the `logits` dtype.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from aftershock.lab.models.layout import ParamSpec
from aftershock.lab.models.ops import attend, causal_mask, gelu_tanh, norm, rotary_tables, rotate
from aftershock.lab.models.probe import Probe
from aftershock.lab.recipe import DecoderConfig, PrecisionConfig


class Dtypes(NamedTuple):
    """The three compute dtypes of a `PrecisionConfig`."""

    params: torch.dtype
    matmul: torch.dtype
    logits: torch.dtype
    loss: torch.dtype


def dtypes(config: PrecisionConfig) -> Dtypes:
    """torch dtypes of the four settings, `params` resolved."""
    params = getattr(torch, config.params)
    matmul, logits = (params if name == "params" else getattr(torch, name) for name in (config.matmul, config.logits))
    return Dtypes(params, matmul, logits, getattr(torch, config.loss))


class Decoder:
    """Maps token ids to logits. Holds the config and constant tables, never parameters: those are the fleet's state."""

    def __init__(
        self, config: DecoderConfig, *, vocab_size: int, context: int, precision: PrecisionConfig, device: torch.device
    ) -> None:
        self.config, self.vocab_size, self.context = config, vocab_size, context
        self.dtypes = dtypes(precision)
        self.rotary = rotary_tables(context, config.head_dim, config.rope_base, dtype=self.dtypes.matmul, device=device)
        self.mask_TS = causal_mask(context, dtype=self.dtypes.matmul, device=device)
        inverse = config.attention_scale == "inverse" or config.mup == "full"
        self.attention_scale = 1 / config.head_dim if inverse else config.head_dim**-0.5
        self.softmax_dtype = torch.promote_types(torch.float32, self.dtypes.matmul)

    def specs(self) -> list[ParamSpec]:
        """Matrices: truncated normal of std 1/sqrt(fan_in). Embedding: normal of std 1/sqrt(D). Gains: ones."""
        c = self.config
        D, E, F_ = c.width, c.head_dim, c.width * c.mlp_ratio
        ratio = c.mup_base_width / D  # base_fan_in / fan_in of every matrix: MLP-out has a factor of mlp_ratio in both
        lr_scale = 1.0 if c.mup == "off" else ratio
        head_std = D**-0.5 if c.mup in ("off", "simple") else math.sqrt(c.mup_base_width) / D
        specs = [ParamSpec("embed", (self.vocab_size, D), "params", D**-0.5, truncated=False)]
        for i in range(c.depth):
            at = f"blocks.{i}"
            specs += [ParamSpec(f"{at}.attn.norm", (D,), "params", None)]
            if c.qk_norm != "off":
                gain = (E,) if c.qk_norm == "head" else (D,)
                specs += [ParamSpec(f"{at}.attn.{which}_gain", gain, "params", None) for which in "qk"]
            if c.mup == "full":  # q starts at zero, so it cannot share a draw with k and v
                specs += [
                    ParamSpec(f"{at}.attn.q", (D, D), "matmul", 0, lr_scale=lr_scale),
                    ParamSpec(f"{at}.attn.kv", (D, 2 * D), "matmul", D**-0.5, lr_scale=lr_scale),
                ]
            else:
                specs += [ParamSpec(f"{at}.attn.qkv", (D, 3 * D), "matmul", D**-0.5, lr_scale=lr_scale)]
            specs += [
                ParamSpec(f"{at}.attn.out", (D, D), "matmul", D**-0.5, lr_scale=lr_scale),
                ParamSpec(f"{at}.mlp.norm", (D,), "params", None),
                ParamSpec(f"{at}.mlp.in", (D, F_), "matmul", D**-0.5, lr_scale=lr_scale),
                ParamSpec(f"{at}.mlp.out", (F_, D), "matmul", F_**-0.5, lr_scale=lr_scale),
            ]
        specs += [
            ParamSpec("final_norm", (D,), "params", None),
            ParamSpec("head", (D, self.vocab_size), "logits", head_std, lr_scale=lr_scale),
        ]
        return specs

    def __call__(self, params: Mapping[str, Tensor], inputs_KBT: Tensor, probe: Probe | None = None) -> Tensor:
        """Logits [K, N, V] of token ids [K, B, T]. `probe`, if given, sees the insides; the result is the same bits."""
        K, B, T = inputs_KBT.shape
        x_KND = _lookup(params["embed"], inputs_KBT.reshape(K, B * T))
        for i in range(self.config.depth):
            x_KND = x_KND + self._attention(i, params, x_KND, B, T, probe)
            x_KND = x_KND + self._mlp(i, params, x_KND)
            if probe is not None:
                probe.output(i, x_KND)
        return torch.bmm(self._norm(x_KND, params["final_norm"], self.dtypes.logits), params["head"])

    def _norm(self, x_KND: Tensor, gain_KD: Tensor, dtype: torch.dtype) -> Tensor:
        return norm(x_KND, gain_KD[:, None], eps=self.config.norm_eps, dtype=dtype)

    def _attention(
        self, i: int, params: Mapping[str, Tensor], x_KND: Tensor, B: int, T: int, probe: Probe | None
    ) -> Tensor:
        c, at = self.config, f"blocks.{i}.attn"
        K = x_KND.shape[0]
        h_KND = self._norm(x_KND, params[f"{at}.norm"], self.dtypes.matmul)
        if c.mup == "full":
            qkv_KNC = torch.cat([torch.bmm(h_KND, params[f"{at}.{name}"]) for name in ("q", "kv")], dim=-1)
        else:
            qkv_KNC = torch.bmm(h_KND, params[f"{at}.qkv"])
        q, k, v = qkv_KNC.view(K, B, T, 3, c.heads, c.head_dim).unbind(3)
        if c.qk_norm != "off":
            q, k = (self._qk_norm(x, params[f"{at}.{name}_gain"]) for x, name in ((q, "q"), (k, "k")))
        if c.logit_scale is not None:
            q, k = (_scaled_to(x, c.logit_scale, c.norm_eps) for x in (q, k))
        cos_TE, sin_TE = (table[:T] for table in self.rotary)
        # The attention scale rides on the rotary tables of q: one pass less over the tokens.
        q_KBHTE = rotate(q, cos_TE * self.attention_scale, sin_TE * self.attention_scale)
        k_KBHTE = rotate(k, cos_TE, sin_TE)
        softmax = c.attention == "softmax"
        tap = None
        if probe is not None:
            tap = probe.attention(i, q_KBHTE, k_KBHTE, scale=self.attention_scale, softmax=softmax)
        out_KBTHE = attend(
            q_KBHTE,
            k_KBHTE,
            v.transpose(2, 3),
            mask_TS=self.mask_TS[:T, :T],
            softmax=softmax,
            dtype=self.softmax_dtype,
            tap=tap,
        )
        return torch.bmm(out_KBTHE.view(K, B * T, c.width), params[f"{at}.out"])

    def _qk_norm(self, x_KBTHE: Tensor, gain: Tensor) -> Tensor:
        """qk-layernorm per head, its gain [K, E] shared by the heads, or over the whole width with gain [K, D]."""
        K, B, T, H, E = x_KBTHE.shape
        eps, dtype = self.config.norm_eps, x_KBTHE.dtype
        if self.config.qk_norm == "head":
            return norm(x_KBTHE, gain[:, None, None, None], eps=eps, dtype=dtype)
        return norm(x_KBTHE.reshape(K, B, T, H * E), gain[:, None, None], eps=eps, dtype=dtype).view(K, B, T, H, E)

    def _mlp(self, i: int, params: Mapping[str, Tensor], x_KND: Tensor) -> Tensor:
        at = f"blocks.{i}.mlp"
        h_KNF = torch.bmm(self._norm(x_KND, params[f"{at}.norm"], self.dtypes.matmul), params[f"{at}.in"])
        h_KNF = gelu_tanh(h_KNF) if self.config.activation == "gelu_tanh" else F.gelu(h_KNF)
        return torch.bmm(h_KNF, params[f"{at}.out"])


def _lookup(embed_KVD: Tensor, ids_KN: Tensor) -> Tensor:
    """Rows of each replica's own table, through one lookup in the stacked table."""
    K, V, D = embed_KVD.shape
    first_K1 = torch.arange(K, device=ids_KN.device)[:, None] * V
    return F.embedding(ids_KN + first_K1, embed_KVD.reshape(K * V, D))


def _scaled_to(x: Tensor, kappa: float, eps: float) -> Tensor:
    """sqrt(kappa) * x / rms(x) over the head dimension: forces the typical logit to kappa (section 3.1.1, figure 10).

    `eps` as in a LayerNorm: full muParam starts q at zero, which has no direction.
    """
    x_float = x.float() if x.dtype == torch.bfloat16 else x
    return (math.sqrt(kappa) * x_float * (x_float.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)
