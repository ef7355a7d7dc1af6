"""QK-clip, embedding shrink and the switches, against what their definitions make of weights and settings."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aftershock.guard.policies.embedding import EmbeddingShrink
from aftershock.guard.policies.qk_clip import QKClip, grouped, latent, probed
from aftershock.guard.policies.switches import BetaSwitch, DecaySwitch, Dial, EpsSwitch, PrecisionSwitch, ZLossSwitch
from aftershock.guard.policy import CONTINUE, Continue, Live, Seen, SkipStep

ROW = Seen(0, 0, 1.0, 1.0, 0.1, 1e-3, {}, None, ())


class GroupedAttention(nn.Module):
    """4 query heads, 2 key heads, width 3."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 12), nn.Linear(8, 6), nn.Linear(8, 6)

    def scores(self, x_TC: Tensor) -> Tensor:
        q = self.q(x_TC).view(-1, 4, 3).transpose(0, 1)
        k = self.k(x_TC).view(-1, 2, 3).transpose(0, 1).repeat_interleave(2, 0)
        return q @ k.mT / math.sqrt(3)

    def forward(self, x_TC: Tensor) -> Tensor:
        v = self.v(x_TC).view(-1, 2, 3).transpose(0, 1).repeat_interleave(2, 0)
        return (self.scores(x_TC)[None].softmax(-1)[0] @ v).transpose(0, 1).flatten(1)


def _live(model: nn.Module) -> Live:
    return Live(model, torch.optim.AdamW(model.parameters()), dict(model.named_parameters()))


@pytest.mark.parametrize("alpha", [0.5, 0.2])
def test_qk_clip_brings_the_largest_logit_of_each_group_to_tau(alpha: float) -> None:
    """equivalence: the scores after the clip are r times those before, one r a group, through weights and biases."""
    torch.manual_seed(0)
    model, x = GroupedAttention(), torch.randn(5, 8)
    before = model.scores(x).detach()
    tops = before.flatten(1).amax(1)
    tau = float(tops.view(2, 2).amax(1).mean())  # between the two groups: one is clipped, one is not
    layers = [
        grouped("attn", query=f"q.{kind}", key=f"k.{kind}", heads=4, key_heads=2, width=3, alpha=alpha)
        for kind in ("weight", "bias")
    ]
    policy = QKClip(layers=layers, max_logits=lambda: {"attn": tops.tolist()}, tau=tau)
    action = policy.after_step(ROW, _live(model))
    assert "attn" in action.reason
    ratio = (tau / tops.view(2, 2).amax(1)).clamp(max=1.0)
    assert sorted(ratio.tolist())[0] < 1 == max(ratio.tolist())
    # Products of float32 weights.
    torch.testing.assert_close(
        model.scores(x).detach(), before * ratio.repeat_interleave(2)[:, None, None], rtol=1e-4, atol=1e-6
    )


def test_qk_clip_of_a_fused_projection_and_of_mla() -> None:
    """oracle: which rows get which power of r."""
    model = nn.Module()
    model.register_parameter("qkv", nn.Parameter(torch.ones(12, 2)))  # 2 heads of width 2: q 0..3, k 4..7, v 8..11
    layer = grouped("a", query="qkv", key="qkv", heads=2, key_heads=2, width=2, fused=True)
    QKClip(layers=[layer], max_logits=lambda: {"a": [400.0, 50.0]}).after_step(ROW, _live(model))
    assert model.get_parameter("qkv")[:, 0].tolist() == [0.5, 0.5, 1, 1, 0.5, 0.5, 1, 1, 1, 1, 1, 1]
    model = nn.Module()
    model.register_parameter("q", nn.Parameter(torch.ones(6, 1)))  # per head: 2 nope, 1 rope
    model.register_parameter("kv", nn.Parameter(torch.ones(8, 1)))  # per head: 2 nope, 2 value
    layer = latent("a", query="q", key_value="kv", heads=2, nope=2, rope=1, value=2)
    QKClip(layers=[layer], max_logits=lambda: {"a": [50.0, 400.0]}).after_step(ROW, _live(model))
    assert model.get_parameter("q").flatten().tolist() == [1, 1, 1, 0.5, 0.5, 0.25]
    assert model.get_parameter("kv").flatten().tolist() == [1, 1, 1, 1, 0.5, 0.5, 1, 1]


