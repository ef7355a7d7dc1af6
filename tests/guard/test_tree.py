"""Trees of state, taken apart and put together: the same values, no shared memory, with and without JSON between."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from aftershock.guard.tree import decode, encode, join, split

_leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.binary(max_size=3),
    st.sampled_from([torch.float16, torch.device("cpu"), 1 + 2j, torch.arange(3), torch.ones(()), torch.zeros(0, 2)]),
    st.sampled_from([np.arange(4, dtype=np.uint32), np.array(2.5), np.array([True])]),
)
_keys = st.one_of(st.text(max_size=3), st.integers(0, 3), st.just("~"))
_trees = st.recursive(
    _leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(_keys, inner, max_size=3),
        st.sets(st.integers()),
    ),
    max_leaves=12,
)


def _alike(one: Any, two: Any) -> bool:
    if isinstance(one, (Tensor, np.ndarray)):
        same_type = type(one) is type(two) and one.dtype == two.dtype and one.shape == two.shape
        return same_type and bool((one == two).all())
    if isinstance(one, dict):
        return isinstance(two, dict) and list(one) == list(two) and all(_alike(one[k], two[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(two) and len(one) == len(two) and all(map(_alike, one, two))
    return type(one) is type(two) and (one == two or one != one)


def _addresses(tree: Any) -> Iterator[int]:
    if isinstance(tree, Tensor):
        yield tree.data_ptr()
    elif isinstance(tree, np.ndarray):
        yield tree.ctypes.data
    elif isinstance(tree, (dict, list, tuple)):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from _addresses(part)


@given(_trees)
def test_any_tree_comes_back(tree: Any) -> None:
    """property: taken apart and put together, with and without JSON between, it is the same and shares nothing."""
    tensors: dict[str, Tensor] = {}
    rest = split(tree, "tree", tensors)
    assert _alike(join(rest, tensors), tree)
    assert _alike(join(decode(encode(rest, "tree")), tensors, host=True), tree)
    kept = {tensor.data_ptr() for tensor in tensors.values() if tensor.numel()}
    assert kept.isdisjoint(_addresses(join(rest, tensors)))


def test_what_no_tree_can_hold() -> None:
    """contract: refused in a sentence that names the place."""
    with pytest.raises(ValueError, match="tree/a is a torch.sparse_coo tensor"):
        split({"a": torch.eye(2).to_sparse()}, "tree", {})
    letters = (letter for letter in "ab")
    with pytest.raises(ValueError, match="tree/0: a generator cannot be copied"):
        split([letters], "tree", {})
    with pytest.raises(ValueError, match="state/f: a function cannot be written to disk"):
        encode({"f": _alike}, "state")


def test_two_places_of_one_tensor_part_again() -> None:
    """planted: state that shares a tensor now and did not then must not be written over itself."""
    kept: dict[str, Tensor] = {}
    rest = split({"a": torch.zeros(2), "b": torch.ones(2)}, "s", kept)
    shared = torch.full((2,), 5.0)
    back = join(rest, kept, live={"a": shared, "b": shared})
    assert back["a"].tolist() == [0, 0]
    assert back["b"].tolist() == [1, 1]
