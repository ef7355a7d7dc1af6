"""Curvature against the whole Hessian, both ways to a Hessian-vector product, and nothing changed by looking."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aftershock.signals.curvature import directional_curvature, sharpness

X = torch.linspace(-1, 1, 24).view(8, 3)


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def _loss(model: nn.Module) -> Tensor:
    x = X.double()
    return F.mse_loss(model(x), x[:, :2].sin())


def _dense(model: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """Gradient and the whole Hessian, one column per second backward pass."""
    params = list(model.parameters())
    grads = torch.autograd.grad(_loss(model), params, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in grads])
    rows = [torch.autograd.grad(one, params, retain_graph=True) for one in flat]
    return flat.detach().numpy(), np.stack([torch.cat([h.reshape(-1) for h in row]).numpy() for row in rows])


def _stepped(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03, betas=(0.8, 0.95), eps=1e-3)
    for _ in range(3):
        _loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def _scale(model: nn.Module, optimizer: torch.optim.Optimizer) -> np.ndarray:
    """D = sqrt(v_hat) + eps after three steps."""
    v = torch.cat([optimizer.state[p]["exp_avg_sq"].reshape(-1) for p in model.parameters()])
    return (v / (1 - 0.95**3)).sqrt().numpy() + 1e-3


@pytest.mark.parametrize("method", ["double_backward", "finite_difference"])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_oracle_directional(method: Any, preconditioned: bool) -> None:
    model = _net()
    optimizer = _stepped(model)
    g, H = _dense(model)
    D = _scale(model, optimizer) if preconditioned else np.ones(len(g))
    root = np.diag(D**-0.5)
    e = root @ g
    want = e @ (root @ H @ root) @ e / (e @ e)
    got = directional_curvature(
        model, lambda: _loss(model), lr=0.03, optimizer=optimizer if preconditioned else None, method=method
    )
    rel = 1e-9 if method == "double_backward" else 1e-4  # third derivatives at a step of 1e-3
    assert got.value == pytest.approx(want, rel=rel)
    assert got.edge_share == pytest.approx(want * 0.03 / 2, rel=rel)
    beta1 = 0.8 if preconditioned else 0.0
    assert got.momentum_edge_share == pytest.approx(want / (2 * (1 + beta1) / ((1 - beta1) * 0.03)), rel=rel)
    assert got.grad_norm == pytest.approx(np.linalg.norm(g))
    assert got.method == method


@pytest.mark.parametrize("preconditioned", [False, True])
def test_oracle_sharpness_and_its_warm_start(preconditioned: bool) -> None:
    model = _net()
    optimizer = _stepped(model)
    _, H = _dense(model)
    D = _scale(model, optimizer) if preconditioned else np.ones(len(H))
    eigenvalues = np.linalg.eigvalsh(np.diag(D**-0.5) @ H @ np.diag(D**-0.5))
    want = eigenvalues[np.abs(eigenvalues).argmax()]
    given = {"lr": 0.03, "optimizer": optimizer if preconditioned else None}
    cold = sharpness(model, lambda: _loss(model), iterations=600, **given)
    assert cold.value == pytest.approx(want, rel=1e-4)  # the ratio of the first two eigenvalues, to the 600th power
    assert cold.edge_share == pytest.approx(want * 0.015, rel=1e-4)
    assert cold.residual < 0.01
    warm = sharpness(model, lambda: _loss(model), iterations=1, warm=cold.vector, **given)
    assert warm.value == pytest.approx(want, rel=1e-4)
    assert math.sqrt(sum(float(v.square().sum()) for v in warm.vector)) == pytest.approx(1)


def test_where_a_kernel_has_no_second_derivative_differences_agree(kit: Any) -> None:
    """equivalence: SDPA on a CPU against the same weights with attention by hand; dropout draws the same dice."""
    batch, results = kit.tokens(0), []
    for kernel in ("eager", "sdpa"):
        model = kit.decoder(kernel)
        torch.manual_seed(5)
        results.append(directional_curvature(model, lambda m=model: kit.loss(m, batch), lr=0.1))
    assert [result.method for result in results] == ["double_backward", "finite_difference"]
    assert results[1].value == pytest.approx(results[0].value, rel=0.02)  # float32 differences
    model = kit.decoder("sdpa")
    with pytest.raises(RuntimeError, match="not implemented"):
        directional_curvature(model, lambda: kit.loss(model, batch), lr=0.1, method="double_backward")


@pytest.mark.parametrize("method", ["double_backward", "finite_difference"])
def test_training_keeps_its_bits(kit: Any, method: Any) -> None:
    """equivalence: between backward and step, with dropout and batch norm; gradients and addresses stay too."""

    def trained(probed: bool) -> list[bytes]:
        model = nn.Sequential(kit.decoder("eager"), nn.BatchNorm1d(8))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        torch.manual_seed(1)

        def loss() -> Tensor:
            return model(kit.tokens(0)[:, :-1]).square().mean()

        for step in range(3):
            loss().backward()
            if probed and step:
                addresses = [p.data_ptr() for p in model.parameters()]
                given = {"lr": 0.02, "optimizer": optimizer, "method": method}
                directional_curvature(model, loss, **given)
                sharpness(model, loss, iterations=2, **given)
                assert addresses == [p.data_ptr() for p in model.parameters()]
            optimizer.step()
            optimizer.zero_grad()
        tensors = [*model.parameters(), *model.buffers(), torch.get_rng_state()]
        return [x.detach().numpy().tobytes() for x in tensors]

    assert trained(True) == trained(False)


def test_parameters_come_back_when_the_loss_fails() -> None:
    """planted: an error in the middle of the differences."""
    model, calls = _net(), []
    before = [(p.data_ptr(), p.detach().clone()) for p in model.parameters()]

    def loss() -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("mine")
        return _loss(model)

    with pytest.raises(RuntimeError, match="mine"):
        directional_curvature(model, loss, lr=0.1, method="finite_difference")
    for p, (address, old) in zip(model.parameters(), before, strict=True):
        assert p.data_ptr() == address
        assert torch.equal(p, old)


def test_mistakes_are_errors() -> None:
    model = _net()
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="SGD has no second moment of 0.weight"):
        directional_curvature(model, lambda: _loss(model), lr=0.1, optimizer=plain)
    with pytest.raises(ValueError, match="must return a scalar tensor"):
        directional_curvature(model, lambda: model(X.double()), lr=0.1)
    with pytest.raises(ValueError, match="is nan: a loss that is not finite"):
        directional_curvature(model, lambda: _loss(model) * math.nan, lr=0.1)
    with pytest.raises(ValueError, match="no parameter matches '2.wait'"):
        directional_curvature(model, lambda: _loss(model), lr=0.1, places="2.wait")
    with pytest.raises(ValueError, match="warm has other shapes"):
        sharpness(model, lambda: _loss(model), lr=0.1, warm=[torch.ones(2)])
    with pytest.raises(ValueError, match="iterations must be at least 1"):
        sharpness(model, lambda: _loss(model), lr=0.1, iterations=0)
