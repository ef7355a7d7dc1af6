"""Disturbances: each does exactly what it says, once, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from aftershock.lab.zoo import disturbances
from aftershock.lab.zoo.disturbances import Strike
from aftershock.workload import Workload


def _work(accumulate: int = 4) -> Workload:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    parts = [(torch.randn(5, 3), torch.randn(5, 2)) for _ in range(accumulate)]
    return Workload(
        model=model,
        optimizer=AdamW(model.parameters(), lr=1e-2),
        batch=lambda index: parts,
        loss=lambda model, part: ((model(part[0]) - part[1]) ** 2).mean(),
        accumulate=accumulate,
    )


def test_a_strike_comes_once_though_the_run_goes_back() -> None:
    """contract."""
    seen: list[int] = []
    strike = Strike(steps=[2, 3], when="after_backward", act=seen.append)
    for index in [0, 1, 2, 3, 1, 2, 3, 4]:
        strike.before_forward(index)
        assert index not in seen or seen.count(index) == 1
        strike.after_backward(index)
    assert seen == [2, 3]


def test_a_strike_without_steps_is_a_mistake() -> None:
    """contract."""
    with pytest.raises(ValueError, match="at least one step"):
        Strike(steps=[], when="before_forward", act=lambda index: None)


@pytest.mark.parametrize("growth", [1, 2, 4, 8, 16])
def test_a_flipped_bit_scales_one_element_by_a_power_of_two(growth: int) -> None:
    """oracle: the bit of 2^growth, and the largest value that can come of it."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(2000) * 0.01)
    before = weight.detach().clone()
    strike = disturbances.flipped_bit(weight, step=7, growth=growth)
    strike.before_forward(6)
    assert torch.equal(weight, before)
    strike.before_forward(7)
    changed = (weight != before).nonzero().flatten()
    assert len(changed) == 1
    assert weight[changed] == before[changed] * 2.0**growth  # exact: only the exponent moved
    # The exponent bit is open where floor(log2 |w|) + 127 has a zero there: by hand, from the value and not the bits.
    exponents = torch.tensor([int(value) for value in before.abs().log2().floor() + 127])
    candidates = before.abs()[(exponents // growth) % 2 == 0] * 2.0**growth
    assert weight[changed].abs() == candidates.max()


def test_the_top_bit_makes_a_weight_huge_and_stays_finite() -> None:
    """planted."""
    weight = nn.Parameter(torch.tensor([0.0, 0.25, -0.5, 1.5, 3.0]))
    disturbances.flipped_bit(weight, step=0, growth=128).before_forward(0)
    # 1.5 would become NaN, 3.0 has the bit already, 0.0 stays small: -0.5 is hit.
    assert weight.tolist() == [0.0, 0.25, -(2.0**127), 1.5, 3.0]


def test_bits_that_cannot_flip_are_refused() -> None:
    """contract."""
    weight = nn.Parameter(torch.ones(3) * 0.75)
    with pytest.raises(ValueError, match="power of two"):
        disturbances.flipped_bit(weight, step=0, growth=3)
    with pytest.raises(ValueError, match="float32"):
        disturbances.flipped_bit(nn.Parameter(torch.ones(3, dtype=torch.float64)), step=0, growth=4)
    with pytest.raises(ValueError, match="choose another growth"):
        disturbances.flipped_bit(weight, step=0, growth=2).before_forward(0)


def test_a_sick_rank_changes_the_mean_gradient_by_its_share() -> None:
    """oracle: every rank's gradient by itself, one corrupted, then the mean."""
    work = _work()
    own = []
    for part in work.micro_batches(5):
        work.loss(work.model, part).backward()
        own.append([weight.grad.clone() for weight in work.model.parameters() if weight.grad is not None])
        work.model.zero_grad()
    corrupt = lambda gradient: gradient * -3.0 + 1.0  # noqa: E731
    own[2] = [corrupt(gradient) for gradient in own[2]]
    strike = disturbances.sick_rank(work, steps=[5], rank=2, corrupt=corrupt)
    work.backward(5)
    strike.after_backward(5)
    for position, weight in enumerate(work.model.parameters()):
        expected = torch.stack([gradients[position] for gradients in own]).mean(0)
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad, expected, rtol=1e-5, atol=1e-6)  # float32 sums in another order


def test_a_rank_that_is_not_there_is_refused() -> None:
    """contract."""
    with pytest.raises(ValueError, match="one of the 4"):
        disturbances.sick_rank(_work(), steps=[0], rank=4, corrupt=lambda gradient: gradient)


def _step(work: Workload, strike: Strike | None, index: int) -> None:
    if strike is not None:
        strike.before_forward(index)
    work.backward(index)
    work.optimizer.step()
    if work.scheduler is not None:
        work.scheduler.step()
    work.optimizer.zero_grad()


def test_wrong_rates_outlast_the_scheduler() -> None:
    """equivalence: from the strike on every rate is the true run's times the factor."""
    rates: list[list[float]] = []
    for struck in (False, True):
        work = _work()
        work.scheduler = LambdaLR(work.optimizer, lambda step: 1 / (1 + step))
        strike = disturbances.wrong_rates(work.optimizer, work.scheduler, step=3, factor=30.0) if struck else None
        seen: list[float] = []
        for index in range(6):
            if strike is not None:
                strike.before_forward(index)
            seen.append(work.optimizer.param_groups[0]["lr"])
            _step(work, None, index)
        rates.append(seen)
    assert rates[1] == pytest.approx([*rates[0][:3], *(30 * rate for rate in rates[0][3:])])  # one rounding


def test_wrong_rates_without_a_scheduler() -> None:
    """contract."""
    work = _work()
    disturbances.wrong_rates(work.optimizer, None, step=0, factor=4.0).before_forward(0)
    assert work.optimizer.param_groups[0]["lr"] == 4e-2


def test_lost_moments_leave_the_counter_and_the_other_moment() -> None:
    """planted: the next v is (1 - beta2) g^2 alone."""
    work = _work()
    for index in range(4):
        _step(work, None, index)
    weight = next(work.model.parameters())
    state = work.optimizer.state[weight]
    first = state["exp_avg"].clone()
    strike = disturbances.lost_moments(work.optimizer, step=4)
    strike.before_forward(4)
    assert not state["exp_avg_sq"].any()
    assert torch.equal(state["exp_avg"], first)
    assert state["step"] == 4
    work.backward(4)
    assert isinstance(weight.grad, Tensor)
    squared = weight.grad**2
    work.optimizer.step()
    torch.testing.assert_close(state["exp_avg_sq"], 1e-3 * squared, rtol=1e-4, atol=0.0)  # 1 - 0.999 in float32


def test_zeroed_weights_are_zero_and_the_others_are_not() -> None:
    """planted."""
    model = nn.Linear(3, 2)
    disturbances.zeroed([model.bias], step=0).before_forward(0)
    assert not model.bias.any()
    assert model.weight.any()
