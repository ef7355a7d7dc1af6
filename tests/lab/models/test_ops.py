"""ops: each written-out backward against plain autograd, each fast forward against the formula.

Legend: K replicas, B batch, T positions, S keys, H heads, E head dimension, D width, N tokens, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aftershock.lab.models.ops import attend, causal_mask, norm, rotary_tables, rotate, token_loss

CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, grad: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)


def exactly(ours: Any, expected: Any) -> bool:
    """float64 by another order of sums: some hundred roundings of 1e-16. A wrong factor is 1e-2 and more."""
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)
    return True


def gradients(out: Tensor, inputs: list[Tensor], *, seed: int = 99) -> list[Tensor]:
    """Of the inner product with one fixed random tensor: sees every element of the Jacobian's transpose."""
    weight = random(*out.shape, seed=seed, dtype=out.dtype, grad=False)
    return list(torch.autograd.grad((out * weight).sum(), inputs))


@pytest.mark.parametrize(
    ("x_shape", "gain_shape"),
    [
        ((1, 6, 8), (1, 1, 8)),  # one replica: the kernel applies the gain
        ((3, 6, 8), (3, 1, 8)),  # a fleet: the gains follow
        ((1, 2, 3, 4, 6), (1, 1, 1, 1, 6)),  # qk-layernorm per head
        ((3, 2, 3, 4, 6), (3, 1, 1, 1, 6)),
        ((8, 6, 8), (8, 1, 8)),  # as many replicas as columns
        ((2, 1, 2), (2, 1, 2)),
    ],
)
def test_oracle_norm(x_shape: tuple[int, ...], gain_shape: tuple[int, ...]) -> None:
    """oracle: gain (x - mean) / sqrt(var + eps) by autograd; eps is large enough here that losing it shows."""
    x, gain, eps = random(*x_shape), random(*gain_shape, seed=1), 1e-2
    out = norm(x, gain, eps=eps, dtype=torch.float64)
    centred = x - x.mean(-1, keepdim=True)
    expected = gain * centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    assert exactly(out, expected)
    for ours, plain in zip(gradients(out, [x, gain]), gradients(expected, [x, gain]), strict=True):
        assert exactly(ours, plain)


def test_oracle_norm_gradient_falls_as_the_input_grows() -> None:
    """oracle: grad_x = m^-1/2 (a g - <g, a x> x / (n m)), m = mean(x^2) + eps, for x of mean zero (the paper's eq. 3).

    The paper prints 1 / (n m^1/2) on the second term, which this would tell apart: m is far from 1.
    """
    x = 3 * random(1, 1, 8, grad=False)
    x = (x - x.mean()).requires_grad_()
    gain, grad = random(1, 1, 8, seed=1), random(1, 1, 8, seed=2, grad=False)
    (ours,) = torch.autograd.grad(norm(x, gain, eps=1e-6, dtype=torch.float64), [x], [grad])
    m = x.square().mean() + 1e-6
    printed = gain * grad - (grad * gain * x).sum() / (8 * m) * x
    # native_layer_norm also subtracts the mean of the gradient, which the formula leaves to the mean-zero subspace.
    printed = (printed - (gain * grad).mean()) / m.sqrt()
    assert exactly(ours, printed)


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
def test_norm_in_bf16_stays_close_to_float32(replicas: int, source: torch.dtype) -> None:
    """equivalence: bf16 rounds at 2^-9 relative; three roundings of values up to 4 and a sum of 16 such gradients.

    Statistics kept in bf16 would be off by several times that.
    """
    x = random(replicas, 16, 32, dtype=source)
    gain = random(replicas, 1, 32, seed=1, dtype=torch.float32)
    x_full = x.detach().float().requires_grad_()
    gain_full = gain.detach().requires_grad_()
    low, full = norm(x, gain, eps=1e-6, dtype=torch.bfloat16), norm(x_full, gain_full, eps=1e-6, dtype=torch.float32)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), full, rtol=2**-7, atol=2**-8)
    weight = random(*x.shape, seed=5, dtype=torch.bfloat16, grad=False)
    low_grads = torch.autograd.grad((low * weight).sum(), [x, gain])
    full_grads = torch.autograd.grad((full * weight.float()).sum(), [x_full, gain_full])
    assert [g.dtype for g in low_grads] == [source, torch.float32]
    for ours, plain in zip(low_grads, full_grads, strict=True):
        torch.testing.assert_close(ours.float(), plain, rtol=2**-6, atol=2**-5)


