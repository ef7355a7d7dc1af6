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
    def attention(self, block: int, q_KBHTE: Tensor, k_KBHTE: Tensor, *, scale: float, softmax: bool) -> ScoreTap:
        """Record |q| and |k| (mean L2 norm over tokens and heads); return the tap that sees the scores.

        `q_KBHTE` already has the attention `scale` in it, which its norm leaves out again. Only weights that are
        probabilities (`softmax`) have an entropy: mean over queries and heads, nats.
        """
        at = f"attn/blocks.{block}"
        dtype = torch.promote_types(q_KBHTE.dtype, torch.float32)
        q_norm_GT, k_norm_GT = (
            torch.linalg.vector_norm(x.detach(), dim=-1, dtype=dtype).flatten(0, 2) for x in (q_KBHTE, k_KBHTE)
        )
        self.values[f"{at}/q_norm"] = self._mean(q_norm_GT) / scale
        self.values[f"{at}/k_norm"] = self._mean(k_norm_GT)

        @torch.no_grad()
        def tap(scores_GTS: Tensor, weights_GTS: Tensor) -> None:
            top_K = scores_GTS.view(self.num_replicas, -1).amax(1).to(dtype)
            # Masked pairs become 0: out of the way of the smallest score's magnitude, and of the sum of cosines.
            unmasked_GTS = scores_GTS.to(dtype).nan_to_num(nan=torch.nan, posinf=torch.inf, neginf=0.0)
            bottom_K = unmasked_GTS.view(self.num_replicas, -1).amin(1)
            self.values[f"{at}/max_logit"] = top_K
            self.values[f"{at}/max_abs_logit"] = torch.maximum(top_K, -bottom_K)
            # Mean over all unmasked pairs of score / (|q| |k|): the alignment that multiplies the norms in a logit.
            T = q_norm_GT.shape[1]
            inverse_q_GT, inverse_k_GT = (norm_GT.clamp(min=1e-30).reciprocal() for norm_GT in (q_norm_GT, k_norm_GT))
            rows_GT = torch.bmm(unmasked_GTS, inverse_k_GT[..., None]).squeeze(-1)
            self.values[f"{at}/qk_cosine"] = self._mean(rows_GT * inverse_q_GT) / ((T + 1) / 2)
            if softmax:
                # 0 log 0 = 0: a weight below the smallest number is raised to it before the logarithm.
                log_GTS = weights_GTS.clamp(min=torch.finfo(weights_GTS.dtype).tiny).log_()
                self.values[f"{at}/entropy"] = -self._mean(torch.linalg.vecdot(weights_GTS, log_GTS))

        return tap

    def _mean(self, value_GT: Tensor) -> Tensor:
        """Mean over the batch, heads and queries of each replica."""
        return value_GT.reshape(self.num_replicas, -1).mean(1)

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
