"""indicators: each number by hand on small nets, what is held between measurements, and what is not finite."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim import Adam

from aftershock.lab.zoo import nets
from aftershock.lab.zoo.indicators import (
    SHARPNESS_EVERY,
    WEIGHTS_EVERY,
    Curvatures,
    Outputs,
    Tensors,
    Weights,
    batch_row,
    find_tokens,
    largest,
    smallest,
)
from aftershock.lab.zoo.nets import ByteLM, ModularMlp, TanhNet, Text, Tokens, seeded, token_loss
from aftershock.lab.zoo.record import record
from aftershock.lab.zoo.specimen import Specimen, Trial
from aftershock.store.reader import RunReader
from aftershock.workload import Workload

CURVE = nets.two_sines(30)


def _curve(seed: int, *, faulty: bool = True) -> Trial:
    model = seeded(seed, lambda: TanhNet(8))
    optimizer = Adam(model.parameters(), lr=0.01, betas=(0.9, 0.99))
    return Trial(Workload(model=model, optimizer=optimizer, batch=lambda i: CURVE, loss=nets.curve_loss), None)


SPECIMEN = Specimen(name="x", kind="spontaneous", cause="C1", about="", source="", steps=12, build=_curve)


def _flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors]).double()


def test_tensors_of_the_whole_model_are_those_by_hand(tmp_path: Path) -> None:
    """oracle: norms, cosines and moments of all parameters as one vector, in a loop of our own."""
    run = RunReader(record(SPECIMEN, seed=0, folder=tmp_path / "a"))
    columns = run.scalars().values
    work = _curve(0).workload
    parameters = list(work.model.parameters())
    first, previous = [p.norm().item() for p in parameters], None
    for step in range(12):
        work.backward(step)
        grad, before = _flat(p.grad for p in parameters), _flat(parameters).clone()
        assert columns["param/all/norm"][step] == pytest.approx(before.norm().item(), rel=1e-6)  # float32 sums
        kept = [p.norm().item() / start for p, start in zip(parameters, first, strict=True) if start]
        assert columns["param/min/of_first"][step] == pytest.approx(min(kept), rel=1e-6)
        work.optimizer.step()
        update = _flat(parameters) - before
        # cosines of float32 sums, summed over tensors with float32 norms; the update is a difference of rounded weights
        descent = -(update @ grad) / update.norm() / grad.norm()
        assert columns["update/all/cosine_descent"][step] == pytest.approx(descent.item(), abs=1e-4)
        if previous is not None:
            cosine = (grad @ previous) / grad.norm() / previous.norm()
            assert columns["grad/all/cosine_previous"][step] == pytest.approx(cosine.item(), abs=1e-5)
        m, v = (_flat(work.optimizer.state[p][key] for p in parameters) for key in ("exp_avg", "exp_avg_sq"))
        assert columns["optim/all/first_norm"][step] == pytest.approx(m.norm().item(), rel=1e-5)
        assert columns["optim/all/second_root_sum"][step] == pytest.approx(v.sqrt().sum().item(), rel=1e-5)
        ratio = m.square().mean().sqrt() / v.sqrt().mean()
        assert columns["optim/all/first_over_root"][step] == pytest.approx(ratio.item(), rel=1e-5)
        hat = (m / (1 - 0.9 ** (step + 1))).abs() > 0.9 * (v / (1 - 0.99 ** (step + 1))).sqrt()
        assert columns["optim/all/saturated_frac"][step] == pytest.approx(hat.double().mean().item(), abs=0.05)
        previous = grad.clone()
        work.optimizer.zero_grad()


def test_a_tensor_is_set_against_its_own_usual_gradient() -> None:
    """planted: the small tensor's gradient grows tenfold, which the norm of all hides."""
    model = TanhNet(3)
    tensors = Tensors(model)
    usual = {"inner.weight": 1.0, "inner.bias": 1e-3, "outer.weight": 1.0, "outer.bias": 1.0}

    def row(**changed: float) -> dict[str, float]:
        norms = usual | {name.replace("_", "."): norm for name, norm in changed.items()}
        whole = {f"{kind}/all/norm": 1.0 for kind in ("grad", "update", "param")}
        return tensors.row(whole | {f"grad/{name}/norm": norm for name, norm in norms.items()})

    found = [row() for _ in range(9)]
    assert "grad/max/over_usual" not in found[7]
    assert found[8]["grad/max/over_usual"] == pytest.approx(1.0)
    assert row(inner_bias=1e-2)["grad/max/over_usual"] == pytest.approx(10.0)
    assert math.isnan(row(inner_bias=math.nan)["grad/max/over_usual"])
    assert row()["grad/max/over_usual"] == pytest.approx(1.0)  # a nan is no part of the usual


