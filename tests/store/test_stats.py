"""Parquet parts: flushes, merges, what a killed merge leaves, and the slow oracle of reading them."""

from __future__ import annotations

import shutil
from pathlib import Path

import duckdb
import numpy as np
import pytest

from aftershock.store.place import Place
from aftershock.store.stats import StatsFile, list_parts, read_stat_names, read_stat_rows, split_name

NAMES = ["grad/head/rms", "grad/blocks.0.attn.qkv/rms", "attn/blocks.0/max_logit"]


def _parts(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "stats").iterdir())


def _table(folder: Path, name: str) -> list[tuple[int, int, float]]:
    rows = read_stat_rows(Place(folder), [name])
    return list(zip(rows.segments.tolist(), rows.steps.tolist(), rows.values.tolist(), strict=True))


def test_round_trip_of_three_flushes_and_a_merge(tmp_path: Path) -> None:
    """Equivalence: the same rows in the same order before and after the merge."""
    stats = StatsFile(tmp_path, 2)
    values = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    values[1, 0], values[2, 0], values[3, 0] = np.nan, np.inf, -np.inf
    for i in range(6):
        stats.add(10 * i, NAMES, values[i])
        if i % 2:
            stats.flush()
    assert _parts(tmp_path) == ["part-2-0.parquet", "part-2-20.parquet", "part-2-40.parquet"]
    assert read_stat_names(Place(tmp_path)) == sorted(NAMES)
    before = [read_stat_rows(Place(tmp_path), [name]) for name in NAMES]
    stats.merge()
    assert _parts(tmp_path) == ["part-2-0-50.parquet"]
    for column, name in enumerate(NAMES):
        after = read_stat_rows(Place(tmp_path), [name])
        for mine, theirs in zip(before[column][1:], after[1:], strict=True):
            np.testing.assert_array_equal(mine, theirs)
        np.testing.assert_array_equal(after.values, values[:, column].astype(np.float64))
        assert after.segments.tolist() == [2] * 6


def test_oracle_rows_equal_a_plain_scan(tmp_path: Path) -> None:
    stats = StatsFile(tmp_path, 0)
    for step in range(4):
        stats.add(step, NAMES, np.arange(3) + step / 7)
    stats.merge()
    file = tmp_path / "stats" / "part-0-0-3.parquet"
    with duckdb.connect() as con:
        scan = con.execute(f"select kind || '/' || place || '/' || stat, step, value from '{file}'").fetchall()
        meta = dict(con.execute(f"select key::varchar, value::varchar from parquet_kv_metadata('{file}')").fetchall())
    for name in NAMES:
        assert [(step, value) for _, step, value in _table(tmp_path, name)] == [(s, v) for n, s, v in scan if n == name]
    assert meta["schema"] == "1"
    assert meta["run_id"] == tmp_path.name


def test_planted_killed_merge_leaves_parts_that_are_ignored(tmp_path: Path) -> None:
    """The merged part is in place, the parts it was made of are not deleted yet: no row may appear twice."""
    stats = StatsFile(tmp_path, 0)
    for step in (0, 5):
        stats.add(step, NAMES, np.ones(3))
        stats.flush()
    shutil.copytree(tmp_path / "stats", tmp_path / "kept")
    stats.merge()
    for part in (tmp_path / "kept").iterdir():
        shutil.copy(part, tmp_path / "stats")
    assert len(_parts(tmp_path)) == 3
    assert [part.name for part in list_parts(Place(tmp_path))] == ["part-0-0-5.parquet"]
    assert _table(tmp_path, NAMES[0]) == [(0, 0, 1.0), (0, 5, 1.0)]


def test_planted_second_flush_at_one_step_loses_nothing(tmp_path: Path) -> None:
    """Both flushes begin at step 3, so their parts would have one name."""
    stats = StatsFile(tmp_path, 0)
    stats.add(3, NAMES[:1], np.array([1.0]))
    stats.flush()
    stats.add(3, NAMES[1:2], np.array([2.0]))
    stats.flush()
    assert _parts(tmp_path) == ["part-0-3.parquet"]
    assert _table(tmp_path, NAMES[0]) == [(0, 3, 1.0)]
    assert _table(tmp_path, NAMES[1]) == [(0, 3, 2.0)]


def test_equivalence_float32_and_float64_parts_are_read_together(tmp_path: Path) -> None:
    """1/3 in float64 must not pass through the float32 of the first part."""
    stats = StatsFile(tmp_path, 0)
    stats.add(0, NAMES[:1], np.array([1 / 3], dtype=np.float32))
    stats.flush()
    stats.add(1, NAMES[:1], np.array([1 / 3]))
    stats.flush()
    assert [v for _, _, v in _table(tmp_path, NAMES[0])] == [float(np.float32(1 / 3)), 1 / 3]


def test_contract_values_are_copied(tmp_path: Path) -> None:
    stats, buffer = StatsFile(tmp_path, 0), np.ones(1)
    stats.add(0, NAMES[:1], buffer)
    buffer[:] = 9
    stats.flush()
    assert _table(tmp_path, NAMES[0]) == [(0, 0, 1.0)]


def test_planted_bad_calls(tmp_path: Path) -> None:
    stats = StatsFile(tmp_path, 0)
    with pytest.raises(ValueError, match="got 2 names and values of shape"):
        stats.add(0, NAMES[:2], np.ones(3))
    with pytest.raises(ValueError, match="'loss' must read kind/place/stat"):
        stats.add(0, ["loss"], np.ones(1))
    stats.add(5, NAMES, np.ones(3))
    with pytest.raises(ValueError, match="went back from step 5 to 4: call new_segment"):
        stats.add(4, NAMES, np.ones(3))
    assert split_name("a/b/c") == ("a", "b", "c")
    (tmp_path / "stats" / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"notes\.txt: not a part of the statistics"):
        list_parts(Place(tmp_path))


def test_contract_nothing_written_reads_as_nothing(tmp_path: Path) -> None:
    stats = StatsFile(tmp_path, 0)
    stats.flush()
    stats.merge()
    assert read_stat_names(Place(tmp_path)) == []
    assert read_stat_rows(Place(tmp_path), NAMES).values.shape == (0,)
