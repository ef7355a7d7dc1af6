"""The differentiable pieces of a fleet's decoder that stock PyTorch does slowly on a CPU, or not per replica.

Legend: K replicas, B batch, T positions, S keys, H heads, E head dimension, D width, N = B*T tokens, V vocabulary.
Each is an autograd Function with its backward written out, and has an oracle test against plain autograd.
The CPU backward of `scaled_dot_product_attention` is half of a bf16 training step; `attend` is matmul, softmax, matmul.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ScoreTap = Callable[[Tensor, Tensor], None]
"""Called with (scores_GTS, weights_GTS), G = K*B*H; masked scores are -inf. It must not keep or change them."""

LossTap = Callable[[Tensor, Tensor, Tensor], None]
"""Called with (logits_KNV, log_z_KN, share_KN): the weight of each position in the mean, 0 where the target is -1."""


GELU_2U = 2 * math.sqrt(2 / math.pi)
GELU_PIECE = 1 << 18
"""Elements worked on at a time: a megabyte of float32."""


def norm(x: Tensor, gain: Tensor, *, eps: float, dtype: torch.dtype) -> Tensor:
    """LayerNorm over the last axis, learned gain, no bias: gain * (x - mean) / sqrt(var + eps), computed in x's dtype.

    `gain` broadcasts against x ([K, 1, D] against [K, N, D]); the result has `dtype`.
    """
    return _Norm.apply(x, gain, eps, dtype)  # pyright: ignore[reportReturnType]


def rotate(x_KBTHE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021): x * cos + swap(x) * sin over the halves of E; returned as [K, B, H, T, E]."""
    return _Rotate.apply(x_KBTHE, cos_TE, sin_TE)  # pyright: ignore[reportReturnType]


def attend(
    q_KBHTE: Tensor,
    k_KBHTE: Tensor,
    v_KBHTE: Tensor,
    *,
    mask_TS: Tensor,
    softmax: bool,
    dtype: torch.dtype,
    tap: ScoreTap | None = None,
) -> Tensor:
    """Causal attention, result [K, B, T, H, E]. `q` is already divided by the attention scale.

    softmax: weights = softmax(q k' + mask), in `dtype` (float32 in the bf16 layout). Otherwise the pointwise variant
    relu(q k')^2 / sqrt(T) (Wortsman et al. 2023, appendix E, figure E.11). `mask_TS` is 0 or -inf.
    """
    return _Attend.apply(q_KBHTE, k_KBHTE, v_KBHTE, mask_TS, softmax, dtype, tap)  # pyright: ignore[reportReturnType]


def gelu_tanh(x: Tensor) -> Tensor:
    """0.5 x (1 + tanh(u)) with u = sqrt(2/pi) (x + 0.044715 x^3) (Hendrycks & Gimpel 2016): the paper's GELU.

    Written as x * sigmoid(2u), the same number, because sigmoid costs a quarter of tanh on a CPU; the slope is made in
    the same pass and kept in x's dtype instead of x.
    """
    return _GeluTanh.apply(x)  # pyright: ignore[reportReturnType]


class TokenLoss(NamedTuple):
    """Per replica: mean cross-entropy, and mean of cross-entropy + z * (log Z)^2, which is what is trained."""

    ce_K: Tensor
    total_K: Tensor


def token_loss(
    logits_KNV: Tensor, targets_KN: Tensor, z_K: Tensor, *, dtype: torch.dtype, tap: LossTap | None = None
) -> TokenLoss:
    """Cross-entropy and z-loss in `dtype`, nats, averaged over the positions whose target is not -1.

    log Z = logsumexp(logits); total = mean(log Z - logit[target] + z (log Z)^2) (Chowdhery et al. 2022, section 5).
    """
    return TokenLoss(*_TokenLoss.apply(logits_KNV, targets_KN, z_K, dtype, tap))  # pyright: ignore[reportGeneralTypeIssues]


