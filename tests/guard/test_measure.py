"""Norms of gradients and updates against the slow, obvious way, and torch's own clip bit for bit."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from aftershock.guard import measure
from aftershock.guard.measure import Gradients, Updates


def _params(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(0)
    found = {f"p{i}": nn.Parameter(torch.randn(shape).to(dtype)) for i, shape in enumerate(shapes)}
    for p in found.values():
        p.grad = torch.randn(p.shape).to(dtype)
    return dict(found)


@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_norm_and_clip_are_torchs(limit: float) -> None:
    """oracle: clip_grad_norm_, the same bits."""
    ours = _params((30, 7), (5,), (2, 3, 4))
    theirs = copy.deepcopy(ours)
    for p, q in zip(ours.values(), theirs.values(), strict=True):
        assert p.grad is not None
        q.grad = p.grad.clone()
    grads = Gradients(ours)
    norm = grads.norm()
    grads.clip(norm, limit=limit, known=True)
    assert torch.equal(norm, nn.utils.clip_grad_norm_(list(theirs.values()), limit))
    for p, q in zip(ours.values(), theirs.values(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_element_shows(bad: float) -> None:
    """planted."""
    params = _params((30, 7), (5,))
    assert params["p1"].grad is not None
    params["p1"].grad[2] = bad
    assert not torch.isfinite(Gradients(params).norm())


def test_low_precision_is_summed_in_float32() -> None:
    """oracle: float64 over bf16 gradients, where a bf16 norm would be 0.4 % off."""
    params = _params((300, 70), dtype=torch.bfloat16)
    grad = params["p0"].grad
    assert grad is not None
    assert float(Gradients(params).norm()) == pytest.approx(float(grad.double().norm()), rel=1e-5)  # float32 sums


def test_sparse_gradients_add_up_before_they_are_squared() -> None:
    """oracle: the dense gradient; clipping scales them all."""
    table = nn.Embedding(10, 4, sparse=True)
    table(torch.tensor([1, 1, 7])).square().sum().backward()
    assert table.weight.grad is not None
    dense = table.weight.grad.to_dense()
    grads = Gradients({"w": table.weight})
    norm = grads.norm()
    assert float(norm) == pytest.approx(float(dense.norm()), rel=1e-6)  # float32 sums in another order
    grads.clip(norm, limit=0.1, known=True)
    assert float(table.weight.grad.to_dense().norm()) == pytest.approx(0.1, rel=1e-4)  # torch adds 1e-6 to the norm


@pytest.mark.parametrize("how", ["sample", "all"])
def test_update_norm_is_exact_for_small_models(how: str) -> None:
    """oracle: new minus old, in float64; channels_last and a tensor whose memory moves included."""
    params = _params((30, 7), (5,), (8, 3, 2, 2))
    params["p2"].data = params["p2"].data.to(memory_format=torch.channels_last)
    updates = Updates(params, how=how)  # pyright: ignore[reportArgumentType]
    for _ in range(2):
        old = [p.detach().double().clone() for p in params.values()]
        updates.before()
        with torch.no_grad():
            for p in params.values():
                p.add_(0.01 * torch.randn(p.shape))
        squares = updates.squares()
        exact = sum(float((p.detach().double() - o).square().sum()) for p, o in zip(params.values(), old, strict=True))
        assert float(squares) == pytest.approx(exact, rel=1e-5)  # differences rounded to float32
        params["p0"].data = params["p0"].data.clone()


def test_a_sample_estimates_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """oracle: all elements; a sample of 1 in 20 of normal updates is within 5 of its standard errors."""
    monkeypatch.setattr(measure, "SAMPLE", 20_000)
    params = _params((400, 700), (300, 400), (50,))
    sample, whole = Updates(params), Updates(params, how="all")
    assert sum(run.length for run in sample._runs) < 25_000
    sample.before()
    whole.before()
    with torch.no_grad():
        for p in params.values():
            p.add_(0.01 * torch.randn(p.shape))
    # A squared normal has variance 2, so the relative error of a mean of 20,000 is sqrt(2 / 20,000) = 0.01.
    assert float(sample.squares()) == pytest.approx(float(whole.squares()), rel=0.05)


def test_runs_lie_inside_their_tensor_and_do_not_overlap() -> None:
    """property: over sizes and shares, and their weights stand for all elements."""
    for size in (1, 255, 1024, 1025, 99_991):
        for share in (1e-6, 0.01, 0.3, 0.99, 1.0):
            runs = measure._spread(0, size, share)
            ends = [(run.start, run.start + run.length) for run in runs]
            assert all(a[1] <= b[0] for a, b in pairwise(ends))
            assert ends[0][0] == 0
            assert ends[-1][1] <= size
            assert sum(run.length * run.weight for run in runs) == pytest.approx(size)