def test_qk_clip_reads_a_probe() -> None:
    """equivalence: the probe's maxima are the largest scores; `every` counts steps taken."""
    torch.manual_seed(0)
    model, x = nn.ModuleDict({"attn": GroupedAttention()}), torch.randn(5, 8)
    attn = model["attn"]
    assert isinstance(attn, GroupedAttention)
    found = probed(model, lambda: attn(x), "attn")()
    assert found["attn"] == pytest.approx(attn.scores(x).flatten(1).amax(1).tolist())
    layer = grouped("attn", query="attn.q.weight", key="attn.k.weight", heads=4, key_heads=2, width=3)
    policy = QKClip(layers=[layer], max_logits=probed(model, lambda: attn(x), "attn"), tau=1e-3, every=3)
    reasons = [policy.after_step(ROW, _live(model)).reason for _ in range(6)]
    assert [bool(reason) for reason in reasons] == [False, False, True, False, False, True]


def test_qk_clip_leaves_a_logit_that_is_not_finite_and_checks_names() -> None:
    """contract."""
    model = GroupedAttention()
    weight = model.q.weight.detach().clone()
    layer = grouped("attn", query="q.weight", key="k.weight", heads=4, key_heads=2, width=3)
    action = QKClip(layers=[layer], max_logits=lambda: {"attn": [math.nan, math.inf, -5.0, 1.0]}).after_step(
        ROW, _live(model)
    )
    assert "not finite: attn" in action.reason
    assert torch.equal(model.q.weight, weight)
    for found, match in (
        ({"atn": [1.0] * 4}, "did you mean 'atn'"),
        ({"attn": [1.0] * 3}, "3 max logits for the 4 heads"),
    ):
        with pytest.raises(ValueError, match=match):
            QKClip(layers=[layer], max_logits=lambda found=found: found).after_step(ROW, _live(model))
    wrong = grouped("attn", query="q.weight", key="k.weigth", heads=4, key_heads=2, width=3)
    with pytest.raises(ValueError, match=r"did you mean 'k\.weight'"):
        QKClip(layers=[wrong], max_logits=lambda: {"attn": [1e9] * 4}).after_step(ROW, _live(model))
    wide = grouped("attn", query="q.weight", key="k.weight", heads=4, key_heads=2, width=4)
    with pytest.raises(ValueError, match="too few"):
        QKClip(layers=[wide], max_logits=lambda: {"attn": [1e9] * 4}).after_step(ROW, _live(model))
    with pytest.raises(ValueError, match="no layers"):
        QKClip(layers=[], max_logits=dict)


def test_the_forward_form_is_glms() -> None:
    """equivalence: alpha E + (1 - alpha) stop_grad(E): output's bits, alpha times the gradient; as the other form."""
    torch.manual_seed(0)
    embed, tokens = nn.Embedding(7, 4), torch.tensor([1, 2, 2])
    plain = embed(tokens)
    plain.square().sum().backward()
    assert embed.weight.grad is not None
    grad = embed.weight.grad.clone()
    embed.zero_grad()
    policy = EmbeddingShrink(names=(), alpha=0.25)
    handle = policy.attach(embed)
    shrunk = embed(tokens)
    assert torch.equal(shrunk, plain)
    shrunk.square().sum().backward()
    assert torch.equal(embed.weight.grad, 0.25 * grad)  # a power of two: exact
    handle.remove()
    embed.weight.grad = grad.clone()
    model = nn.ModuleDict({"embed": embed})
    EmbeddingShrink(names=("embed.weight",), alpha=0.25).before_step(ROW, _live(model))
    assert torch.equal(embed.weight.grad, 0.25 * grad)


def test_a_tied_embedding_is_refused_in_the_gradient_form_and_keeps_the_heads_share_in_the_other() -> None:
    """planted: one tensor at both ends."""
    torch.manual_seed(0)
    embed, head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
    head.weight = embed.weight
    model = nn.ModuleDict({"embed": embed, "head": head})
    tokens = torch.tensor([1, 2])
    policy = EmbeddingShrink(names=(), alpha=0.0)
    policy.attach(embed)
    head(embed(tokens)).sum().backward()
    assert embed.weight.grad is not None
    # Only the head's share is left: the sum of the inputs, for each class.
    want = embed.weight[tokens].sum(0).detach().expand(7, 4)
    torch.testing.assert_close(embed.weight.grad, want)
    with pytest.raises(ValueError, match="are one tensor"):
        EmbeddingShrink(names=("embed.weight",)).before_step(ROW, _live(model))
    with pytest.raises(ValueError, match="would do nothing"):
        EmbeddingShrink(names=()).before_step(ROW, _live(model))


