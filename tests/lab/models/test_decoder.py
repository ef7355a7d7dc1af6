"""decoder: the paper's architecture, causal, with the loss it must start at and knobs that all do something.

Legend: K replicas, B batch, T positions, N = B*T, D width, H heads, E head dimension, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aftershock.lab.models import Probe
from aftershock.lab.models.decoder import Decoder
from aftershock.lab.models.layout import Layout
from aftershock.lab.models.ops import token_loss
from aftershock.lab.recipe import DecoderConfig, PrecisionConfig

CPU = torch.device("cpu")
FLOAT64 = PrecisionConfig(params="float64", loss="float64")
SMALL = DecoderConfig(width=16, depth=2, heads=2)


def build(
    config: DecoderConfig, *, vocab_size: int = 11, context: int = 6, precision: PrecisionConfig = FLOAT64
) -> Decoder:
    return Decoder(config, vocab_size=vocab_size, context=context, precision=precision, device=CPU)


def start(model: Decoder, *seeds: int) -> dict[str, Tensor]:
    layout = Layout(model.specs())
    return layout.views(layout.init(seeds or (0,), dtype=model.dtypes.params, device=CPU))


def tokens(*shape: int, vocab_size: int = 11, seed: int = 3) -> Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def logits_of(config: DecoderConfig, ids_KBT: Tensor, **params: Tensor) -> Tensor:
    model = build(config)
    return model(start(model) | params, ids_KBT)


@pytest.mark.parametrize(("vocab_size", "width", "num_tokens"), [(256, 32, 1024), (32_101, 16, 256)])
@pytest.mark.parametrize("qk_norm", ["head", "off"])
def test_oracle_initial_loss(vocab_size: int, width: int, num_tokens: int, qk_norm: Any) -> None:
    """oracle: unit-variance normal logits give ln(V) + 1/2; the mean of 4 seeds, on uniform tokens, within 0.05.

    A head of std 0.02, or a final norm without its gain's unit RMS, is off by 0.4 and more.
    """
    config = DecoderConfig(width=width, depth=2, heads=2, qk_norm=qk_norm)
    model = build(config, vocab_size=vocab_size, context=32, precision=PrecisionConfig())
    losses = []
    for seed in range(4):
        ids = tokens(1, num_tokens // 32, 33, vocab_size=vocab_size, seed=seed)
        out = model(start(model, seed), ids[..., :-1])
        targets_KN = ids[..., 1:].reshape(1, -1)
        losses.append(token_loss(out, targets_KN, torch.zeros(1), dtype=torch.float32).ce_K.item())
    assert sum(losses) / 4 == pytest.approx(math.log(vocab_size) + 0.5, abs=0.05)


VARIANTS = [
    SMALL,
    dataclasses.replace(SMALL, qk_norm="width"),
    dataclasses.replace(SMALL, qk_norm="off"),
    dataclasses.replace(SMALL, attention="relu2"),
    dataclasses.replace(SMALL, logit_scale=3.0),
    dataclasses.replace(SMALL, mup="full"),
    dataclasses.replace(SMALL, attention_scale="inverse", activation="gelu"),
]


@pytest.mark.parametrize("config", VARIANTS, ids=lambda c: f"{c.qk_norm}-{c.attention}-{c.logit_scale}-{c.mup}")
def test_future_tokens_do_not_change_past_logits(config: DecoderConfig) -> None:
    """contract: every variant is causal, to the bit, and does look at the past."""
    model = build(config)
    params = start(model)
    ids = tokens(1, 2, 6)
    base = model(params, ids).view(2, 6, -1)
    for t in range(6):
        changed = ids.clone()
        changed[..., t] = (changed[..., t] + 1) % 11
        out = model(params, changed).view(2, 6, -1)
        assert torch.equal(out[:, :t], base[:, :t])
        assert (out[:, t:] != base[:, t:]).any(-1).all()


def test_depth_zero_is_the_bigram_network() -> None:
    """contract: logits depend on the current token alone, as gain * normalised embedding @ head."""
    config = dataclasses.replace(SMALL, depth=0)
    model = build(config)
    params = start(model)
    assert set(params) == {"embed", "final_norm", "head"}
    ids = tokens(1, 3, 6)
    table = F.layer_norm(params["embed"][0], (16,), eps=config.norm_eps) @ params["head"][0]
    torch.testing.assert_close(model(params, ids)[0], table[ids.flatten()], rtol=1e-12, atol=1e-12)


def changes(field: str, *values: Any) -> list[tuple[str, DecoderConfig]]:
    return [(field, dataclasses.replace(SMALL, **{field: value})) for value in values]


LOGIT_KNOBS = [
    *changes("width", 32),
    *changes("depth", 0, 3),
    *changes("heads", 4),
    *changes("mlp_ratio", 2),
    *changes("qk_norm", "width", "off"),
    *changes("attention", "relu2"),
    *changes("attention_scale", "inverse"),
    *changes("logit_scale", 1.5),
    *changes("mup", "intermediate", "full"),
    *changes("activation", "gelu"),
    *changes("rope_base", 100.0),
    *changes("norm_eps", 1e-3),
]
UPDATE_KNOBS = [
    *changes("mup", "simple"),
    ("mup_base_width", dataclasses.replace(SMALL, mup="simple", mup_base_width=8)),
]


@pytest.mark.parametrize(("field", "config"), LOGIT_KNOBS)
def test_each_knob_changes_the_logits(field: str, config: DecoderConfig) -> None:
    """contract: from the same seed; the logits are still finite."""
    ids = tokens(1, 2, 6)
    base, other = logits_of(SMALL, ids), logits_of(config, ids)
    assert other.isfinite().all()
    # Beyond rounding: a knob that only reorders sums must not count.
    assert (base - other).abs().max() > 1e-6


@pytest.mark.parametrize(("field", "config"), UPDATE_KNOBS)
def test_each_other_knob_changes_the_rates_and_not_the_logits(field: str, config: DecoderConfig) -> None:
    """contract: what muParam simple and its base width change is the rate of every matrix."""
    other = SMALL if field == "mup" else dataclasses.replace(config, mup_base_width=SMALL.mup_base_width)
    ids = tokens(1, 2, 6)
    assert torch.equal(logits_of(config, ids), logits_of(other, ids))
    rates = [{s.name: s.lr_scale for s in build(c).specs()} for c in (config, other)]
    moved = {name for name in rates[0] if rates[0][name] != rates[1][name]}
    assert moved == {s.name for s in build(config).specs() if s.role in ("matmul", "logits")}


def test_no_knob_is_left_out() -> None:
    tested = {field for field, _ in [*LOGIT_KNOBS, *UPDATE_KNOBS]}
    assert tested == {f.name for f in dataclasses.fields(DecoderConfig)} - {"kind"}


@pytest.mark.parametrize("qk_norm", ["head", "off"])
@pytest.mark.parametrize("kappa", [0.5, 100.0])
def test_kappa_forces_the_scale_of_the_logits(qk_norm: Any, kappa: float) -> None:
    """oracle: RMS of q and k is sqrt(kappa); where k = q, the logit is kappa sqrt(E), and that is the largest.

    1e-4: the eps of 1e-6 inside the root, against vectors whose mean square is near 1.
    """
    config = dataclasses.replace(SMALL, qk_norm=qk_norm, logit_scale=kappa)
    model = build(config)
    params = start(model)
    for i in range(config.depth):
        query, key, _ = params[f"blocks.{i}.attn.qkv"].view(1, 16, 3, 16).unbind(2)
        key.copy_(query)
    probe = Probe(1)
    model(params, tokens(1, 4, 6), probe)
    for i in range(config.depth):
        at = f"attn/blocks.{i}"
        assert probe.values[f"{at}/q_norm"].item() == pytest.approx(math.sqrt(kappa * config.head_dim), rel=1e-4)
        assert probe.values[f"{at}/k_norm"].item() == pytest.approx(math.sqrt(kappa * config.head_dim), rel=1e-4)
        largest = kappa * math.sqrt(config.head_dim)
        assert probe.values[f"{at}/max_logit"].item() == pytest.approx(largest, rel=1e-4)


@pytest.mark.parametrize("qk_norm", ["head", "off"])
def test_kappa_survives_queries_that_start_at_zero(qk_norm: Any) -> None:
    """planted: full muParam starts q at zero; a bare division by its RMS is 0/0."""
    config = dataclasses.replace(SMALL, qk_norm=qk_norm, mup="full", logit_scale=1e3)
    model = build(config)
    params = {name: value.requires_grad_() for name, value in start(model).items()}
    out = model(params, tokens(1, 2, 6))
    assert out.isfinite().all()
    grads = torch.autograd.grad(out.square().sum(), list(params.values()))
    assert all(grad.isfinite().all() for grad in grads)


def test_qk_norm_bounds_the_logits() -> None:
    """contract: at unit gain no logit exceeds sqrt(E), however large the weights; without it they explode."""
    largest = {}
    for qk_norm in ("head", "off"):
        model = build(dataclasses.replace(SMALL, qk_norm=qk_norm))
        params = start(model)
        for name in params:
            if name.endswith("qkv"):
                params[name].mul_(1e4)
        probe = Probe(1)
        model(params, tokens(1, 4, 6), probe)
        largest[qk_norm] = max(probe.values[f"attn/blocks.{i}/max_abs_logit"].item() for i in range(2))
    assert largest["head"] <= math.sqrt(SMALL.head_dim) * (1 + 1e-12)
    assert largest["off"] > 1e6


@pytest.mark.parametrize("width", [64, 256, 512])
@pytest.mark.parametrize("mup", ["off", "simple", "intermediate", "full"])
def test_mup_follows_the_table(width: int, mup: Any) -> None:
    """contract: section 3.2 of the paper: r = 256 / width on every matrix, the head's std, q at 0, scale 1/d_h."""
    config = DecoderConfig(width=width, depth=1, heads=4, mup=mup)
    model = build(config)
    ratio = 1.0 if mup == "off" else 256 / width
    head_std = width**-0.5 if mup in ("off", "simple") else math.sqrt(256) / width
    for spec in model.specs():
        gain_or_embedding = len(spec.shape) == 1 or spec.name == "embed"
        assert spec.lr_scale == (1.0 if gain_or_embedding else ratio), spec.name
        if spec.name == "head":
            assert spec.std == pytest.approx(head_std)
        elif spec.name.endswith("attn.q"):
            assert (mup, spec.std) == ("full", 0)
        elif len(spec.shape) == 1:
            assert spec.std is None
        else:  # matrices are [fan_in, fan_out]; the embedding's std is 1/sqrt(D), not cut
            fan_in = width if spec.name == "embed" else spec.shape[0]
            assert spec.std == pytest.approx(fan_in**-0.5)
            assert spec.truncated == (spec.name != "embed")
    names = {spec.name for spec in model.specs()}
    assert ("blocks.0.attn.q" in names) == (mup == "full")
    assert model.attention_scale == pytest.approx(1 / config.head_dim if mup == "full" else config.head_dim**-0.5)


