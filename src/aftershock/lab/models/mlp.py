"""Embeddings of the operands, concatenated, then one hidden ReLU layer: the fastest model known to grok.

Legend: K replicas, B batch, T positions, A operands (2), D embedding width, F hidden width, V vocabulary.
103k parameters at modulus 97 and the default sizes; no output bias.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from aftershock.lab.models.decoder import dtypes
from aftershock.lab.models.layout import ParamSpec
from aftershock.lab.models.probe import Probe
from aftershock.lab.recipe import MlpConfig, PrecisionConfig

OPERAND_POSITIONS = (0, 2)
"""Where a and b stand in the sequence `a op b =`."""


class Mlp:
    """Maps `a op b =` to logits at the last position; the other positions get zeros, as their target is ignored."""

    def __init__(
        self, config: MlpConfig, *, vocab_size: int, context: int, precision: PrecisionConfig, device: torch.device
    ) -> None:
        assert context == 4, "the mlp reads sequences `a op b =`"
        self.config, self.vocab_size, self.context = config, vocab_size, context
        self.dtypes = dtypes(precision)

    def specs(self) -> list[ParamSpec]:
        """Unit normal embeddings (torch.nn.Embedding's default), truncated normals of std 1/sqrt(fan_in) elsewhere."""
        D, F_, V = self.config.embed, self.config.hidden, self.vocab_size
        return [
            ParamSpec("embed.a", (V, D), "params", 1.0, truncated=False),
            ParamSpec("embed.b", (V, D), "params", 1.0, truncated=False),
            ParamSpec("hidden", (2 * D, F_), "matmul", (2 * D) ** -0.5),
            ParamSpec("hidden_bias", (F_,), "params", 0),
            ParamSpec("head", (F_, V), "logits", F_**-0.5),
        ]

    def __call__(self, params: Mapping[str, Tensor], inputs_KBT: Tensor, probe: Probe | None = None) -> Tensor:
        """Logits [K, B*T, V]."""
        K, B, T = inputs_KBT.shape
        first_K1 = torch.arange(K, device=inputs_KBT.device)[:, None] * self.vocab_size
        operands = [
            F.embedding(inputs_KBT[:, :, t] + first_K1, params[name].reshape(K * self.vocab_size, -1))
            for t, name in zip(OPERAND_POSITIONS, ("embed.a", "embed.b"), strict=True)
        ]
        x_KBC = torch.cat(operands, dim=-1).to(self.dtypes.matmul)
        h_KBF = torch.bmm(x_KBC, params["hidden"]).to(self.dtypes.params) + params["hidden_bias"][:, None]
        if probe is not None:
            probe.output(0, h_KBF)
        logits_KBV = torch.bmm(h_KBF.relu().to(self.dtypes.logits), params["head"])
        return F.pad(logits_KBV[:, :, None], (0, 0, T - 1, 0)).reshape(K, B * T, self.vocab_size)