def test_under_adam_a_constant_alpha_hardly_matters_and_a_change_does(kit: Any) -> None:
    """planted: the caveat. Adam divides a constant factor out again; SGD does not, and Adam feels alpha change."""

    def moved(policy: Any, optimizer: str) -> float:
        loop = kit.Loop(optimizer=optimizer, lr=1e-3, **({"eps": 1e-12} if optimizer == "adamw" else {}))
        loop.run(policy, 1)
        start = loop.weights()["embed.weight"]
        loop.run(policy, 5)
        return float((loop.weights()["embed.weight"] - start).norm())

    constant = {kind: moved(EmbeddingShrink(alpha=0.1), kind) / moved(None, kind) for kind in ("adamw", "sgd")}
    assert constant["adamw"] == pytest.approx(1.0, abs=0.005)  # decay and eps remain
    assert constant["sgd"] == pytest.approx(0.1, abs=0.02)  # the path bends a little
    assert abs(moved(EmbeddingShrink(alpha=0.1, steps=4), "adamw") / moved(None, "adamw") - 1) > 0.02


def test_alpha_rises_to_one() -> None:
    """contract: linear over `steps` accepted steps."""
    model = nn.ModuleDict({"embed": nn.Embedding(3, 2)})
    policy, found = EmbeddingShrink(alpha=0.5, steps=4), []
    for _ in range(6):
        found.append(policy.alpha_now)
        policy.before_step(ROW, _live(model))
        policy.after_step(ROW, _live(model))
    assert found == [0.5, 0.625, 0.75, 0.875, 1.0, 1.0]


@pytest.mark.parametrize("moments", ["keep", "recompute"])
def test_beta_switch_keeps_or_recomputes(kit: Any, moments: Any) -> None:
    """oracle: v stays as stored, or v / (1 - beta2^t) stays."""
    loop = kit.Loop(betas=(0.9, 0.999)).run(None, 5)
    before = {n: loop.optimizer.state[p]["exp_avg_sq"].clone() for n, p in loop.model.named_parameters()}
    policy = BetaSwitch(beta2=0.95, moments=moments, at=5)
    loop.run(None, 0)
    loop.model.zero_grad()
    action = policy.before_step(ROW._replace(step=5), loop.live)
    assert "betas (0.9, 0.999) -> (0.9, 0.95)" in action.reason
    assert loop.optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    factor = (1 - 0.95**5) / (1 - 0.999**5) if moments == "recompute" else 1.0
    for name, param in loop.model.named_parameters():
        # float32 moments.
        torch.testing.assert_close(
            loop.optimizer.state[param]["exp_avg_sq"], factor * before[name], rtol=1e-5, atol=1e-12
        )
    assert policy.before_step(ROW, loop.live) == CONTINUE


def test_a_restore_that_brings_old_betas_back_is_undone_and_told(kit: Any) -> None:
    """planted: OPT-175B trained on with betas that the checkpoint had overwritten."""
    loop = kit.Loop()
    policy = BetaSwitch(beta1=0.5, at=0)
    loop.run(policy, 3)
    loop.optimizer.param_groups[0]["betas"] = (0.9, 0.999)
    loop.run(policy, 1)
    assert "a restore had undone it" in loop.actions[-2].reason
    assert loop.optimizer.param_groups[0]["betas"] == (0.5, 0.999)


def test_switches_fire_at_an_alarm_or_at_a_step_also_if_that_step_is_skipped(kit: Any) -> None:
    """contract: ALARM includes a NaN; a loss that shifts is none."""
    calls: list[Any] = []
    loop = kit.Loop()
    policy = PrecisionSwitch(apply=calls.append, steps=3)
    loop.run(policy, 5, verdicts={2: {"loss": "shift"}})
    assert calls == []
    loop.run(policy, 1, fault=kit.poison(5, math.nan))
    assert isinstance(loop.actions[-1], SkipStep)
    assert "precision torch.float32" in loop.actions[-1].reason
    assert calls == [torch.float32]
    loop.run(policy, 3)
    assert calls == [torch.float32, None]
    assert "as before" in loop.actions[-1].reason
    loop.run(policy, 5)
    assert len(calls) == 2
    at = PrecisionSwitch(apply=calls.append, at=17, steps=2)
    loop.run(at, 10)
    assert calls[2:] == [torch.float32, None]


