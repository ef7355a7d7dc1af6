"""The attention probe: hand-made scores as the oracle, every kernel the same numbers, nothing left behind."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aftershock.signals.attention import probe_attention

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="needs transformers, an optional package"
)


def _slow(scores_BHTS: Tensor) -> tuple[list[float], list[float]]:
    """Max logit and mean entropy per head, query by query; -inf is a masked key."""
    tops, entropies = [], []
    for head in range(scores_BHTS.shape[1]):
        rows = [row[row > -math.inf].double() for row in scores_BHTS[:, head].flatten(0, 1)]
        tops.append(max(float(row.max()) for row in rows))
        parts = [float(-(row.softmax(0) * row.log_softmax(0)).sum()) for row in rows]
        entropies.append(sum(parts) / len(parts))
    return tops, entropies


def _same(got: dict[str, float], place: str, scores_BHTS: Tensor) -> None:
    tops, entropies = _slow(scores_BHTS.detach())
    for head, (top, entropy) in enumerate(zip(tops, entropies, strict=True)):
        assert got[f"attn/{place}.head{head}/max_logit"] == pytest.approx(top, rel=1e-4, abs=1e-5)  # float32 scores
        assert got[f"attn/{place}.head{head}/entropy"] == pytest.approx(entropy, rel=1e-4)
    assert got[f"attn/{place}/max_logit"] == pytest.approx(max(tops), rel=1e-4, abs=1e-5)
    assert got[f"attn/{place}/entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-4)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_oracle(kit: Any, kernel: str) -> None:
    model = kit.decoder(kernel)
    seen: dict[int, Tensor] = {}
    reading = probe_attention(model, lambda: model(kit.tokens(0)[:2, :-1]), "blocks.*.attn").read()
    model.eval()
    for index, block in enumerate(model.blocks):
        hook: Callable[..., None] = lambda m, args, index=index: seen.update({index: m.scores(args[0])[0]})  # noqa: E731
        block.attn.register_forward_pre_hook(hook)
    model(kit.tokens(0)[:2, :-1])
    assert len(reading) == 2 * 2 * (3 + 1)
    for index, scores in seen.items():
        _same(reading, f"blocks.{index}.attn", scores)


def test_bf16_and_grouped_queries() -> None:
    class Grouped(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, k, enable_gqa=True, scale=0.5)

    model = nn.ModuleDict({"attn": Grouped()})
    q, k = torch.randn(2, 4, 5, 8).bfloat16(), torch.randn(2, 2, 5, 8).bfloat16()
    got = probe_attention(model, lambda: model["attn"](q, k), "attn").read()
    scores = q.float() @ k.float().repeat_interleave(2, 1).mT * 0.5
    tops, _ = _slow(scores)
    assert [got[f"attn/attn.head{h}/max_logit"] for h in range(4)] == pytest.approx(tops, rel=0.02)  # bf16: 3 digits


@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention_and_the_fused_encoder_layer(need_weights: bool) -> None:
    torch.manual_seed(0)
    attn = nn.MultiheadAttention(12, 3, batch_first=True)
    layer = nn.TransformerEncoderLayer(12, 3, 24, batch_first=True)
    x = torch.randn(2, 5, 12)
    model = nn.ModuleDict({"attn": attn, "layer": layer})

    def run() -> None:
        attn(x, x, x, need_weights=need_weights)
        layer(x)

    got = probe_attention(model, run, ["attn", "layer.self_attn"]).read()
    q, k, _ = (x @ attn.in_proj_weight.T + attn.in_proj_bias).view(2, 5, 3, 3, 4).permute(2, 0, 3, 1, 4)
    _same(got, "attn", q @ k.mT / 2)
    assert "attn/layer.self_attn.head2/entropy" in got
    assert torch.backends.mha.get_fastpath_enabled()


def test_masked_queries_are_not_counted() -> None:
    """planted: a query that may see no key, masked by -inf and by the dtype's lowest number."""

    class Masked(nn.Module):
        def forward(self, scores: Tensor) -> Tensor:
            return scores.softmax(-1)

    scores = torch.tensor([[[[9.0, 1.0], [-math.inf, -math.inf]]]])
    for masked in (scores, scores.nan_to_num(neginf=torch.finfo(torch.float32).min)):
        model = nn.ModuleDict({"attn": Masked()})
        got = probe_attention(model, lambda m=model, x=masked: m["attn"](x), "attn").read()
        (_, (entropy,)) = _slow(scores[:, :, :1])  # log 2, from the other query, would be 200 times as large
        assert got == {"attn/attn/max_logit": 9.0, "attn/attn/entropy": pytest.approx(entropy, rel=1e-4)}


