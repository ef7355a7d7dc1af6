"""ZClip, AdaGC, per-tensor, per-unit and relative clips against slow oracles, and the repairs to their sources."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aftershock.guard.policies.adagc import AdaGC
from aftershock.guard.policies.tensor_clip import RelativeClip, TensorClip, UnitClip
from aftershock.guard.policies.zclip import ZClip
from aftershock.guard.policy import Live, Policy, Seen, SkipStep


class Bench:
    """Hands a policy gradients of given values and shows what it makes of them."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        self.model = nn.Module()
        generator = torch.Generator().manual_seed(0)
        for name, shape in shapes.items():
            self.model.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))
        self.params = dict(self.model.named_parameters())
        self.optimizer = torch.optim.AdamW(self.params.values(), betas=(0.9, 0.97))
        self.step = 0

    def edit(self, policy: Policy, **grads: Tensor) -> dict[str, Tensor]:
        for name, param in self.params.items():
            param.grad = grads[name].clone() if name in grads else None
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))
        row = Seen(self.step, self.step, 1.0, norm, math.nan, 1e-3, {}, None, ())
        self.action = policy.before_step(row, Live(self.model, self.optimizer, self.params))
        self.step += 1
        return {name: p.grad.clone() for name, p in self.params.items() if p.grad is not None}


def series(num: int, *, seed: int = 0, spikes: tuple[int, ...] = ()) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    values = (0.3 * torch.randn(num, generator=generator, dtype=torch.float64)).exp().tolist()
    return [50 * value if step in spikes else value for step, value in enumerate(values)]


@pytest.mark.parametrize("mode", ["adaptive", "mean", "percentile"])
def test_zclip_is_its_formula(mode: Any) -> None:
    """oracle: 200 norms with three spikes, written from the definition."""
    zclip, bench = ZClip(mode=mode, max_norm=3.0, factor=0.9), Bench(w=(4,))
    unit = torch.tensor([0.5, 0.5, -0.5, 0.5])
    norms = series(200, spikes=(10, 60, 61, 150))
    mu = var = 0.0
    for t, g in enumerate(norms):
        target = g
        if t == 25:
            mu, var = statistics.fmean(norms[:25]), statistics.pvariance(norms[:25])
        if t >= 25:
            z = (g - mu) / (math.sqrt(var) + 1e-6)
            if z > 2.5:
                adaptive = 0.9 * (mu + 2.5 * math.sqrt(var) / (z / 2.5))
                target = {"adaptive": adaptive, "mean": mu, "percentile": mu + 2.5 * math.sqrt(var)}[mode]
            mu = 0.97 * mu + 0.03 * target
            var = 0.97 * var + 0.03 * (target - mu) ** 2
        out = bench.edit(zclip, w=g * unit)["w"]
        # float32 gradients: 24 bits; the threshold is far from every z of this series.
        torch.testing.assert_close(out, unit * min(target, 3.0), rtol=1e-5, atol=0)


def test_zclip_clips_again_after_a_nan() -> None:
    """planted: the public code is blind for good after one NaN norm: 1,000 good steps later it lets 1,000.0 through."""
    zclip, bench = ZClip(max_norm=math.inf), Bench(w=(1,))
    for norm in series(50):
        bench.edit(zclip, w=torch.tensor([norm]))
    state = zclip.state_dict()
    bench.edit(zclip, w=torch.tensor([math.nan]))
    assert isinstance(bench.action, SkipStep)
    assert zclip.state_dict() == state | {"skips": 1}
    assert bench.edit(zclip, w=torch.tensor([1000.0]))["w"].item() < 3


def test_adagc_is_its_formula() -> None:
    """oracle: three tensors, one of which has its first gradient after the warm-up, and a spike in one of them."""
    adagc, bench = AdaGC(warmup=20, max_norm=1.0), Bench(a=(3,), b=(2, 2), late=(2,))
    rows = {"a": series(80, seed=1, spikes=(50,)), "b": series(80, seed=2, spikes=(5,)), "late": series(80, seed=3)}
    gamma: dict[str, float] = {}
    for t in range(80):
        grads = {n: torch.full(bench.params[n].shape, rows[n][t]) for n in rows if n != "late" or t >= 40}
        total = math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))
        out = bench.edit(adagc, **grads)
        for name, grad in grads.items():
            norm = float(grad.double().norm())
            first = name not in gamma
            h = min(1.0 / total, 1.0) if t < 20 else 1.0 if first else min(1.05 * gamma[name] / norm, 1.0)
            if first:
                gamma[name] = h * norm
            elif t < 20:
                gamma[name] = min(gamma[name], h * norm)
            else:
                gamma[name] = 0.98 * gamma[name] + 0.02 * h * norm
            # float32 gradients, and 80 steps of an average of their float32 norms.
            torch.testing.assert_close(out[name], h * grad, rtol=1e-5, atol=0)
    assert float(bench.params["late"].grad.norm()) > 0.5  # pyright: ignore[reportOptionalMemberAccess]