def test_eps_switch_per_group_and_when_gradients_near_it(kit: Any) -> None:
    """contract: both directions, only the named group, and `below` reads RMS(g) per tensor."""
    loop = kit.Loop()
    params = dict(loop.model.named_parameters())
    embed, rest = [params["embed.weight"]], [p for n, p in params.items() if n != "embed.weight"]
    loop.optimizer = torch.optim.AdamW([{"params": embed}, {"params": rest}], lr=1e-2, eps=1e-8)
    loop.run(EpsSwitch(eps=1e-5, names=("embed*",), at=0), 1)
    assert [group["eps"] for group in loop.optimizer.param_groups] == [1e-5, 1e-8]
    near = EpsSwitch(eps=1e-15, names=("embed*",), below=10.0)
    loop.run(near, 1)
    assert loop.optimizer.param_groups[0]["eps"] == 1e-5  # RMS(g) is about 0.1
    loop.run(near, 1, fault=lambda batch, model: model.embed.weight.grad.mul_(1e-4))
    assert [group["eps"] for group in loop.optimizer.param_groups] == [1e-15, 1e-8]
    with pytest.raises(ValueError, match="part of a parameter group"):
        kit.Loop().run(EpsSwitch(eps=1e-6, names=("embed*",), at=0), 1)
    loop.optimizer = torch.optim.SGD(loop.model.parameters(), lr=1e-2)
    for switch in (EpsSwitch(eps=1e-6, at=0), EpsSwitch(eps=1e-15, below=10.0)):
        with pytest.raises(ValueError, match="SGD has no eps"):
            loop.run(switch, 1)


def test_decay_switch_in_a_shared_group_equals_a_group_of_its_own(kit: Any) -> None:
    """equivalence: giving the decay back after AdamW is training without it; the others decay on."""
    shared = kit.Loop(weight_decay=0.5, cooling=0.8).run(DecaySwitch(at=0), 10)
    own = kit.Loop(cooling=0.8)
    params = dict(own.model.named_parameters())
    rest = [p for n, p in params.items() if n != "embed.weight"]
    own.optimizer = torch.optim.AdamW(
        [{"params": [params["embed.weight"]]}, {"params": rest}], lr=1e-2, weight_decay=0.5
    )
    own.run(DecaySwitch(at=0), 10)
    assert own.optimizer.param_groups[0]["weight_decay"] == 0
    for name, weight in shared.weights().items():
        # float32, and ten roundings of the decay taken off and given back.
        torch.testing.assert_close(weight, own.weights()[name], rtol=1e-5, atol=1e-6)
    with_decay = kit.Loop(weight_decay=0.5, cooling=0.8).run(None, 10)
    assert not torch.allclose(with_decay.weights()["embed.weight"], shared.weights()["embed.weight"], rtol=1e-3)
    with pytest.raises(ValueError, match="coupled"):
        kit.Loop(optimizer="sgd", weight_decay=0.1).run(DecaySwitch(at=0), 1)


def test_z_loss_rises_over_its_ramp(kit: Any) -> None:
    """contract: the loop reads the dial before each forward; from 0 in equal parts, then constant."""
    dial = Dial()
    policy, loop, found = ZLossSwitch(dial=dial, coefficient=1e-4, ramp=4, at=2), kit.Loop(), []
    for _ in range(9):
        found.append(dial.value)
        loop.run(policy, 1)
    assert found == pytest.approx([0, 0, 0, 0.25e-4, 0.5e-4, 0.75e-4, 1e-4, 1e-4, 1e-4])
    assert sum(bool(a.reason) for a in loop.actions if isinstance(a, Continue)) == 1


@pytest.mark.parametrize(
    "build",
    [
        BetaSwitch,
        lambda: BetaSwitch(beta2=1.0),
        lambda: EmbeddingShrink(alpha=2.0),
        lambda: EpsSwitch(eps=-1.0),
        lambda: grouped("a", query="q", key="k", heads=5, key_heads=2, width=1),
    ],
)
def test_settings_are_checked(build: Any) -> None:
    """contract."""
    with pytest.raises(ValueError, match="nothing|must|evenly"):
        build()
