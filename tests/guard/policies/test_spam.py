"""SPAM and Stable-SPAM against optimizers written out element by element; the reset as a reaction."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from aftershock.guard.policies.spam import MomentumReset, Spam, StableSpam
from aftershock.guard.policy import Continue, SkipStep

BETA1, BETA2, LR, EPS = 0.9, 0.999, 1e-2, 1e-8


def one_tensor(grads: list[Tensor], policy: Any) -> list[Tensor]:
    """Weights after each step of AdamW without decay under `policy`."""
    from torch import nn

    from aftershock.guard.policy import Live, Seen

    weight = nn.Parameter(torch.zeros_like(grads[0]))
    model = nn.Module()
    model.register_parameter("w", weight)
    optimizer = torch.optim.AdamW([weight], lr=LR, betas=(BETA1, BETA2), eps=EPS, weight_decay=0.0)
    found = []
    for t, grad in enumerate(grads):
        weight.grad = grad.clone()
        row = Seen(t, t, 1.0, float(grad.norm()), math.nan, LR, {}, None, ())
        live = Live(model, optimizer, {"w": weight})
        assert isinstance(policy.before_step(row, live), Continue)
        optimizer.step()
        policy.after_step(row, live)
        found.append(weight.detach().clone())
    return found


def noisy(num: int, shape: tuple[int, ...], **spikes: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    grads = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(num)]
    for at, factor in spikes.items():
        grads[int(at[1:])].view(-1)[1] *= factor
    return grads


def test_spam_is_its_formula() -> None:
    """oracle: element clip by 50 v, zeroed every 30 steps, cosine restart over 12, no clip for 5; 100 steps."""
    grads = noisy(100, (2, 3), s3=1e4, s20=1e4, s33=1e4, s70=1e4)
    found = one_tensor(grads, Spam(period=30, threshold=50.0, warmup=12, grace=5))
    theta, m, v = (torch.zeros(2, 3, dtype=torch.float64) for _ in range(3))
    for t, grad in enumerate(grads):
        g, since = grad.clone(), t % 30
        if since == 0:
            m, v = torch.zeros_like(m), torch.zeros_like(v)
        elif since >= 5:
            for i in range(g.numel()):
                x, y = float(g.view(-1)[i]), float(v.view(-1)[i])
                if y > 0 and x * x > 50 * y:
                    g.view(-1)[i] = math.copysign(math.sqrt(50 * y), x)
        m, v = BETA1 * m + (1 - BETA1) * g, BETA2 * v + (1 - BETA2) * g * g
        m_hat, v_hat = m / (1 - BETA1 ** (t + 1)), v / (1 - BETA2 ** (t + 1))
        c = 0.99 * 0.5 * (1 + math.cos(math.pi * since / 12)) if t >= 30 and since < 12 else 0.0
        theta = theta - (1 - c) * LR * m_hat / (v_hat.sqrt() + EPS)
        # float64 on both sides; torch adds in another order.
        torch.testing.assert_close(found[t], theta, rtol=1e-9, atol=1e-12)


def test_spam_does_not_freeze_an_element_without_a_past() -> None:
    """planted: v = 0 (a token never seen); the source would clip its first gradient to 0, and each one after it."""
    grads = [torch.tensor([1.0, 0.0])] * 30 + [torch.tensor([1.0, 1.0])]
    found = one_tensor(grads, Spam())
    assert found[-2][1] == 0
    assert found[-1][1] < 0


def test_stable_spam_is_its_formula() -> None:
    """oracle: element and norm histories, moments zeroed every 40 with the gradient of that step put in; 100 steps."""
    grads = noisy(100, (2, 3), s3=100.0, s55=1e4)
    found = one_tensor(grads, StableSpam(period=40))
    theta, m, v = (torch.zeros(2, 3, dtype=torch.float64) for _ in range(3))
    most = a = b = 0.0
    age = 0
    for t, grad in enumerate(grads):
        g = grad.clone()
        top = float(g.abs().max())
        most = 0.999 * most + 0.001 * top
        most_hat = most / (1 - 0.999 ** (t + 1))
        for i in range(g.numel()):
            if abs(float(g.view(-1)[i])) > most_hat:
                g.view(-1)[i] *= most_hat / top
        norm = float(g.norm())
        a, b = 0.7 * a + 0.3 * norm, 0.9 * b + 0.1 * norm**2
        g = g / norm * (a / (1 - 0.7 ** (t + 1))) / (math.sqrt(b / (1 - 0.9 ** (t + 1))) + 1e-8)
        if t % 40 == 0:
            m, v, age = torch.zeros_like(m), torch.zeros_like(v), 0
        age += 1
        m, v = BETA1 * m + (1 - BETA1) * g, BETA2 * v + (1 - BETA2) * g * g
        theta = theta - LR * (m / (1 - BETA1**age)) / ((v / (1 - BETA2**age)).sqrt() + EPS)
        # float64, but the policy takes maxima and norms through the host.
        torch.testing.assert_close(found[t], theta, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", [Spam, StableSpam])
def test_the_gradient_of_a_reset_step_is_not_lost(kit: Any, kind: Any) -> None:
    """planted: in the reference of Stable-SPAM the stored moment is 0 right after the reset step."""
    loop = kit.Loop()
    loop.run(kind(period=10), 11)
    assert "moments zeroed" in loop.actions[-2].reason
    for param in loop.model.parameters():
        state = loop.optimizer.state[param]
        assert float(state["exp_avg"].norm()) > 0
        # Only this gradient is in it.
        torch.testing.assert_close(state["exp_avg"], 0.1 * param.grad, rtol=1e-5, atol=1e-9)  # float32


def test_the_reset_as_a_reaction_touches_only_what_fired(kit: Any) -> None:
    """planted: the inner weight's gradient x100, and a verdict; every other tensor keeps its moments' bits."""

    def fault(batch: int, model: Any) -> None:
        if batch == 40:
            model.inner.weight.grad.mul_(100)

    loop, reset = kit.Loop(betas=(0.9, 0.99)), MomentumReset()
    loop.run(reset, 40)
    before = {n: loop.optimizer.state[p]["exp_avg_sq"].clone() for n, p in loop.model.named_parameters()}
    loop.run(reset, 1, fault=fault, verdicts={40: {"grad_norm": "spike"}})
    assert isinstance(loop.actions[-1], SkipStep)
    assert "inner.weight (1 tensors)" in loop.actions[-1].reason
    for name, param in loop.model.named_parameters():
        state = loop.optimizer.state[param]
        if name == "inner.weight":
            assert float(state["exp_avg"].abs().max() + state["exp_avg_sq"].max() + state["step"]) == 0
        else:
            assert torch.equal(state["exp_avg_sq"], before[name])
    loop.run(reset, 1)
    assert loop.is_finite()


def test_without_a_verdict_it_does_nothing(kit: Any) -> None:
    """contract: nor with a verdict that no tensor's RMS_t shares."""
    loop = kit.Loop().run(MomentumReset(), 30, verdicts={20: {"loss": "spike"}}, fault=kit.spike(25))
    assert set(loop.actions) == {Continue()}


def test_rms_t_is_its_formula(kit: Any) -> None:
    """oracle: v before the step, debiased, eps as its floor."""
    from aftershock.guard.policies.gradients import gradients
    from aftershock.guard.policies.moments import moments, rms_t

    loop = kit.Loop(betas=(0.9, 0.97), eps=1e-2)
    loop.run(None, 7)
    now = gradients(loop.live)
    adam = moments(now, loop.live)
    for place, value in zip(adam.places, rms_t(now, adam), strict=True):
        g = now.grads[place].double()
        v_hat = adam.second[place].double() / (1 - 0.97**7)
        slow = (g.square() / v_hat.clamp(min=1e-4)).mean().sqrt()
        assert value == pytest.approx(float(slow), rel=1e-5)  # float32 sums


def test_an_optimizer_without_moments_is_refused(kit: Any) -> None:
    """contract: SGD with momentum."""
    loop = kit.Loop(optimizer="sgd", momentum=0.9)
    with pytest.raises(ValueError, match="SGD keeps no exp_avg"):
        loop.run(Spam(grace=1), 5)
