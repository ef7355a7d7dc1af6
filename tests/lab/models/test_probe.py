"""probe: each number read inside a forward pass, against loops over a tiny model that start from its parameters.

Legend: K replicas, B batch, T positions, D width, H heads, E head dimension, V vocabulary.
"""

from __future__ import annotations

import cmath
import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aftershock.lab.models import Probe
from aftershock.lab.models.decoder import Decoder
from aftershock.lab.models.layout import Layout
from aftershock.lab.models.ops import token_loss
from aftershock.lab.recipe import DecoderConfig, PrecisionConfig

CPU = torch.device("cpu")
B, T, V = 2, 5, 7
BASE = DecoderConfig(width=8, depth=2, heads=2)
CONFIGS = {
    "qk-norm": BASE,
    "no-qk-norm": dataclasses.replace(BASE, qk_norm="off"),
    "over-the-width": dataclasses.replace(BASE, qk_norm="width"),
    "kappa": dataclasses.replace(BASE, logit_scale=5.0),
    "relu2": dataclasses.replace(BASE, attention="relu2"),
    "full-mup": dataclasses.replace(BASE, mup="full", mup_base_width=16),
}


def layer_norm(x: Tensor, gain: Tensor) -> Tensor:
    return gain * (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()


def turned(vector: list[float], position: int) -> list[float]:
    """One head's vector of one position after rotary positions: pairs as complex numbers."""
    half = len(vector) // 2
    pairs = [complex(vector[i], vector[half + i]) for i in range(half)]
    pairs = [z * cmath.exp(1j * position * 10_000 ** (-2 * i / len(vector))) for i, z in enumerate(pairs)]
    return [z.real for z in pairs] + [z.imag for z in pairs]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def slow_signals(c: DecoderConfig, p: dict[str, Tensor], ids_BT: Tensor, targets_BT: Tensor) -> dict[str, float]:
    """Every signal of one replica with parameters `p`, by loops over batch, head, query and key."""
    found: dict[str, float] = {}
    H, E = c.heads, c.head_dim
    scale = 1 / E if c.mup == "full" else 1 / math.sqrt(E)
    x = p["embed"][ids_BT]
    for i in range(c.depth):
        at = f"blocks.{i}"
        h = layer_norm(x, p[f"{at}.attn.norm"])
        joined = torch.cat([p[f"{at}.attn.q"], p[f"{at}.attn.kv"]], 1) if c.mup == "full" else p[f"{at}.attn.qkv"]
        q, k, v = (h @ joined).split(c.width, dim=-1)
        if c.qk_norm == "width":
            q, k = layer_norm(q, p[f"{at}.attn.q_gain"]), layer_norm(k, p[f"{at}.attn.k_gain"])
        q, k, v = (y.view(B, T, H, E) for y in (q, k, v))
        if c.qk_norm == "head":
            q, k = layer_norm(q, p[f"{at}.attn.q_gain"]), layer_norm(k, p[f"{at}.attn.k_gain"])
        if c.logit_scale is not None:
            q, k = (math.sqrt(c.logit_scale) * y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
        logits, entropies, cosines, q_norms, k_norms = [], [], [], [], []
        mixed = torch.zeros(B, T, H, E, dtype=torch.float64)
        for b in range(B):
            for head in range(H):
                queries, keys = ([turned(y[b, t, head].tolist(), t) for t in range(T)] for y in (q, k))
                q_norms += [math.hypot(*vector) for vector in queries]
                k_norms += [math.hypot(*vector) for vector in keys]
                for t in range(T):
                    dots = [sum(a * d for a, d in zip(queries[t], keys[s], strict=True)) for s in range(t + 1)]
                    lengths = [math.hypot(*queries[t]) * math.hypot(*keys[s]) for s in range(t + 1)]
                    cosines += [dot / length if length else 0.0 for dot, length in zip(dots, lengths, strict=True)]
                    scores = [dot * scale for dot in dots]
                    logits += scores
                    if c.attention == "softmax":
                        z = sum(math.exp(score) for score in scores)
                        weights = [math.exp(score) / z for score in scores]
                        entropies.append(-sum(w * math.log(w) for w in weights))
                    else:
                        weights = [max(score, 0.0) ** 2 / math.sqrt(T) for score in scores]
                    for s, weight in enumerate(weights):
                        mixed[b, t, head] += weight * v[b, s, head]
        found |= {
            f"attn/{at}/max_logit": max(logits),
            f"attn/{at}/max_abs_logit": max(abs(logit) for logit in logits),
            f"attn/{at}/q_norm": mean(q_norms),
            f"attn/{at}/k_norm": mean(k_norms),
            f"attn/{at}/qk_cosine": mean(cosines),
        }
        if entropies:
            found[f"attn/{at}/entropy"] = mean(entropies)
        x = x + mixed.view(B, T, -1) @ p[f"{at}.attn.out"]
        h = F.gelu(layer_norm(x, p[f"{at}.mlp.norm"]) @ p[f"{at}.mlp.in"], approximate="tanh")
        x = x + h @ p[f"{at}.mlp.out"]
        found[f"output/{at}/rms"] = math.sqrt(mean([value**2 for value in x.flatten().tolist()]))
    out = layer_norm(x, p["final_norm"]) @ p["head"]
    kept = [out[b, t].tolist() for b in range(B) for t in range(T) if targets_BT[b, t] >= 0]
    log_z = [math.log(sum(math.exp(logit) for logit in row)) for row in kept]
    return found | {
        "output/head/log_z": mean(log_z),
        "output/head/log_z_sq": mean([z**2 for z in log_z]),
        "output/head/abs_log_z": mean([abs(z) for z in log_z]),
        "output/head/mean_logit": mean([logit for row in kept for logit in row]),
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_oracle_of_every_signal(name: str) -> None:
    """oracle: every name the probe collects is in the oracle and the other way round; float64, so 1e-9 is rounding.

    Two replicas with weights of other scales: a number that leaks from one to the other is far off.
    """
    config = CONFIGS[name]
    precision = PrecisionConfig(params="float64", loss="float64")
    model = Decoder(config, vocab_size=V, context=T, precision=precision, device=CPU)
    layout = Layout(model.specs())
    buffer = layout.init([3, 4], dtype=torch.float64, device=CPU)
    generator = torch.Generator().manual_seed(0)
    buffer *= 1 + 0.5 * torch.rand(buffer.shape, generator=generator, dtype=torch.float64)
    buffer[1] *= 1.7
    params = layout.views(buffer)
    ids = torch.randint(V, (2, B, T), generator=generator)
    targets = torch.randint(V, (2, B, T), generator=generator)
    targets[0, :, :2] = -1  # positions without a target are not in the means over the head
    probe = Probe(2)
    logits = model(params, ids, probe)
    token_loss(logits, targets.flatten(1), torch.zeros(2), dtype=torch.float64, tap=probe.logits)
    for k in range(2):
        expected = slow_signals(config, {key: value[k] for key, value in params.items()}, ids[k], targets[k])
        assert set(probe.values) == set(expected)
        for signal, value in expected.items():
            assert probe.values[signal][k].item() == pytest.approx(value, rel=1e-9, abs=1e-12), signal


def test_pointwise_attention_has_no_entropy() -> None:
    """contract: squared-ReLU weights do not sum to one, so -sum w ln w means nothing there."""
    assert "entropy" not in " ".join(signals_of(CONFIGS["relu2"], PrecisionConfig()))
    assert "attn/blocks.1/entropy" in signals_of(BASE, PrecisionConfig())


@pytest.mark.parametrize("matmul", ["params", "bfloat16"])
def test_statistics_are_float32_or_better(matmul: Any) -> None:
    """contract: also when the tensors they are taken of are bf16; and near the float64 ones (bf16 rounds at 2^-9)."""
    values = signals_of(BASE, PrecisionConfig(matmul=matmul))
    whole = signals_of(BASE, PrecisionConfig(params="float64", loss="float64"))
    assert {value.dtype for value in values.values()} == {torch.float32}
    assert {value.dtype for value in whole.values()} == {torch.float64}
    for name, value in values.items():
        assert abs(value.item() - whole[name].item()) < (0.03 if matmul == "bfloat16" else 1e-5), name


def signals_of(config: DecoderConfig, precision: PrecisionConfig) -> dict[str, Tensor]:
    model = Decoder(config, vocab_size=V, context=T, precision=precision, device=CPU)
    layout = Layout(model.specs())
    params = layout.views(layout.init([0], dtype=model.dtypes.params, device=CPU))
    for spec in model.specs():
        if spec.role == "matmul":
            params[spec.name] = params[spec.name].to(model.dtypes.matmul)
    ids = torch.arange(B * T).view(1, B, T) % V
    probe = Probe(1)
    logits = model(params, ids, probe)
    token_loss(logits, ids.flatten(1), torch.zeros(1), dtype=model.dtypes.loss, tap=probe.logits)
    return probe.values


def test_masked_scores_are_neither_largest_nor_smallest() -> None:
    """planted: the only large scores stand above the diagonal, where the mask is."""
    probe = Probe(1)
    q = k = torch.zeros(1, 1, 1, 2, 2)
    tap = probe.attention(0, q, k, scale=1.0, softmax=True)
    tap(torch.tensor([[[0.5, -torch.inf], [-2.0, 1.0]]]), torch.tensor([[[1.0, 0.0], [0.25, 0.75]]]))
    assert probe.values["attn/blocks.0/max_logit"].item() == 1.0
    assert probe.values["attn/blocks.0/max_abs_logit"].item() == 2.0
    expected = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / 2
    assert probe.values["attn/blocks.0/entropy"].item() == pytest.approx(expected)