@pytest.mark.parametrize("replicas", [1, 2])
def test_norm_takes_a_float64_gain_with_bf16_input(replicas: int) -> None:
    """contract: float64 parameters and bf16 matmuls are separate settings; the kernel knows only float32 there."""
    x, gain = random(replicas, 4, 8, dtype=torch.bfloat16), random(replicas, 1, 8, seed=1)
    out = norm(x, gain, eps=1e-6, dtype=torch.bfloat16)
    torch.testing.assert_close(out.double(), F.layer_norm(x.double(), (8,)) * gain, rtol=2**-7, atol=2**-8)
    assert [grad.dtype for grad in gradients(out, [x, gain])] == [torch.bfloat16, torch.float64]


def test_oracle_rotate_is_complex_multiplication() -> None:
    """oracle: pair i of position t, (x[i], x[i + E/2]) as a complex number, times exp(i t base^(-2i/E))."""
    K, B, T, H, E, base = 2, 2, 5, 3, 6, 100.0
    x = random(K, B, T, H, E)
    cos, sin = rotary_tables(T, E, base, dtype=torch.float64, device=CPU)
    out = rotate(x, cos, sin)
    assert out.shape == (K, B, H, T, E)
    assert out.is_contiguous()
    angle = torch.tensor([[t * base ** (-2 * i / E) for i in range(E // 2)] for t in range(T)], dtype=torch.float64)
    turned = torch.complex(x[..., : E // 2], x[..., E // 2 :]).transpose(2, 3) * torch.polar(
        torch.ones_like(angle), angle
    )
    expected = torch.cat([turned.real, turned.imag], dim=-1)
    assert exactly(out, expected)
    assert exactly(gradients(out, [x]), gradients(expected, [x]))


def test_oracle_rotate_gradcheck() -> None:
    """oracle: finite differences, also with the attention scale riding on the tables."""
    cos, sin = rotary_tables(3, 4, 10_000.0, dtype=torch.float64, device=CPU)
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos * 0.5, sin * 0.5), (random(1, 1, 3, 2, 4),))


def test_rotation_makes_scores_depend_on_the_distance_alone() -> None:
    """contract: <rotate(q, t), rotate(k, s)> is a function of t - s."""
    cos, sin = rotary_tables(9, 8, 10_000.0, dtype=torch.float64, device=CPU)
    q, k = (random(8, seed=s, grad=False).expand(1, 1, 9, 1, 8) for s in (1, 2))
    scores = rotate(q, cos, sin)[0, 0, 0] @ rotate(k, cos, sin)[0, 0, 0].T
    for distance in range(9):
        diagonal = scores.diagonal(-distance)
        assert exactly(diagonal, diagonal[:1].expand_as(diagonal))


def attend_slowly(q: Tensor, k: Tensor, v: Tensor, *, softmax: bool) -> Tensor:
    """[K, B, T, H, E] by loops over every query and key."""
    K, B, H, T, _ = q.shape
    rows = []
    for kk in range(K):
        for b in range(B):
            for t in range(T):
                for h in range(H):
                    scores = torch.stack([(q[kk, b, h, t] * k[kk, b, h, s]).sum() for s in range(t + 1)])
                    if softmax:
                        weights = scores.exp() / scores.exp().sum()
                    else:
                        weights = scores.clamp(min=0) ** 2 / math.sqrt(T)
                    rows.append((weights[:, None] * v[kk, b, h, : t + 1]).sum(0))
    return torch.stack(rows).view(K, B, T, H, -1)


@pytest.mark.parametrize("softmax", [True, False])
def test_oracle_attend_by_loops(softmax: bool) -> None:
    """oracle: values and the three gradients."""
    q, k, v = (random(2, 2, 2, 5, 4, seed=s) for s in range(3))
    mask = causal_mask(5, dtype=torch.float64, device=CPU)
    out = attend(q, k, v, mask_TS=mask, softmax=softmax, dtype=torch.float64)
    expected = attend_slowly(q, k, v, softmax=softmax)
    assert out.is_contiguous()
    assert exactly(out, expected)
    assert exactly(gradients(out, [q, k, v]), gradients(expected, [q, k, v]))


def test_oracle_attend_by_scaled_dot_product_attention() -> None:
    q, k, v = (random(3, 2, 2, 7, 4, seed=s) for s in range(3))
    out = attend(q, k, v, mask_TS=causal_mask(7, dtype=torch.float64, device=CPU), softmax=True, dtype=torch.float64)
    flat_q, flat_k, flat_v = (x.flatten(0, 1) for x in (q, k, v))
    stock = F.scaled_dot_product_attention(flat_q, flat_k, flat_v, is_causal=True, scale=1.0)
    expected = stock.view(3, 2, 2, 7, 4).transpose(2, 3)
    assert exactly(out, expected)
    assert exactly(gradients(out, [q, k, v]), gradients(expected, [q, k, v]))


@pytest.mark.parametrize("softmax", [True, False])
def test_attend_hands_its_scores_to_the_tap(softmax: bool) -> None:
    """contract: scores before the softmax, -inf above the diagonal; weights as they are applied; the same bits out."""
    q, k, v = (random(2, 1, 3, 4, 2, seed=s, grad=False) for s in range(3))
    mask = causal_mask(4, dtype=torch.float64, device=CPU)
    seen: list[Tensor] = []
    out = attend(
        q,
        k,
        v,
        mask_TS=mask,
        softmax=softmax,
        dtype=torch.float64,
        tap=lambda s, w: seen.extend([s.clone(), w.clone()]),
    )
    scores, weights = seen
    above = torch.ones(4, 4, dtype=torch.bool).triu(1)
    assert (scores[:, above] == -torch.inf).all()
    assert (weights[:, above] == 0).all()
    assert exactly(scores[:, ~above], (q.reshape(6, 4, 2) @ k.reshape(6, 4, 2).mT)[:, ~above])
    applied = (weights @ v.reshape(6, 4, 2)).view(2, 1, 3, 4, 2).transpose(2, 3)
    assert exactly(applied, out)
    assert torch.equal(out, attend(q, k, v, mask_TS=mask, softmax=softmax, dtype=torch.float64))


@pytest.mark.parametrize("softmax", [True, False])
def test_attend_in_bf16_stays_close_to_float32(softmax: bool) -> None:
    """equivalence: scores up to 8 rounded at 2^-9 move a weight by 2 %; gradients pass three such roundings."""
    low = [random(2, 2, 2, 16, 8, seed=s, dtype=torch.bfloat16) for s in range(3)]
    full = [x.detach().float().requires_grad_() for x in low]
    outs = [
        attend(*x, mask_TS=causal_mask(16, dtype=x[0].dtype, device=CPU), softmax=softmax, dtype=torch.float32)
        for x in (low, full)
    ]
    assert outs[0].dtype == torch.bfloat16
    scale = outs[1].abs().max().item()
    assert (outs[0].float() - outs[1]).abs().max().item() < 0.02 * scale
    grads = [gradients(o.float(), x) for o, x in zip(outs, (low, full), strict=True)]
    for ours, plain in zip(*grads, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - plain).abs().max() < 0.04 * plain.abs().max()


def loss_slowly(logits_KNV: Tensor, targets_KN: Tensor, z_K: Tensor) -> tuple[Tensor, Tensor]:
    ce, total = [], []
    for logits_NV, targets_N, z in zip(logits_KNV, targets_KN, z_K, strict=True):
        kept = targets_N >= 0
        ce.append(F.cross_entropy(logits_NV[kept], targets_N[kept]))
        total.append(ce[-1] + z * logits_NV[kept].logsumexp(-1).square().mean())
    return torch.stack(ce), torch.stack(total)


@pytest.mark.parametrize("ignored", [0, 1, 5])
def test_oracle_token_loss(ignored: int) -> None:
    """oracle: F.cross_entropy and logsumexp, another z for every replica, another number of targets too."""
    logits = (4 * random(3, 7, 5, grad=False)).requires_grad_()
    targets = torch.arange(21).view(3, 7) % 5
    targets[1:, :ignored] = -1
    z = torch.tensor([0.0, 1e-2, 1.0], dtype=torch.float64)
    loss = token_loss(logits, targets, z, dtype=torch.float64)
    ce, total = loss_slowly(logits, targets, z)
    assert exactly(loss.ce_K, ce)
    assert exactly(loss.total_K, total)
    assert exactly(gradients(loss.total_K, [logits]), gradients(total, [logits]))
    assert not loss.ce_K.requires_grad


def test_token_loss_survives_large_logits() -> None:
    """planted: exp of 1e4 is inf in any dtype unless the peak is taken out first."""
    logits = torch.tensor([[[1e4, 0.0, -1e4]]], requires_grad=True)
    loss = token_loss(logits, torch.tensor([[1]]), torch.tensor([0.0]), dtype=torch.float32)
    assert loss.ce_K.tolist() == [1e4]
    (grad,) = torch.autograd.grad(loss.total_K.sum(), [logits])
    assert grad.flatten().tolist() == [1.0, -1.0, 0.0]


def test_token_loss_of_no_target_is_zero() -> None:
    logits = random(1, 3, 4)
    loss = token_loss(logits, torch.full((1, 3), -1), torch.ones(1), dtype=torch.float64)
    assert loss.total_K.tolist() == [0.0]
    assert gradients(loss.total_K, [logits])[0].abs().max() == 0


def test_token_loss_of_a_broken_replica_stays_there() -> None:
    """planted: one replica's logits are nan; the other's loss and gradient are the same bits."""
    logits = random(2, 3, 4, dtype=torch.float32, grad=False)
    targets, z = torch.tensor([[0, 1, 2], [2, -1, 3]]), torch.tensor([1e-4, 1e-4])
    results = []
    for value in (0.0, torch.nan):
        planted = torch.cat([torch.full_like(logits[:1], value), logits[1:]]).requires_grad_()
        loss = token_loss(planted, targets, z, dtype=torch.float32)
        results.append((loss.total_K[1], *torch.autograd.grad(loss.total_K.sum(), [planted])))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1][1], results[1][1][1])
    assert results[1][1][0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_token_loss_computes_in_its_own_dtype(dtype: torch.dtype) -> None:
    """equivalence: logits of any dtype, a float64 loss: exact for the logits given; gradient in their dtype."""
    logits = random(1, 5, 6, dtype=dtype)
    targets, z = torch.tensor([[0, 1, 2, 3, -1]]), torch.tensor([1e-2])
    loss = token_loss(logits, targets, z, dtype=torch.float64)
    full = logits.detach().double().requires_grad_()
    _, total = loss_slowly(full, targets, z.double())
    assert exactly(loss.total_K, total)
    (ours,) = gradients(loss.total_K, [logits])
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, gradients(total, [full])[0].to(dtype))


def test_the_loss_tap_weighs_what_the_loss_counts() -> None:
    """contract: shares are 1/count where there is a target, 0 elsewhere, and weigh log Z into the z term."""
    logits, targets = random(2, 4, 3, grad=False), torch.tensor([[0, -1, 1, 2], [-1, -1, -1, 0]])
    seen: list[Tensor] = []
    loss = token_loss(
        logits, targets, torch.ones(2), dtype=torch.float64, tap=lambda *xs: seen.extend(x.clone() for x in xs)
    )
    assert torch.equal(seen[0], logits)
    assert exactly(seen[1], logits.logsumexp(-1))
    assert seen[2].tolist() == [[1 / 3, 0, 1 / 3, 1 / 3], [0, 0, 0, 1]]
    assert exactly((seen[1].square() * seen[2]).sum(1), loss.total_K - loss.ce_K)