def test_outputs_by_hand() -> None:
    """oracle: logits, blocks and attention of a language model, from tensors taken by hooks of our own."""
    model = seeded(0, lambda: ByteLM(context=16, depth=2))
    part = Text(seed=0, batch_size=5, context=16).batch(0)
    seen: list[Tensor] = []
    handles = [block.register_forward_hook(lambda _, __, out: seen.append(out.detach())) for block in model.blocks]
    with Outputs(model) as outputs:
        token_loss(model, part)
        row = outputs.row(part)
    logits = model(part.inputs_BT).detach().double()
    log_z = logits.logsumexp(-1)
    rms = [block.double().square().mean().sqrt().item() for block in seen[:2]]
    kurtosis = [(b - b.mean()).double().pow(4).mean() / b.double().var(correction=0).square() for b in seen[:2]]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), part.targets_BT, reduction="none").mean(1)
    # float32 against float64
    assert row["output/rms"] == pytest.approx(logits.square().mean().sqrt().item(), rel=1e-5)
    assert row["output/abs_max"] == pytest.approx(logits.abs().max().item(), rel=1e-6)
    assert (row["output/log_z"], row["output/log_z_max"]) == pytest.approx(
        (log_z.mean().item(), log_z.max().item()), rel=1e-6
    )
    assert row["activation/last/rms"] == pytest.approx(rms[-1], rel=1e-5)
    assert row["activation/max/kurtosis"] == pytest.approx(float(max(kurtosis)), rel=1e-4)
    assert row["batch/max/loss"] == pytest.approx(losses.max().item(), rel=1e-5)
    assert row["batch/max/loss_over_mean"] == pytest.approx((losses.max() / losses.mean()).item(), rel=1e-5)
    # near uniform at the start, and below it: the mean over 16 queries of log(number of keys)
    uniform = np.log(np.arange(1, 17)).mean()
    assert uniform - 0.1 < row["attention/min/entropy"] < uniform
    assert not model.watch
    for handle in handles:
        handle.remove()


def test_attention_that_looks_at_one_key_has_no_entropy() -> None:
    """planted: W_q and W_k a thousand times as large."""
    model = seeded(0, lambda: ByteLM(context=16))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "query_key" in name:
                weight.mul_(1000.0)
    part = Text(seed=0, batch_size=2, context=16).batch(0)
    with Outputs(model) as outputs:
        token_loss(model, part)
        assert outputs.row(part)["attention/min/entropy"] < 0.1


def test_weights_by_hand_and_held() -> None:
    """oracle: spectral norm, mean output embedding, and a change of the queries by a rank-one matrix."""
    model = seeded(0, ByteLM)
    weights = Weights(model)
    row = weights.row(0)
    halves = [w.detach().reshape(2, 32, 32) for name, w in model.named_parameters() if "query_key" in name]
    norms = [torch.linalg.svdvals(half).max().item() for pair in halves for half in pair]
    assert row["param/qk/spectral_norm"] == pytest.approx(max(norms), rel=1e-5)
    assert row["param/head/mean_norm"] == pytest.approx(model.head.weight.mean(0).norm().item(), rel=1e-6)
    assert "update/qk/stable_rank" not in row
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "query_key" in name:
                weight[:32] += torch.outer(torch.ones(32), torch.arange(32.0))
    assert weights.row(1) == row
    row = weights.row(WEIGHTS_EVERY)
    assert row["update/qk/stable_rank"] == pytest.approx(1.0, abs=1e-4)  # float32 weights
    assert row["update/qk/spectral_entropy"] == pytest.approx(0.0, abs=1e-3)
    with torch.no_grad():
        model.head.weight.fill_(1.0)
        next(iter(p for name, p in model.named_parameters() if "query_key" in name)).fill_(torch.nan)
    row = weights.row(2 * WEIGHTS_EVERY)
    assert math.isnan(row["param/qk/spectral_norm"])
    assert row["param/head/mean_norm"] == pytest.approx(32**0.5)
    assert Weights(TanhNet()).row(0) == {}
    assert list(Weights(ModularMlp(7)).row(0)) == ["param/head/mean_norm"]


def test_the_sharpest_curvature_is_held_and_survives_what_has_none() -> None:
    """contract: measured every 20 steps, nan where the loss gives no direction, and measured again after that."""
    work = _curve(0).workload
    for index in range(3):
        work.backward(index)
        work.optimizer.step()
        work.optimizer.zero_grad()
    curvatures = Curvatures(work)
    assert "curvature/all/sharpest" not in curvatures.row(SHARPNESS_EVERY - 1)
    value = curvatures.row(SHARPNESS_EVERY)["curvature/all/sharpest"]
    assert value > 0
    assert curvatures.row(SHARPNESS_EVERY + 1)["curvature/all/sharpest"] == value
    work.loss = lambda model, batch: 0.0 * nets.curve_loss(model, batch)
    assert math.isnan(curvatures.row(2 * SHARPNESS_EVERY)["curvature/all/sharpest"])
    work.loss = nets.curve_loss
    assert curvatures.row(3 * SHARPNESS_EVERY)["curvature/all/sharpest"] > 0


def test_tokens_of_a_batch() -> None:
    """contract: found alone, beside other things, in several parts, and not where there are none."""
    tokens = Tokens(torch.tensor([[1, 1, 1, 1]]), torch.tensor([[1, 1, 1, 1]]))
    assert find_tokens((tokens, 2.0)) is tokens
    assert find_tokens(CURVE) is None
    assert batch_row([CURVE]) == {}
    row = batch_row([tokens, (tokens, 0.5)])
    assert (row["batch/tokens/repeat_count"], row["batch/tokens/unique_frac"]) == (4.0, 1 / 8)


def test_nan_is_the_extreme() -> None:
    """contract."""
    assert (largest([1.0, 2.0]), smallest([1.0, 2.0])) == (2.0, 1.0)
    assert math.isnan(largest([1.0, math.nan]))
    assert math.isnan(smallest([math.nan, 1.0]))
