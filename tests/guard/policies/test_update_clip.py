"""Limits on the update: Levanter's, Adafactor's, StableAdamW, the momentum-driven rate, against slow oracles."""

from __future__ import annotations

import copy
import math
import statistics
from typing import Any

import pytest
import torch

from aftershock.guard.policies.adaptive_lr import AdaptiveLR
from aftershock.guard.policies.update_clip import RmsClip, StableAdamW, UpdateClip


def fault_of(name: str, at: int, factor: float) -> Any:
    def fault(batch: int, model: Any) -> None:
        if batch == at:
            model.get_parameter(name).grad.mul_(factor)

    return fault


def test_stable_adamw_is_its_algorithm(kit: Any) -> None:
    """oracle: AdamW written out with rate / max(1, RMS_t) per tensor, decay scaled alike; a x30 gradient at step 12."""
    settings = {"betas": (0.9, 0.99), "weight_decay": 0.3, "eps": 1e-6}
    loop = kit.Loop(**settings)
    policy = StableAdamW()
    theta = {n: w.double() for n, w in loop.weights().items()}
    m = {n: torch.zeros_like(w) for n, w in theta.items()}
    v = copy.deepcopy(m)
    fired = []
    for t in range(20):
        loop.run(policy, 1, fault=fault_of("inner.weight", 12, 30.0))
        for name, param in loop.model.named_parameters():
            g = param.grad.double()
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.99 * v[name] + 0.01 * g * g
            m_hat, v_hat = m[name] / (1 - 0.9 ** (t + 1)), v[name] / (1 - 0.99 ** (t + 1))
            rms = float((g * g / v_hat.clamp(min=1e-12)).mean().sqrt())
            rate = 1e-2 / max(1.0, rms)
            fired.append(rms > 2)
            theta[name] = theta[name] - rate * 0.3 * theta[name] - rate * m_hat / (v_hat.sqrt() + 1e-6)
            # float32 run, and its weights are put together as old + s (new - old).
            torch.testing.assert_close(param.detach().double(), theta[name], rtol=1e-4, atol=2e-6)
    assert any(fired)


def test_stable_adamw_needs_gradients_after_the_step_and_an_adam(kit: Any) -> None:
    """contract."""
    loop = kit.Loop()
    policy = StableAdamW()
    loop.run(None, 2)
    row = _row()
    policy.before_step(row, loop.live)
    loop.optimizer.step()
    loop.optimizer.zero_grad()
    with pytest.raises(ValueError, match="gradients are gone"):
        policy.after_step(row, loop.live)
    with pytest.raises(ValueError, match="needs an Adam"):
        kit.Loop(optimizer="sgd").run(StableAdamW(), 1)


def test_update_clip_is_levanters_rule(kit: Any) -> None:
    """oracle: SGD, so that the update is rate * gradient: limit = mean + 2 std of the last 8 unclipped norms."""
    loop = kit.Loop(optimizer="sgd", lr=0.1)
    policy = UpdateClip(sigmas=2.0, window=8, arm_after=5)
    last: list[float] = []
    clipped = 0
    for _ in range(30):
        loop.run(policy, 1, fault=kit.spike(20))
        raw = 0.1 * loop.grad_norms[-1]
        limit = math.inf
        if len(last) >= 5:
            limit = statistics.fmean(last) + 2 * max(statistics.pstdev(last), 1e-6)
        clipped += raw > limit
        # Differences of float32 weights of size 1 for an update of size 0.1.
        assert loop.update_norms[-1] == pytest.approx(min(raw, limit), rel=1e-4)
        last = [*last, raw][-8:]
    assert clipped >= 1


def test_rms_clip_is_adafactors_rule(kit: Any) -> None:
    """oracle: SGD per tensor: update = rate g / max(1, RMS(g) / limit), at the rate of the step, not the next one."""
    loop = kit.Loop(optimizer="sgd", lr=0.1, cooling=0.5)
    before = loop.weights()
    loop.run(RmsClip(limit=0.05), 1)
    ratios = []
    for name, param in loop.model.named_parameters():
        rms = float(param.grad.square().mean().sqrt())
        ratios.append(rms / 0.05)
        # Differences of float32 weights.
        want = before[name] - 0.1 * param.grad / max(1.0, rms / 0.05)
        torch.testing.assert_close(param.detach(), want, rtol=1e-5, atol=1e-7)
    assert min(ratios) < 1 < max(ratios)


def test_an_update_within_its_limit_keeps_its_bits(kit: Any) -> None:
    """property: scale by 1 is no operation, so nothing drifts in a healthy run."""
    plain, guarded = kit.Loop().run(None, 30), kit.Loop().run(RmsClip(limit=1e3), 30)
    assert all(torch.equal(w, guarded.weights()[n]) for n, w in plain.weights().items())


def test_adaptive_lr_is_its_rule(kit: Any) -> None:
    """oracle: SGD with momentum; delayed mean of the momentum norm, 0.707^N of the update, N forgotten after 10."""
    loop = kit.Loop(optimizer="sgd", lr=0.01, momentum=0.5)
    policy = AdaptiveLR(threshold=3.0, window=4, timeout=10)
    norms: dict[str, list[float]] = {name: [] for name, _ in loop.model.named_parameters()}
    outliers: dict[str, list[int]] = {name: [] for name in norms}
    most = 0
    for t in range(40):
        for name, param in loop.model.named_parameters():
            buffer = loop.optimizer.state.get(param, {}).get("momentum_buffer")
            if buffer is not None:
                past = norms[name]
                older = past[max(0, len(past) - 8) : max(0, len(past) - 4)]
                if older and float(buffer.norm()) > 3 * statistics.fmean(older):
                    outliers[name].append(t)
                past.append(float(buffer.norm()))
        before = loop.weights()
        loop.run(policy, 1, fault=fault_of("inner.weight", 20, 100.0))
        for name, param in loop.model.named_parameters():
            num = sum(at > t - 10 for at in outliers[name])
            most = max(most, num)
            momentum = loop.optimizer.state[param]["momentum_buffer"]
            want = before[name] - 0.01 * max(1e-4, 0.707**num) * momentum
            # Differences of float32 weights.
            torch.testing.assert_close(param.detach(), want, rtol=1e-5, atol=1e-7)
    assert most >= 3


def test_adaptive_lr_wants_a_momentum(kit: Any) -> None:
    """contract: without one it would do nothing."""
    with pytest.raises(ValueError, match="no momentum"):
        kit.Loop(optimizer="sgd").run(AdaptiveLR(), 3)


def _row() -> Any:
    from aftershock.guard.policy import Seen

    return Seen(2, 2, 1.0, 1.0, 0.1, 1e-2, {}, None, ())
