"""Families of sizes: what varies, what belongs, and how far a forecast may go."""

from __future__ import annotations

import math

import pytest

from aftershock.forecast.family import find_family
from aftershock.lab.sizes import parse_size

WIDTHS = [(16, 2), (32, 2), (48, 2)]


@pytest.mark.parametrize(
    ("sizes", "kind"),
    [
        (WIDTHS, "width"),
        ([(32, 2), (32, 4), (32, 8)], "depth"),
        ([(16, 1), (32, 2), (64, 4)], "joint"),
        ([(32, 2), (32, 8), (64, 2), (64, 8)], "both"),
    ],
)
def test_kinds(sizes: list[tuple[float, float]], kind: str) -> None:
    """planted."""
    assert find_family(sizes).kind == kind


@pytest.mark.parametrize("sizes", [WIDTHS, [(32, 2), (32, 4), (32, 8)], [(16, 1), (32, 2), (64, 4)]])
def test_one_coordinate_is_log_n(sizes: list[tuple[float, float]]) -> None:
    """equivalence: features are 1, n and n^2, centred, and `point_at` gives back the size of an N."""
    family = find_family(sizes)
    n = [math.log10(12 * depth * width**2) for width, depth in sizes]
    rows = family.features(sizes)
    assert rows[:, 1] == pytest.approx([value - sum(n) / 3 for value in n], abs=1e-12)
    assert rows[:, 2] == pytest.approx(rows[:, 1] ** 2)
    for value, size in zip(n, sizes, strict=True):
        assert family.point_at(value) == pytest.approx(size, rel=0.02)  # these lie on their line but for rounding


def test_both_directions_have_a_slope_each() -> None:
    """property: width and depth move only their own coordinate."""
    family = find_family([(32, 2), (32, 8), (64, 2), (64, 8)])
    rows = family.features([(32, 2), (64, 2), (32, 8)])
    assert rows[1, 1] > rows[0, 1]
    assert rows[1, 2] == rows[0, 2]
    assert rows[2, 2] > rows[0, 2]
    with pytest.raises(ValueError, match="no single member"):
        family.point_at(5.0)


def test_how_far() -> None:
    """contract: once the span in N with two sizes, twice with three; both ways."""
    two, three = find_family(WIDTHS[:2]), find_family(WIDTHS)
    two.check(parse_size("64x2"))
    with pytest.raises(ValueError, match="9 times beyond the 2 sizes trained, which span a factor 4 .* a third size"):
        two.check(parse_size("96x2"))
    three.check(parse_size("192x2"))
    three.check(parse_size("16x2"))
    with pytest.raises(ValueError, match="train a larger size"):
        three.check(parse_size("1024x2"))
    with pytest.raises(ValueError, match="times beyond"):
        two.check(parse_size("4x2x1"))


@pytest.mark.parametrize(
    ("sizes", "target", "words"),
    [
        (WIDTHS, "64x4", "width only"),
        ([(32, 2), (32, 4)], "64x2", "depth only"),
        ([(16, 1), (32, 2), (64, 4)], "128x2", "width and depth together"),
    ],
)
def test_a_target_off_the_family_is_refused(sizes: list[tuple[float, float]], target: str, words: str) -> None:
    """contract."""
    with pytest.raises(ValueError, match=f"off the family trained, whose sizes vary in {words}"):
        find_family(sizes).check(parse_size(target))


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ([(32, 2)], "nearly the same N"),
        ([(32, 2), (34, 2)], "nearly the same N"),
        ([(32, 2), (32, 4), (64, 2)], "takes 4 sizes"),
    ],
)
def test_sizes_that_determine_no_family_are_refused(sizes: list[tuple[float, float]], words: str) -> None:
    """contract."""
    with pytest.raises(ValueError, match=words):
        find_family(sizes)
