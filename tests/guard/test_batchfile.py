"""Batches of any shape on disk and back."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from aftershock.guard import batchfile


class Tokens(NamedTuple):
    ids: Tensor
    source: str


@dataclasses.dataclass
class Pair:
    x: Tensor
    weight: float


def test_round_trip_of_batches_of_any_shape() -> None:
    """round trip: tensors of all kinds, arrays, NamedTuples, dataclasses, text, NaN; what cannot be kept says so."""
    batch = {
        "a": [torch.arange(3), torch.tensor(1.5, dtype=torch.bfloat16)],
        "b": (Tokens(torch.ones(2, 2).t(), "web"), None, math.nan),
        "c": Pair(torch.zeros(0, 3), 0.5),
        "d": torch.arange(4).numpy(),
    }
    packed = batchfile.pack(batch, "7")
    tree = json.loads(json.dumps(packed.tree, allow_nan=False))
    back = batchfile.unpack(tree, packed.tensors)
    assert torch.equal(back["a"][0], batch["a"][0])
    assert back["a"][1].dtype == torch.bfloat16
    tokens, nothing, hole = back["b"]
    assert isinstance(tokens, Tokens)
    assert (tokens.source, nothing, math.isnan(hole)) == ("web", None, True)
    assert isinstance(back["c"], Pair)
    assert back["c"].x.shape == (0, 3)
    assert back["d"].tolist() == [0, 1, 2, 3]
    odd = batchfile.pack({"x": object()}, "8")
    with pytest.raises(ValueError, match="builtins.object could not be kept"):
        batchfile.unpack(odd.tree, odd.tensors)
    with pytest.raises(ValueError, match="import nowhere first"):
        batchfile.unpack({"object": "nowhere:Thing", "fields": {}}, {})
    with pytest.raises(ValueError, match="no NamedTuple or dataclass"):
        batchfile.unpack({"object": "subprocess:Popen", "fields": {"args": {"value": "true"}}}, {})
    assert "nowhere" not in sys.modules