def test_training_keeps_its_bits(kit: Any) -> None:
    """equivalence: a probe between steps draws no dice, moves no buffer, changes no mode and no gradient."""

    def trained(probed: bool) -> list[bytes]:
        model = nn.Sequential(kit.decoder(), nn.BatchNorm1d(8))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        torch.manual_seed(1)
        for step in range(3):
            model(kit.tokens(step)[:, :-1]).square().mean().backward()
            if probed:
                reading = probe_attention(model, lambda: model(kit.tokens(9)[:1, :-1]), "0.blocks.*.attn")
                assert len(reading.read()) == 16
            optimizer.step()
            optimizer.zero_grad()
        assert all(module.training for module in model.modules())
        tensors = [*model.parameters(), *model.buffers(), torch.get_rng_state()]
        return [x.detach().numpy().tobytes() for x in tensors]

    assert trained(True) == trained(False)


def test_a_place_without_attention_is_an_error_and_hooks_are_gone(kit: Any) -> None:
    model = kit.decoder()
    with pytest.raises(ValueError, match="blocks.0.mlp, blocks.1.mlp ran no softmax over attention scores"):
        probe_attention(model, lambda: model(kit.tokens(0)[:1, :-1]), "blocks.*.mlp")
    with pytest.raises(RuntimeError, match="mine"):
        probe_attention(model, _raises, "blocks.*.attn")
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert model.training
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


def _raises() -> None:
    raise RuntimeError("mine")


@needs_transformers
@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_hugging_face_models_eager_and_sdpa_agree(family: str) -> None:
    """equivalence: random weights from a config; both kernels, and the attention weights the eager model returns."""
    import transformers  # pyright: ignore[reportMissingImports]

    if family == "llama":
        config = transformers.LlamaConfig(
            vocab_size=31,
            max_position_embeddings=16,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        places = "model.layers.*.self_attn"
    else:
        config = transformers.GPT2Config(vocab_size=31, n_positions=16, n_embd=16, n_layer=2, n_head=4)
        places = "transformer.h.*.attn"
    batch = torch.randint(0, 31, (2, 9), generator=torch.Generator().manual_seed(0))
    readings, weights = [], None
    for kernel in ("eager", "sdpa"):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=kernel)
        with torch.no_grad():  # sharper than the initial 0.02
            for p in model.parameters():
                p.mul_(8)
        readings.append(probe_attention(model, lambda m=model: m(batch, use_cache=False), places).read())
        if kernel == "eager":
            with torch.no_grad():
                weights = model.eval()(batch, use_cache=False, output_attentions=True).attentions
    eager, sdpa = readings
    assert eager.keys() == sdpa.keys()
    assert len(eager) == 2 * 2 * (4 + 1)
    for name, value in eager.items():
        assert sdpa[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name  # float32, another order of sums
    assert weights is not None
    for layer, weights_BHTS in enumerate(weights):
        entropy = torch.special.entr(weights_BHTS).sum(-1).mean()
        place = places.replace("*", str(layer))
        assert eager[f"attn/{place}/entropy"] == pytest.approx(float(entropy), rel=1e-4)
