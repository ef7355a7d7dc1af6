"""Sizes by name: the paper's family (arXiv 2309.14322; shapes derived, not printed there) and tiny members for a CPU.

A size is written `WIDTHxDEPTH`, `WIDTHxDEPTHxHEADS`, or by a name of `FAMILY`. Heads grow with the width so that the
head dimension stays constant along a family: 64 in the paper's, 16 in the tiny one.
"""

from __future__ import annotations

import dataclasses
import re
from typing import NamedTuple

from aftershock.config import nearest
from aftershock.lab.recipe import DecoderConfig, RunConfig

TINY_HEAD_DIM, PAPER_HEAD_DIM, PAPER_MIN_WIDTH = 16, 64, 256


class Size(NamedTuple):
    """Width, depth and heads of a decoder."""

    width: int
    depth: int
    heads: int

    @property
    def label(self) -> str:
        usual = self.heads == default_heads(self.width)
        return f"{self.width}x{self.depth}" if usual else f"{self.width}x{self.depth}x{self.heads}"

    @property
    def num_block_params(self) -> int:
        """12 L d^2: the paper's N, without embedding and head."""
        return 12 * self.depth * self.width**2


FAMILY: dict[str, Size] = {
    "2.4M": Size(256, 3, 4),
    "9.4M": Size(512, 3, 8),
    "19M": Size(512, 6, 8),
    "85M": Size(768, 12, 12),
    "302M": Size(1024, 24, 16),
    "1.2B": Size(2048, 24, 32),
    "4.8B": Size(4096, 24, 64),
}
"""Section 2.1 and figure 1: the sizes the text names. d_h = 64 is nanodo's default, not stated in the paper."""


def default_heads(width: int) -> int:
    """Heads at the family's head dimension; one head where the width is smaller than that."""
    return max(1, width // (PAPER_HEAD_DIM if width >= PAPER_MIN_WIDTH else TINY_HEAD_DIM))


def parse_size(text: str) -> Size:
    """`64x3`, `64x3x4` or `2.4M` to a Size. Raises ValueError with what is accepted."""
    if text in FAMILY:
        return FAMILY[text]
    match = re.fullmatch(r"(\d+)x(\d+)(?:x(\d+))?", text)
    if match is None:
        raise ValueError(
            f"size {text!r} is neither WIDTHxDEPTH[xHEADS] nor a name of the family{nearest(text, FAMILY)}"
        )
    width, depth = int(match[1]), int(match[2])
    return Size(width, depth, int(match[3]) if match[3] else default_heads(width))


def with_size(config: RunConfig, size: Size) -> RunConfig:
    """`config` with its decoder at this size. Raises ValueError for a model that has no width, depth and heads."""
    if not isinstance(config.model, DecoderConfig):
        raise ValueError(f"sizes apply to the decoder, not to model.kind={config.model.kind}")
    model = dataclasses.replace(config.model, width=size.width, depth=size.depth, heads=size.heads)
    return dataclasses.replace(config, model=model)
