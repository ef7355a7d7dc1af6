"""A vetoed step leaves weights, moments and counters untouched, for every kind of optimizer; then training goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from aftershock.guard import veto

KINDS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, foreach=False),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, fused=True),
    "amsgrad_fused": lambda p: torch.optim.Adam(p, fused=True, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "sgd_fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True),
    "adagrad_fused": lambda p: torch.optim.Adagrad(p, fused=True),
    "adafactor": torch.optim.Adafactor,
    "muon": lambda p: torch.optim.Muon([one for one in p if one.ndim == 2]),
}


def _built(kind: str) -> tuple[list[nn.Parameter], Optimizer]:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(3, 2))]
    return params, KINDS[kind](params)


def _gradients(params: list[nn.Parameter], value: float | None = None) -> None:
    for p in params:
        p.grad = torch.randn(p.shape) if value is None else torch.full_like(p, value)


def _everything(params: list[nn.Parameter], optimizer: Optimizer) -> list[Tensor]:
    states = [v for p in params for v in optimizer.state[p].values()]
    return [torch.as_tensor(v).detach().clone() for v in [*params, *states] if v is not None]


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [True, False])
def test_grads_are_vetoed_for_every_kind(kind: str, first: bool) -> None:
    """contract: NaN gradients, at the first step and later; the step after is that of a run without them."""
    params, optimizer = _built(kind)
    others, plain = _built(kind)
    if not first:
        for these, one in ((params, optimizer), (others, plain)):
            torch.manual_seed(1)
            _gradients(these)
            one.step()
    before = _everything(params, optimizer)
    _gradients(params, float("nan"))
    veto.veto_grads(optimizer)
    optimizer.step()
    assert _same(before, _everything(params, optimizer))
    for these, one in ((params, optimizer), (others, plain)):
        torch.manual_seed(2)
        _gradients(these)
        one.step()
    assert _same(_everything(params, optimizer), _everything(others, plain))
    assert not _same(before, _everything(params, optimizer))


@pytest.mark.parametrize("kind", KINDS)
def test_found_inf_is_believed_only_where_it_holds(kind: str) -> None:
    """contract: the way found by trial is the one that really leaves everything untouched."""
    params, optimizer = _built(kind)
    assert veto.way_of(optimizer) == ("found_inf" if kind.endswith("fused") else "grads")
    if not kind.endswith("fused"):
        return
    _gradients(params)
    optimizer.step()
    before, hold = _everything(params, optimizer), veto.FoundInf(optimizer)
    _gradients(params, float("nan"))
    hold.hold(torch.tensor(True))
    optimizer.step()
    hold.clear()
    assert _same(before, _everything(params, optimizer))
    assert not {"found_inf", "grad_scale"} & vars(optimizer).keys()
    _gradients(params)
    hold.hold(torch.tensor(False))
    optimizer.step()
    hold.clear()
    assert not _same(before, _everything(params, optimizer))


def test_a_fused_optimizer_that_does_not_obey_is_not_believed() -> None:
    """planted: a kind that claims to be fused and steps all the same."""

    class Deaf(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.sub_(0.1)

    assert veto.way_of(Deaf([nn.Parameter(torch.ones(2))], fused=True)) == "grads"


@pytest.mark.parametrize(("ours", "theirs"), [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)])
def test_a_scaler_and_the_guard_share_the_flag(ours: float, theirs: float) -> None:
    """contract: either holds the step; what the scaler had set is there again."""
    params, optimizer = _built("adamw_fused")
    _gradients(params)
    optimizer.step()
    before: list[Tensor] = _everything(params, optimizer)
    live: Any = optimizer
    live.grad_scale, live.found_inf = torch.tensor(2.0), torch.tensor(theirs)
    _gradients(params)
    hold = veto.FoundInf(optimizer)
    hold.hold(torch.tensor(ours))
    optimizer.step()
    hold.clear()
    assert _same(before, _everything(params, optimizer)) == (max(ours, theirs) > 0)
    assert (float(live.grad_scale), float(live.found_inf)) == (2.0, theirs)