def test_adagc_never_freezes_a_tensor() -> None:
    """planted: an expert without tokens for 500 steps, then small gradients, then the usual ones.

    In a public port gamma of such a tensor was 0, and so was its gradient for the rest of the run.
    """
    adagc, bench = AdaGC(warmup=10, max_norm=1e9), Bench(a=(1,), expert=(1,))
    one = torch.ones(1)
    for t in range(500):
        bench.edit(adagc, a=one, expert=0 * one if t > 20 or t < 5 else one)
    assert adagc.state_dict()["gamma"]["expert"] == pytest.approx(1.0)  # float32 norms of ones
    for _ in range(500):
        bench.edit(adagc, a=one, expert=1e-9 * one)
    assert bench.edit(adagc, a=one, expert=one)["expert"].item() == pytest.approx(1.05 * 0.01, rel=1e-5)


def test_tensor_clip_is_its_formula() -> None:
    """oracle: the average starts at the first norm and takes in clipped ones; its decay is the larger beta."""
    clip, bench = TensorClip(ratio=1.5), Bench(a=(2,), b=(3,))
    rows = {"a": series(60, seed=1, spikes=(30,)), "b": series(60, seed=2)}
    average: dict[str, float] = {}
    for t in range(60):
        grads = {name: torch.full(bench.params[name].shape, values[t]) for name, values in rows.items()}
        out = bench.edit(clip, **grads)
        for name, grad in grads.items():
            norm = float(grad.double().norm())
            old = average.get(name, norm)
            new = min(norm, 1.5 * old)
            average[name] = 0.97 * old + 0.03 * new
            # float32 gradients.
            torch.testing.assert_close(out[name], grad * (new / norm), rtol=1e-5, atol=0)


def test_tensor_clip_wants_a_decay() -> None:
    """contract: SGD has no betas."""
    bench = Bench(a=(2,))
    bench.optimizer = torch.optim.SGD(bench.params.values())  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match="give decay="):
        bench.edit(TensorClip(), a=torch.ones(2))


def test_unit_clip_is_its_formula() -> None:
    """oracle: rows of 2-d and 4-d tensors, whole vectors; a tiny weight gets the floor; excluded names nothing."""
    clip = UnitClip(limit=0.1, exclude=("head*",))
    bench = Bench(linear=(3, 4), conv=(2, 2, 3, 3), bias=(5,), row=(1, 6), head=(2, 3))
    with torch.no_grad():
        bench.params["linear"][1] = 1e-6
    generator = torch.Generator().manual_seed(1)
    scales = dict(zip(bench.params, (0.1, 1.0, 3.0, 1.0, 5.0), strict=True))
    grads = {n: scales[n] * torch.randn(p.shape, generator=generator) for n, p in bench.params.items()}
    grads["linear"][2] = 1e-3
    out = bench.edit(clip, **grads)
    assert torch.equal(out["head"], grads["head"])
    assert torch.equal(out["linear"][2], grads["linear"][2])  # within its limit: same bits
    for name in ("linear", "conv", "bias", "row"):
        units = range(grads[name].shape[0]) if name in ("linear", "conv") else [slice(None)]
        for unit in units:
            g, w = grads[name][unit], bench.params[name].detach()[unit]
            top = 0.1 * max(float(w.norm()), 1e-3)
            # float32 norms.
            torch.testing.assert_close(out[name][unit], g * min(1.0, top / float(g.norm())), rtol=1e-5, atol=1e-9)


def test_relative_clip_is_its_formula() -> None:
    """oracle: the mean of the last clipped norms, armed after 10."""
    clip, bench = RelativeClip(ratio=1.2, window=15), Bench(w=(1,))
    last: list[float] = []
    for norm in series(80, spikes=(3, 40)):
        new = min(norm, 1.2 * statistics.fmean(last[-15:])) if len(last) >= 10 else norm
        last.append(new)
        # float32 gradients.
        assert bench.edit(clip, w=torch.tensor([norm]))["w"].item() == pytest.approx(new, rel=1e-5)


@pytest.mark.parametrize("policy", [AdaGC(warmup=0), TensorClip(), UnitClip(limit=10.0)])
def test_cost_is_linear_in_tensors(policy: Policy) -> None:
    """property: the number of calls on tensors per tensor does not grow (a public port computes P global norms)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls += 1
            return func(*args, **(kwargs or {}))

    def calls(num: int) -> int:
        bench = Bench(**{f"w{i}": (2, 2) for i in range(num)})
        grads = {name: torch.ones(2, 2) for name in bench.params}
        bench.edit(policy, **grads)
        with Counter() as counter:
            bench.edit(policy, **grads)
        return counter.calls

    assert calls(40) <= 4 * calls(10)


@pytest.mark.parametrize(
    "build",
    [
        lambda: ZClip(decay=1.0),
        lambda: ZClip(mode="both"),  # pyright: ignore[reportArgumentType]
        lambda: AdaGC(ratio=0.9),
        lambda: AdaGC(floor=2.0),
        lambda: TensorClip(decay=1.0),
        lambda: UnitClip(limit=0.0),
        lambda: RelativeClip(window=5, arm_after=9),
    ],
)
def test_settings_are_checked(build: Any) -> None:
    """contract."""
    with pytest.raises(ValueError, match="must|beyond"):
        build()


def test_unit_clip_exclude_must_match() -> None:
    """contract: a pattern without a match names the nearest parameter."""
    with pytest.raises(ValueError, match="nearest"):
        Bench(weight=(2, 2)).edit(UnitClip(exclude=("heads*",)), weight=torch.ones(2, 2))
