"""sizes: names and shapes both ways, the paper's family, and what is not a size."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aftershock.config import override
from aftershock.lab.recipe import DecoderConfig, RunConfig
from aftershock.lab.sizes import FAMILY, Size, default_heads, parse_size, with_size


@given(st.integers(1, 10_000), st.integers(0, 200), st.integers(1, 64))
def test_label_round_trip(width: int, depth: int, heads: int) -> None:
    """round trip: any size is written so that it is read back equal."""
    size = Size(width, depth, heads)
    assert parse_size(size.label) == size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64x3", Size(64, 3, 4)),
        ("64x3x8", Size(64, 3, 8)),
        ("8x1", Size(8, 1, 1)),
        ("16x0", Size(16, 0, 1)),
        ("128x4", Size(128, 4, 8)),
        ("256x3", Size(256, 3, 4)),
        ("512x6", Size(512, 6, 8)),
        ("2.4M", Size(256, 3, 4)),
    ],
)
def test_parse(text: str, size: Size) -> None:
    """contract: heads of dimension 16 below width 256, of 64 from there on."""
    assert parse_size(text) == size


def test_oracle_family() -> None:
    """oracle: 12 L d^2 rounds to the name of each, heads are of dimension 64, and each is a decoder that can be."""
    unit = {"M": 1e6, "B": 1e9}
    for name, size in FAMILY.items():
        named = float(name[:-1]) * unit[name[-1]]
        digits = len(name.rstrip("MB").replace(".", ""))
        assert float(f"{size.num_block_params:.{digits}g}") == pytest.approx(named, rel=1e-9), name
        assert size.num_block_params == 12 * size.depth * size.width**2
        assert size.width == 64 * size.heads == 64 * default_heads(size.width)
        with_size(RunConfig(), size)


def test_with_size_changes_the_shape_alone() -> None:
    run = RunConfig(model=DecoderConfig(qk_norm="off", mlp_ratio=2), seed=5)
    sized = with_size(run, Size(32, 1, 2))
    assert sized.model == DecoderConfig(qk_norm="off", mlp_ratio=2, width=32, depth=1, heads=2)
    assert override(run, {"model.width": 32, "model.depth": 1, "model.heads": 2}) == sized


@pytest.mark.parametrize("text", ["", "64", "64x", "x3", "64x3x", "64x3x4x5", "64 x 3", "-64x3", "6.4x3", "64X3"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="neither WIDTHxDEPTH"):
        parse_size(text)


def test_a_name_that_is_nearly_right() -> None:
    with pytest.raises(ValueError, match=r"size '2.5M' is neither .* of the family; did you mean '2.4M'\?"):
        parse_size("2.5M")


def test_sizes_that_make_no_decoder() -> None:
    with pytest.raises(ValueError, match="does not divide"):
        with_size(RunConfig(), parse_size("64x3x5"))
    with pytest.raises(ValueError, match="model.heads must be at least 1, got 0"):
        with_size(RunConfig(), parse_size("64x3x0"))
    with pytest.raises(ValueError, match="sizes apply to the decoder, not to model.kind=mlp"):
        with_size(override(RunConfig(), {"data.kind": "modular", "model.kind": "mlp"}), Size(64, 3, 4))
