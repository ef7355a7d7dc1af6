"""What is read inside a forward pass, when asked: attention scores, q and k, block outputs, log Z.

Legend: K replicas, B batch, H heads, T positions, S keys, E head dimension, N = B*T, V vocabulary, G = K*B*H.
A probe sees tensors the training step makes anyway, under no_grad, and keeps one number per replica: it cannot change a
bit of training. Max logit: over batch, heads, queries and unmasked keys (Wortsman et al. 2023, section 3.1.1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from aftershock.lab.models.ops import ScoreTap


class Probe:
    """Collects `values`: signal name to [K]. One probe serves one forward pass of a fleet of `num_replicas`."""

    def __init__(self, num_replicas: int) -> None:
        self.num_replicas = num_replicas
        self.values: dict[str, Tensor] = {}

    @torch.no_grad()
    def attention(self, block: int, q_KBHTE: Tensor, k_KBHTE: Tensor, *, softmax: bool) -> ScoreTap:
        """Record |q|, |k| (mean L2 norm over tokens and heads) and their mean cosine; return the tap for the scores.

        Only weights that are probabilities (`softmax`) have an entropy: mean over queries and heads, nats.
        """
        at = f"attn/blocks.{block}"
        dtype = torch.promote_types(q_KBHTE.dtype, torch.float32)
        q, k = q_KBHTE.detach().to(dtype), k_KBHTE.detach().to(dtype)
        q_norm, k_norm = q.norm(dim=-1), k.norm(dim=-1)
        self.values[f"{at}/q_norm"] = q_norm.flatten(1).mean(1)
        self.values[f"{at}/k_norm"] = k_norm.flatten(1).mean(1)
        # Mean over all unmasked pairs: the alignment that multiplies the norms in a logit.
        T = q.shape[-2]
        unit_q = q / q_norm[..., None].clamp(min=1e-30)
        unit_k = k / k_norm[..., None].clamp(min=1e-30)
        pairs = (unit_q * unit_k.cumsum(-2)).sum((-1, -2)) / (T * (T + 1) / 2)
        self.values[f"{at}/qk_cosine"] = pairs.flatten(1).mean(1)

        @torch.no_grad()
        def tap(scores_GTS: Tensor, weights_GTS: Tensor) -> None:
            scores_KX = scores_GTS.view(self.num_replicas, -1)
            top_K = scores_KX.amax(1).to(weights_GTS.dtype)
            unmasked = torch.where(scores_KX == -torch.inf, torch.inf, scores_KX)
            bottom_K = unmasked.amin(1).to(weights_GTS.dtype)
            self.values[f"{at}/max_logit"] = top_K
            self.values[f"{at}/max_abs_logit"] = torch.maximum(top_K, -bottom_K)
            if softmax:
                entropy_GT = torch.special.entr(weights_GTS).sum(-1)
                self.values[f"{at}/entropy"] = entropy_GT.view(self.num_replicas, -1).mean(1)

        return tap

    @torch.no_grad()
    def output(self, block: int, x_KND: Tensor) -> None:
        """RMS of the residual stream after a block."""
        self.values[f"output/blocks.{block}/rms"] = x_KND.flatten(1).square().mean(1).sqrt()

    @torch.no_grad()
    def logits(self, logits_KNV: Tensor, log_z_KN: Tensor, share_KN: Tensor) -> None:
        """log Z and the mean logit: output-logit divergence shows as |log Z| far from 0, with either sign of the mean.

        Means over the positions that the loss counts, as `share_KN` weighs them.
        """
        counted_KN = share_KN > 0
        columns = {
            "log_z": log_z_KN,
            "log_z_sq": log_z_KN.square(),
            "abs_log_z": log_z_KN.abs(),
            "mean_logit": logits_KNV.mean(-1),
        }
        for name, value_KN in columns.items():
            # Selected, then weighed: an infinity at a position that does not count stays out.
            self.values[f"output/head/{name}"] = (torch.where(counted_KN, value_KN, 0.0) * share_KN).sum(1)