def test_full_mup_starts_at_even_attention() -> None:
    """oracle: q = 0 gives position t the weight 1/(t+1) on each key, so the entropy is the mean of ln(t+1)."""
    model, probe = build(dataclasses.replace(SMALL, mup="full")), Probe(1)
    model(start(model), tokens(1, 2, 6), probe)
    assert probe.values["attn/blocks.0/entropy"].item() == pytest.approx(sum(math.log(t + 1) for t in range(6)) / 6)


@pytest.mark.parametrize("mup", ["off", "full"])
@pytest.mark.parametrize(("width", "depth"), [(16, 1), (32, 3), (64, 2)])
def test_block_parameters_are_12_L_d_squared(width: int, depth: int, mup: Any) -> None:
    """oracle: Kaplan's count, and the gains: two a block, d_h for q and for k, one at the end."""
    config = DecoderConfig(width=width, depth=depth, heads=4, mup=mup)
    specs = build(config).specs()
    matrices = [s.size for s in specs if s.name.startswith("blocks") and len(s.shape) == 2]
    assert sum(matrices) == 12 * depth * width**2
    gains = [s.size for s in specs if len(s.shape) == 1]
    assert sum(gains) == depth * (2 * width + 2 * config.head_dim) + width
    assert sum(s.size for s in specs) == sum(matrices) + sum(gains) + 2 * 11 * width


