"""The zoo's nets: seeded, causal, the same by either attention, and watched without being changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from aftershock.lab.zoo import nets
from aftershock.lab.zoo.nets import ByteLM, ModularMlp, TanhNet, Text, seeded, token_loss
from aftershock.signals.attention import probe_attention


@pytest.mark.parametrize("make", [ByteLM, TanhNet, lambda: ModularMlp(7)])
def test_a_seed_gives_the_same_net_whatever_was_drawn_before(make: type[nn.Module]) -> None:
    """contract: and the random numbers of the caller go on as if nothing had been made."""
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = seeded(1, make)
    assert torch.equal(torch.rand(3), expected)
    second, other = seeded(1, make), seeded(2, make)
    pairs = list(zip(first.parameters(), second.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


def test_text_is_a_pure_function_of_seed_and_index() -> None:
    """contract: any order, any object; targets are the bytes after the inputs."""
    text = Text(seed=3, batch_size=4)
    late = text.batch(9)
    text.batch(0)
    again = Text(seed=3, batch_size=4).batch(9)
    assert torch.equal(late.inputs_BT, again.inputs_BT)
    assert torch.equal(late.targets_BT, again.targets_BT)
    assert torch.equal(late.inputs_BT[:, 1:], late.targets_BT[:, :-1])
    assert not torch.equal(late.inputs_BT, text.batch(8).inputs_BT)
    assert torch.equal(text.held_out(4).inputs_BT, Text(seed=4, batch_size=4).held_out(4).inputs_BT)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_explicit_attention_is_sdpa(qk_norm: bool) -> None:
    """equivalence: loss and gradients."""
    batch = Text(seed=0, batch_size=2).batch(0)
    found = []
    for attention in ("sdpa", "explicit"):
        model = seeded(0, lambda kernel=attention: ByteLM(qk_norm=qk_norm, attention=kernel))
        token_loss(model, batch).backward()
        found.append([p.grad for p in model.parameters()])
    for fused, plain in zip(*found, strict=True):
        # float32 sums of 64 terms in another order; a dropped mask or scale is off by tenths
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-6)


def test_no_position_sees_a_later_byte() -> None:
    """property: changing byte 40 leaves the logits before it alone, and changes those from it on."""
    for attention in ("sdpa", "explicit"):
        model = seeded(0, lambda kernel=attention: ByteLM(attention=kernel))
        tokens_BT = Text(seed=0, batch_size=1).batch(0).inputs_BT
        other_BT = tokens_BT.clone()
        other_BT[0, 40] += 1
        moved_T = (model(tokens_BT) - model(other_BT)).detach().abs().amax(-1)[0] > 0
        assert not moved_T[:40].any()
        assert moved_T[40:].all()


@pytest.mark.parametrize("attention", ["sdpa", "explicit"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_max_logit_is_what_the_probe_finds(attention: nets.Kernel, qk_norm: bool) -> None:
    """oracle: the softmax inputs that the dispatcher sees; and watching changes no bit of loss or gradient."""
    batch = Text(seed=0, batch_size=2).batch(0)
    losses, grads = [], []
    for watch in (False, True):
        model = seeded(0, lambda: ByteLM(qk_norm=qk_norm, attention=attention))
        model.watch = watch
        loss = token_loss(model, batch)
        loss.backward()
        losses.append(loss.detach())
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    probed = probe_attention(model, lambda: model(batch.inputs_BT), "blocks.*.attention").read()
    expected = max(value for name, value in probed.items() if name.endswith("attention/max_logit"))
    # both in float32, scaled before or after the product
    assert model.max_logit() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(grads[0], grads[1])


def test_qk_norm_bounds_the_logits() -> None:
    """property: at most sqrt(E) = 4 however large W_q and W_k are; without it they grow with both."""
    found = {}
    for qk_norm in (False, True):
        model = seeded(0, lambda norm=qk_norm: ByteLM(qk_norm=norm))
        with torch.no_grad():
            for block in model.blocks:
                block.get_parameter("attention.query_key.weight").mul_(100)
        model.watch = True
        model(Text(seed=0, batch_size=2).batch(0).inputs_BT)
        found[qk_norm] = model.max_logit()
    assert found[True] <= 4 * (1 + 1e-5)  # rounding of a float32 norm
    assert found[False] > 1000


def test_asking_without_watching_is_an_error() -> None:
    """contract: also after the watch was ended."""
    model = seeded(0, ByteLM)
    tokens_BT = torch.zeros(1, 8, dtype=torch.int64)
    model(tokens_BT)
    with pytest.raises(ValueError, match="set model.watch = True"):
        model.max_logit()
    model.watch = True
    model(tokens_BT)
    model.watch = False
    with pytest.raises(ValueError, match="set model.watch = True"):
        model.max_logit()


def test_low_precision_is_where_it_was_asked_for() -> None:
    """contract: bf16 softmax and bf16 logits each change the loss a little, and sdpa refuses the first."""
    batch = Text(seed=0, batch_size=2).batch(0)
    plain = token_loss(seeded(0, lambda: ByteLM(attention="explicit")), batch).item()
    rough = seeded(0, lambda: ByteLM(attention="explicit", softmax_dtype=torch.bfloat16))
    for loss in (token_loss(rough, batch), token_loss(seeded(0, ByteLM), batch, dtype=torch.bfloat16)):
        assert loss.dtype == torch.float32
        assert loss.item() != plain
        # bf16 keeps 8 bits: numbers from 4 to 8 are a 32nd apart, and more than one is rounded
        assert loss.item() == pytest.approx(plain, abs=1 / 16)
    with pytest.raises(ValueError, match="attention='explicit'"):
        ByteLM(softmax_dtype=torch.bfloat16)


def test_sums_are_all_pairs_once() -> None:
    """property: train and held out together are the whole table, rightly added; the seed moves the split."""
    train, rest = nets.sums(11, seed=0)
    pairs = [*zip(train.a_N.tolist(), train.b_N.tolist(), train.sum_N.tolist(), strict=True)]
    pairs += zip(rest.a_N.tolist(), rest.b_N.tolist(), rest.sum_N.tolist(), strict=True)
    assert sorted(pairs) == [(a, b, (a + b) % 11) for a in range(11) for b in range(11)]
    assert len(train.a_N) == 60  # round(121 / 2), to even
    assert not torch.equal(nets.sums(11, seed=1)[0].a_N, train.a_N)


def test_the_loss_of_each_net_at_the_start() -> None:
    """oracle: near log V for fresh classifiers, near the variance of the curve for a net that puts out little."""
    train, _ = nets.sums(59, seed=0)
    # log 59 = 4.08, log 256 = 5.55; random logits of deviation up to 0.6 add up to half their variance
    assert nets.sum_loss(seeded(0, lambda: ModularMlp(59)), train).item() == pytest.approx(4.08, abs=0.2)
    assert token_loss(seeded(0, ByteLM), Text(seed=0, batch_size=2).batch(0)).item() == pytest.approx(5.55, abs=0.3)
    curve = nets.two_sines()
    # the mean square of two sines is 1 over a period; a fresh net of output deviation about 0.6 adds or takes some
    assert nets.curve_loss(seeded(0, TanhNet), curve).item() == pytest.approx(1.0, abs=0.6)