def rotary_tables(
    context: int, head_dim: int, base: float, *, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos_TE and signed sin_TE for `rotate`: pair i turns by t base^(-2i/E) at position t; sin < 0 in half one."""
    half = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    angle_TE = torch.outer(torch.arange(context, dtype=torch.float64), base**-half).repeat(1, 2)
    sign_E = torch.ones(head_dim, dtype=torch.float64)
    sign_E[: head_dim // 2] = -1
    return angle_TE.cos().to(device, dtype), (angle_TE.sin() * sign_E).to(device, dtype)


def causal_mask(context: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[T, S] of 0 where key s <= query t, -inf elsewhere."""
    return torch.full((context, context), -torch.inf, dtype=dtype, device=device).triu(1)


class _Norm(torch.autograd.Function):
    """With one replica the stock kernel applies the gain too; with more it normalises, and the gains follow."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        # On a CPU a float weight makes the kernel keep float statistics of bf16 input; elsewhere it keeps them anyway,
        # and wants a weight of the input's dtype.
        weight_dtype = torch.promote_types(x.dtype, torch.float32) if x.device.type == "cpu" else x.dtype
        ctx.shared = gain.numel() == x.shape[-1] and gain.dtype == weight_dtype
        weight = gain.flatten() if ctx.shared else torch.ones(x.shape[-1:], dtype=weight_dtype, device=x.device)
        out, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, None, eps)
        ctx.save_for_backward(x, gain, mean, rstd, weight)
        return out.to(dtype) if ctx.shared else (out * gain).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, gain, mean, rstd, weight = ctx.saved_tensors
        inner = grad.to(x.dtype) if ctx.shared else (grad * gain).to(x.dtype)
        grad_x, grad_gain, _ = torch.ops.aten.native_layer_norm_backward(
            inner, x, x.shape[-1:], mean, rstd, weight, None, [True, ctx.shared, False]
        )
        if not ctx.shared:
            grad_gain = (x - mean).mul_(rstd).mul_(grad).sum_to_size(gain.shape)
        return grad_x, grad_gain.view(gain.shape).to(gain.dtype), None, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_KBTHE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TE, sin_TE)
        x_KBHTE = x_KBTHE.transpose(2, 3)
        return _rotated(x_KBHTE, cos_TE, sin_TE)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_KBHTE: Tensor) -> tuple[Tensor, None, None]:
        cos_TE, sin_TE = ctx.saved_tensors
        return _rotated(grad_KBHTE, cos_TE, -sin_TE).transpose(2, 3), None, None


def _rotated(x: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    out = torch.mul(x, cos_TE, out=torch.empty(x.shape, dtype=x.dtype, device=x.device))
    out[..., :half].addcmul_(x[..., half:], sin_TE[:, :half])
    out[..., half:].addcmul_(x[..., :half], sin_TE[:, half:])
    return out


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask_TS: Tensor,
        softmax: bool,
        dtype: torch.dtype,
        tap: ScoreTap | None,
    ) -> Tensor:
        K, B, H, T, E = q.shape
        q_GTE, k_GTE, v_GTE = (x.reshape(K * B * H, T, E) for x in (q, k, v))
        scores_GTS = torch.baddbmm(mask_TS, q_GTE, k_GTE.transpose(1, 2))
        if softmax:
            weights_GTS = torch.softmax(scores_GTS, -1, dtype=dtype)
        else:
            weights_GTS = scores_GTS.to(dtype).relu().square() * T**-0.5
        if tap is not None:
            tap(scores_GTS, weights_GTS)
        weights_GTS = weights_GTS.to(v.dtype)
        ctx.softmax = softmax
        ctx.save_for_backward(q_GTE, k_GTE, v_GTE, weights_GTS if softmax else scores_GTS)
        out = torch.empty(K, B, T, H, E, dtype=v.dtype, device=v.device)
        out.transpose(2, 3).copy_(torch.bmm(weights_GTS, v_GTE).view(K, B, H, T, E))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_KBTHE: Tensor) -> tuple[Tensor | None, ...]:
        q_GTE, k_GTE, v_GTE, saved_GTS = ctx.saved_tensors
        K, B, T, H, E = grad_KBTHE.shape
        grad_GTE = grad_KBTHE.transpose(2, 3).reshape(K * B * H, T, E)
        grad_weights_GTS = torch.bmm(grad_GTE, v_GTE.transpose(1, 2))
        if ctx.softmax:
            weights_GTS = saved_GTS
            grad_scores_GTS = torch._softmax_backward_data(grad_weights_GTS, weights_GTS, -1, weights_GTS.dtype)
        else:
            positive_GTS = saved_GTS.relu()
            weights_GTS = positive_GTS.square() * T**-0.5
            grad_scores_GTS = grad_weights_GTS * positive_GTS * (2 * T**-0.5)
        grads = (
            torch.bmm(grad_scores_GTS, k_GTE),
            torch.bmm(grad_scores_GTS.transpose(1, 2), q_GTE),
            torch.bmm(weights_GTS.transpose(1, 2), grad_GTE),
        )
        return *(g.view(K, B, H, T, E) for g in grads), None, None, None, None


class _GeluTanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out, slope = torch.empty_like(rows), torch.empty_like(rows)
        # In pieces of about a megabyte, in scratch made once: they stay in the cache over the dozen passes.
        piece = min(rows.shape[0], max(1, GELU_PIECE // rows.shape[1]))
        dtype = torch.promote_types(x.dtype, torch.float32)
        scratch = torch.empty(3, piece, rows.shape[1], dtype=dtype, device=x.device)
        for start in range(0, rows.shape[0], piece):
            here = slice(start, start + piece)
            _gelu_tanh(rows[here], out[here], slope[here], scratch[:, : rows[here].shape[0]])
        ctx.save_for_backward(slope.view(x.shape))
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (slope,) = ctx.saved_tensors
        return grad * slope


def _gelu_tanh(x: Tensor, out: Tensor, slope: Tensor, scratch: Tensor) -> None:
    """With s = sigmoid(2u): out = x s, slope = s (1 + (1 - s) x d(2u)/dx)."""
    wide, square, s = scratch
    wide.copy_(x)
    torch.mul(wide, wide, out=square)
    torch.mul(square, 0.044715 * GELU_2U, out=s).add_(GELU_2U).mul_(wide).sigmoid_()
    torch.mul(wide, s, out=out)
    inner = square.mul_(3 * 0.044715 * GELU_2U).add_(GELU_2U).mul_(wide)
    inner.addcmul_(inner, s, value=-1).add_(1)
    torch.mul(inner, s, out=slope)


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_KNV: Tensor, targets_KN: Tensor, z_K: Tensor, dtype: torch.dtype, tap: LossTap | None
    ) -> tuple[Tensor, Tensor]:
        logits = logits_KNV.to(dtype)
        valid_KN = targets_KN >= 0
        index_KN1 = targets_KN.clamp(min=0)[..., None]
        # Written out because the backward needs the probabilities: one exp for both.
        peak_KN1 = logits.amax(-1, keepdim=True)
        probs_KNV = (logits - peak_KN1).exp_()
        sum_KN1 = probs_KNV.sum(-1, keepdim=True)
        probs_KNV.div_(sum_KN1)
        log_z_KN = (peak_KN1 + sum_KN1.log()).squeeze(-1)
        ce_KN = log_z_KN - logits.gather(-1, index_KN1).squeeze(-1)
        count_K = valid_KN.sum(1).clamp(min=1)
        zero = torch.zeros((), dtype=dtype, device=logits.device)
        ce_K = torch.where(valid_KN, ce_KN, zero).sum(1) / count_K
        z_K1 = z_K.to(dtype)[:, None]
        total_K = torch.where(valid_KN, ce_KN + z_K1 * log_z_KN.square(), zero).sum(1) / count_K
        share_KN = valid_KN / count_K[:, None].to(dtype)
        if tap is not None:
            tap(logits, log_z_KN, share_KN)
        ctx.logits_dtype = logits_KNV.dtype
        ctx.save_for_backward(probs_KNV, index_KN1, share_KN, 2 * z_K1 * log_z_KN)
        ctx.mark_non_differentiable(ce_K)
        return ce_K, total_K

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, grad_K: Tensor) -> tuple[Tensor, None, None, None, None]:
        probs_KNV, index_KN1, share_KN, z_slope_KN = ctx.saved_tensors
        scale_KN1 = (share_KN * grad_K[:, None])[..., None]
        grad_KNV = probs_KNV * ((1 + z_slope_KN)[..., None] * scale_KN1)
        grad_KNV.scatter_add_(-1, index_KN1, -scale_KN1)
        return grad_KNV.to(ctx.logits_dtype), None, None, None, None