def test_bf16_layout_keeps_residual_stream_and_head_whole() -> None:
    """equivalence: with bf16 matmuls a network without blocks is the same bits; one with blocks stays near.

    Near: 0.1 on logits of unit variance after two blocks of matmuls rounded at 2^-9; float32 differs by 1e-6.
    """
    ids = tokens(2, 2, 6)
    for depth in (0, 2):
        config = dataclasses.replace(SMALL, depth=depth)
        outs = []
        for matmul in ("params", "bfloat16"):
            model = build(config, precision=PrecisionConfig(matmul=matmul))
            params = start(model, 1, 2)
            for spec in model.specs():
                if spec.role == "matmul":
                    params[spec.name] = params[spec.name].to(model.dtypes.matmul)
            outs.append(model(params, ids))
        assert outs[1].dtype == torch.float32
        difference = (outs[0] - outs[1]).abs().max().item()
        assert difference == 0 if depth == 0 else 1e-4 < difference < 0.1


class PlainAttention(nn.Module):
    """Attention as a textbook writes it; rotary positions by complex numbers."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        D, self.config = config.width, config
        self.query, self.key, self.value, self.out = (nn.Linear(D, D, bias=False) for _ in range(4))
        size = {"head": config.head_dim, "width": D, "off": 1}[config.qk_norm]
        self.q_norm, self.k_norm = (nn.LayerNorm(size, eps=config.norm_eps, bias=False) for _ in range(2))

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        H, E = self.config.heads, self.config.head_dim
        q, k, v = self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
        if self.config.qk_norm == "width":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.view(B, T, H, E).transpose(1, 2) for y in (q, k, v))
        if self.config.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.turn(q), self.turn(k)
        scale = 1 / E if self.config.attention_scale == "inverse" else None
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return self.out(mixed.transpose(1, 2).reshape(B, T, D))

    def turn(self, x: Tensor) -> Tensor:
        T, E = x.shape[-2:]
        pair = torch.arange(E // 2, dtype=x.dtype)
        angle = torch.arange(T, dtype=x.dtype)[:, None] * self.config.rope_base ** (-2 * pair / E)
        z = torch.complex(x[..., : E // 2], x[..., E // 2 :]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([z.real, z.imag], dim=-1)


class PlainDecoder(nn.Module):
    """An independent statement of the architecture: one replica, torch's own layers."""

    def __init__(self, config: DecoderConfig, vocab_size: int) -> None:
        super().__init__()
        D = config.width

        def layer_norm() -> nn.LayerNorm:
            return nn.LayerNorm(D, eps=config.norm_eps, bias=False)

        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"
        self.embed = nn.Embedding(vocab_size, D)
        self.attn_norms = nn.ModuleList(layer_norm() for _ in range(config.depth))
        self.attns = nn.ModuleList(PlainAttention(config) for _ in range(config.depth))
        self.mlp_norms = nn.ModuleList(layer_norm() for _ in range(config.depth))
        self.ups = nn.ModuleList(nn.Linear(D, config.mlp_ratio * D, bias=False) for _ in range(config.depth))
        self.downs = nn.ModuleList(nn.Linear(config.mlp_ratio * D, D, bias=False) for _ in range(config.depth))
        self.final_norm, self.head = layer_norm(), nn.Linear(D, vocab_size, bias=False)

    def forward(self, ids_BT: Tensor) -> Tensor:
        x = self.embed(ids_BT)
        for i, attention in enumerate(self.attns):
            x = x + attention(self.attn_norms[i](x))
            x = x + self.downs[i](F.gelu(self.ups[i](self.mlp_norms[i](x)), approximate=self.approximate))
        return self.head(self.final_norm(x))

    def by_our_names(self, of: Any) -> dict[str, Tensor]:
        """`of(parameter)` for every tensor of the fleet's layout, transposed and joined as there."""
        named = {
            "embed": of(self.embed.weight),
            "final_norm": of(self.final_norm.weight),
            "head": of(self.head.weight).T,
        }
        for i, attention in enumerate(self.attns):
            assert isinstance(attention, PlainAttention)
            at, norms = f"blocks.{i}", (self.attn_norms[i], self.mlp_norms[i])
            named[f"{at}.attn.norm"], named[f"{at}.mlp.norm"] = (of(norm.weight) for norm in norms)
            parts = (attention.query, attention.key, attention.value)
            named[f"{at}.attn.qkv"] = torch.cat([of(part.weight).T for part in parts], dim=1)
            named[f"{at}.attn.out"] = of(attention.out.weight).T
            named[f"{at}.mlp.in"], named[f"{at}.mlp.out"] = of(self.ups[i].weight).T, of(self.downs[i].weight).T
            if attention.config.qk_norm != "off":
                named[f"{at}.attn.q_gain"], named[f"{at}.attn.k_gain"] = (
                    of(norm.weight) for norm in (attention.q_norm, attention.k_norm)
                )
        return named


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        dataclasses.replace(SMALL, qk_norm="width", activation="gelu"),
        dataclasses.replace(
            SMALL, qk_norm="off", attention_scale="inverse", mlp_ratio=3, rope_base=50.0, norm_eps=1e-3
        ),
        dataclasses.replace(SMALL, heads=1, depth=1),
    ],
    ids=lambda c: f"{c.qk_norm}-{c.activation}-{c.heads}",
)
@pytest.mark.parametrize("replicas", [1, 3])
def test_equivalence_with_a_plain_module(config: DecoderConfig, replicas: int) -> None:
    """equivalence: the same weights give the same loss and the same gradient of every tensor, in float64 to 1e-10."""
    ids = tokens(replicas, 2, 7)
    z_K = torch.linspace(0, 0.1, replicas, dtype=torch.float64)
    plains, losses = [], []
    for k in range(replicas):
        torch.manual_seed(k)
        plain = PlainDecoder(config, 11).double()
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                if "norm" in name:  # gains of one would hide a gain in the wrong place
                    parameter.uniform_(0.5, 1.5)
        out = plain(ids[k, :, :-1]).flatten(0, 1)
        ce = F.cross_entropy(out, ids[k, :, 1:].flatten())
        losses.append(ce + z_K[k] * out.logsumexp(-1).square().mean())
        losses[-1].backward()
        plains.append(plain)
    model = build(config)
    rows = [plain.by_our_names(lambda parameter: parameter.detach()) for plain in plains]
    assert set(rows[0]) == {spec.name for spec in model.specs()}
    params = {name: torch.stack([row[name] for row in rows]).requires_grad_() for name in rows[0]}
    loss = token_loss(model(params, ids[..., :-1]), ids[..., 1:].flatten(1), z_K, dtype=torch.float64)
    torch.testing.assert_close(loss.total_K, torch.stack(losses), rtol=1e-10, atol=1e-10)
    grads = torch.autograd.grad(loss.total_K.sum(), list(params.values()))
    plain_grads = [plain.by_our_names(lambda parameter: parameter.grad) for plain in plains]
    for name, ours in zip(params, grads, strict=True):
        torch.testing.assert_close(ours, torch.stack([g[name] for g in plain_grads]), rtol=1e-10, atol=1e-10)
