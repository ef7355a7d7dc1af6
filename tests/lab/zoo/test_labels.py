"""The hindsight labels: planted spikes of every size are found where they are, and calm curves have none."""

from __future__ import annotations

import math

import numpy as np
import pytest

from aftershock.lab.zoo.labels import Spike, label


def _text(seed: int, steps: int = 800, noise: float = 0.1) -> np.ndarray:
    """A loss like that of a small language model: 5.5 falling to 2.5 nats, with batch noise."""
    step = np.arange(steps)
    return 2.5 + 3 * np.exp(-step / 60) + np.random.default_rng(seed).normal(0, noise, steps)


def _memorised(steps: int = 800) -> np.ndarray:
    """Falls without noise from 4 to 1e-7."""
    return 4 * np.exp(-np.arange(steps) / 20) + 1e-7


@pytest.mark.parametrize("seed", range(10))
def test_a_calm_curve_has_no_spike(seed: int) -> None:
    """planted: the clean case, noisy text; 6 s above the lowest median is beyond 800 normal draws."""
    assert label(_text(seed)) == []


@pytest.mark.parametrize(
    "curve",
    [
        _memorised(),
        np.full(100, 2.0),
        np.zeros(100),
        np.linspace(3, 1, 400),
        1e-6 * (1 + 5 * (np.arange(300) % 40 == 7)),
        [],
        [1.0] * 5,
    ],
    ids=["memorised", "constant", "zero", "line", "below the floor", "empty", "short"],
)
def test_other_calm_curves(curve: list[float]) -> None:
    """planted: the clean case; jumps from 1e-6 to 6e-6 stay below the floor of 1e-4."""
    assert label(curve) == []


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("height", [0.8, 1.5, 10.0])
def test_a_spike_on_noisy_text_is_found_where_it_is(seed: int, height: float) -> None:
    """planted: a triangle over steps 500 to 520 of peak 510; noise may hide its feet, a few steps each side."""
    curve = _text(seed)
    curve[500:521] += height * (1 - np.abs(np.arange(-10, 11)) / 10)
    (spike,) = label(curve)
    assert 500 <= spike.onset <= 510
    assert abs(spike.peak - 510) <= 3
    assert 510 < spike.end <= 523


def test_a_slingshot_is_found() -> None:
    """planted: from 1e-7 to 0.1 in ten steps and back over two hundred; the slow way back is no second spike."""
    curve = _memorised()
    curve[600:610] = np.geomspace(1e-7, 0.1, 10)
    curve[610:] = 0.1 * np.exp(-np.arange(190) / 15) + 1e-7
    (spike,) = label(curve)
    # ten steps of a factor 4.6: the sixth is above 1e-4
    assert (spike.onset, spike.peak) == (605, 610)
    # 0.1 has fallen to a twentieth after 15 ln 20 = 45 steps
    assert spike.end == 610 + 45


def test_two_spikes_far_apart_and_a_bounce() -> None:
    """planted: a bounce within 20 steps belongs to its spike, a rise after a calm stretch is another."""
    curve = np.full(400, 1.0)
    curve[100], curve[110], curve[200] = 4.0, 3.0, 5.0
    assert label(curve) == [Spike(100, 100, 111), Spike(200, 200, 201)]


def test_a_rise_over_a_hundred_steps_is_found() -> None:
    """planted: from 1.5 to 2.7 nats under noise, and staying there: it has no end."""
    curve = _text(0, 900) - 1.0
    curve[500:] += np.clip((np.arange(400)) / 100, 0, 1) * 1.2
    (spike,) = label(curve)
    assert 510 <= spike.onset <= 600
    assert spike.end == 900


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_a_spike(bad: float) -> None:
    """planted: its peak is the first such step; without an end when nothing finite follows."""
    assert label([1.0] * 50 + [bad] * 10) == [Spike(50, 50, 60)]
    assert label([1.0] * 50 + [1.5, 9.0, bad, bad] + [1.0] * 40) == [Spike(50, 52, 54)]
    assert label([3.0, bad, 2.0] + [1.0] * 40) == [Spike(1, 1, 2)]
    assert label([bad]) == [Spike(0, 0, 1)]


def test_scale_matters_only_through_the_stated_floors() -> None:
    """property: a curve far above both floors has the same spikes when all its values are multiplied."""
    curve = _text(1)
    curve[400:410] += 8.0
    assert label(curve) == label(1000 * curve) != []


def test_one_odd_batch_is_no_spike() -> None:
    """planted: 0.9 nats under noise of 0.1 for one step is 9 s and no spike; for two steps it is one, as is 2 nats."""
    for height, length, spikes in ((0.9, 1, 0), (0.9, 2, 1), (2.0, 1, 1)):
        curve = _text(2)
        curve[600 : 600 + length] = 2.5 + height
        assert len(label(curve)) == spikes


def test_two_dimensional_losses_are_refused() -> None:
    """contract."""
    with pytest.raises(ValueError, match="one value a step"):
        label(np.zeros((3, 2)))
