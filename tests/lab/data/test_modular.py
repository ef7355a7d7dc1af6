"""ModularBatches: every equation is true, the split is a partition, a large batch is the full split."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aftershock.lab.data.modular import ModularBatches
from aftershock.lab.recipe import ModularData

Operation = Literal["add", "sub", "mul", "div"]
OPERATIONS: list[Operation] = ["add", "sub", "mul", "div"]


def everything(batches: ModularBatches) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """All equations, both sides of the split."""
    train, held_out = batches.train(np.array([0]), 0, 10**9), batches.eval(10**9)
    inputs = torch.cat([train.inputs_KBT[0], held_out.inputs_KBT[0]])
    targets = torch.cat([train.targets_KBT[0], held_out.targets_KBT[0]])
    return inputs, targets, np.concatenate([train.ids_KB[0], held_out.ids_KB[0]])


@given(st.sampled_from(OPERATIONS), st.sampled_from([3, 5, 11]), st.floats(0.2, 0.8), st.integers(0, 99))
def test_oracle_every_equation_once_and_true(
    operation: Operation, modulus: int, train_frac: float, split_seed: int
) -> None:
    config = ModularData(modulus=modulus, operation=operation, train_frac=train_frac, split_seed=split_seed)
    inputs, targets, ids = everything(ModularBatches(config))
    seen = set()
    for (a, op, b, equals), target in zip(inputs.tolist(), targets.tolist(), strict=True):
        c = target[-1]
        holds = {"add": (a + b - c), "sub": (a - b - c), "mul": (a * b - c), "div": (c * b - a)}[operation]
        assert holds % modulus == 0
        assert (op, equals, target[:3]) == (modulus, modulus + 1, [-1, -1, -1])
        assert 0 <= c < modulus
        assert operation != "div" or b != 0
        seen.add((a, b))
    expected = modulus * (modulus - 1) if operation == "div" else modulus**2
    assert len(seen) == len(inputs) == expected
    assert sorted(ids.tolist()) == list(range(expected))


def test_sizes_of_the_published_task() -> None:
    """97^2 = 9,409 equations; division 97 x 96 = 9,312 (Power et al. 2022)."""
    assert len(everything(ModularBatches(ModularData()))[0]) == 9409
    assert len(everything(ModularBatches(ModularData(operation="div")))[0]) == 9312
    batches = ModularBatches(ModularData(train_frac=0.3))
    assert (batches.vocab_size, batches.context) == (99, 4)
    assert batches.describe()["train_equations"] == round(0.3 * 9409)


def test_large_batch_is_the_full_split_at_every_step_for_every_replica() -> None:
    batches = ModularBatches(ModularData(modulus=7))
    full = batches.train(np.array([0, 1]), 3, 24)
    assert full.inputs_KBT.shape == (2, 24, 4)
    assert torch.equal(full.inputs_KBT[0], full.inputs_KBT[1])
    assert len(set(full.ids_KB[0].tolist())) == 24
    assert torch.equal(full.inputs_KBT, batches.train(np.array([8, 9]), 4, 1000).inputs_KBT)
    assert batches.train(np.array([0]), 3, 23).inputs_KBT.shape == (1, 23, 4)


def test_ids_name_the_same_equation_whatever_the_split() -> None:
    batches = [ModularBatches(ModularData(modulus=7, split_seed=seed)) for seed in (0, 1)]
    tables = []
    for one in batches:
        inputs, _, ids = everything(one)
        tables.append(inputs[torch.from_numpy(np.argsort(ids))])
    assert torch.equal(tables[0], tables[1])
    assert tables[0][10].tolist() == [1, 7, 3, 8]  # id 10 = 3 + 7 * 1
    first, second = (one.eval(10**9).ids_KB[0].tolist() for one in batches)
    assert first != second


def test_the_first_equations_of_eval_do_not_depend_on_how_many_are_asked_for() -> None:
    batches = ModularBatches(ModularData(modulus=7))
    assert torch.equal(batches.eval(5).inputs_KBT, batches.eval(9).inputs_KBT[:, :5])


@pytest.mark.parametrize("train_frac", [0.01, 0.99])
def test_planted_empty_side_of_the_split(train_frac: float) -> None:
    with pytest.raises(ValueError, match=rf"data.train_frac={train_frac} puts [09] of 9 equations into training"):
        ModularBatches(ModularData(modulus=3, train_frac=train_frac))


def test_planted_no_evaluation_sequences() -> None:
    with pytest.raises(ValueError, match="eval_sequences must be at least 1, got 0"):
        ModularBatches(ModularData()).eval(0)
