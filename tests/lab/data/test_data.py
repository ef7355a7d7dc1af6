"""Contract of every kind of data: a new kind joins by one line in CASES, and a test sees to it that it does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import aftershock.lab.data as data
from aftershock.lab.data import LanguageBatches, ModularBatches, build_batches
from aftershock.lab.recipe import LanguageData, ModularData

Batches = LanguageBatches | ModularBatches
Config = LanguageData | ModularData


def text_folder(folder: Path) -> LanguageData:
    for index in range(12):
        (folder / f"{index}.txt").write_text(f"document {index} " * (5 + index))
    return LanguageData(source=str(folder), context=8, eval_frac=0.2)


def text_file(folder: Path) -> LanguageData:
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    return LanguageData(source=str(folder / "text.txt"), context=8)


def token_file(folder: Path) -> LanguageData:
    (np.arange(3000) % 700).astype("<u2").tofile(folder / "ids.bin")
    return LanguageData(source=str(folder / "ids.bin"), context=8, vocab_size=700)


def wide_token_file(folder: Path) -> LanguageData:
    (np.arange(3000) * 100).astype("<u4").tofile(folder / "ids.bin")
    return LanguageData(source=str(folder / "ids.bin"), context=8, vocab_size=300_000, token_dtype="uint32")


CASES: dict[str, Callable[[Path], Config]] = {
    "stdlib": lambda folder: LanguageData(),
    "text_folder": text_folder,
    "text_file": text_file,
    "token_file": token_file,
    "wide_token_file": wide_token_file,
    "modular_add": lambda folder: ModularData(modulus=11),
    "modular_div": lambda folder: ModularData(modulus=11, operation="div", train_frac=0.7),
}


@pytest.fixture(params=CASES, scope="module")
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return CASES[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def batches(config: Config) -> Batches:
    return build_batches(config)


def test_contract_covers_every_kind(tmp_path: Path) -> None:
    assert {case(tmp_path).kind for case in CASES.values()} == set(data._BUILDERS)


def test_contract_batch_is_a_pure_function_of_seed_and_step(batches: Batches, config: Config) -> None:
    """Asked again, out of order, in other company, and from a fresh reading of the same data: the same bits."""
    first = batches.train(np.array([3, 4]), 7, 5)
    batches.train(np.array([9]), 8, 2)
    batches.eval(3)
    for again in (batches.train(np.array([3, 4]), 7, 5), build_batches(config).train(np.array([3, 4]), 7, 5)):
        assert torch.equal(first.inputs_KBT, again.inputs_KBT)
        assert torch.equal(first.targets_KBT, again.targets_KBT)
        assert np.array_equal(first.ids_KB, again.ids_KB)
    alone = batches.train(np.array([4]), 7, 5)
    assert torch.equal(first.inputs_KBT[1], alone.inputs_KBT[0])


def test_contract_seeds_and_steps_differ(batches: Batches) -> None:
    one = batches.train(np.array([0, 1]), 0, 8).ids_KB
    two = batches.train(np.array([0, 1]), 1, 8).ids_KB
    assert not np.array_equal(one[0], one[1])
    assert not np.array_equal(one[0], two[0])


def test_contract_shapes_types_and_range(batches: Batches) -> None:
    for batch, shape in ((batches.train(np.array([0, 1, 2]), 0, 5), (3, 5)), (batches.eval(4), (1, 4))):
        assert batch.inputs_KBT.shape == batch.targets_KBT.shape == (*shape, batches.context)
        assert batch.ids_KB.shape == shape
        assert batch.inputs_KBT.dtype == batch.targets_KBT.dtype == torch.int64
        assert batch.ids_KB.dtype == np.int64
        assert batch.inputs_KBT.is_contiguous()
        assert batch.targets_KBT.is_contiguous()
        assert 0 <= int(batch.inputs_KBT.min()) <= int(batch.inputs_KBT.max()) < batches.vocab_size
        assert -1 <= int(batch.targets_KBT.min()) <= int(batch.targets_KBT.max()) < batches.vocab_size
        assert bool((batch.targets_KBT[..., -1] >= 0).all())


def test_contract_equal_ids_are_equal_samples(batches: Batches) -> None:
    seen: dict[int, list[int]] = {}
    for step in range(30):
        batch = batches.train(np.array([0]), step, 16)
        for name, row in zip(batch.ids_KB[0].tolist(), batch.inputs_KBT[0].tolist(), strict=True):
            assert seen.setdefault(name, row) == row


def test_contract_eval_is_fixed(batches: Batches, config: Config) -> None:
    first = batches.eval(6)
    batches.train(np.array([1]), 5, 2)
    for again in (batches.eval(6), build_batches(config).eval(6)):
        assert torch.equal(first.inputs_KBT, again.inputs_KBT)
        assert np.array_equal(first.ids_KB, again.ids_KB)


def test_contract_batches_do_not_share_memory(batches: Batches) -> None:
    """A caller that writes into a batch must not change the next one."""
    before = batches.eval(4).inputs_KBT.clone()
    batches.eval(4).inputs_KBT.fill_(0)
    assert torch.equal(batches.eval(4).inputs_KBT, before)


def test_contract_describe_is_plain(batches: Batches) -> None:
    described = batches.describe()
    assert {"kind", "description", "context", "vocab_size"} <= set(described)
    assert all(isinstance(value, (str, int)) for value in described.values())
