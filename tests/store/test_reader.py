"""Reading a folder made by hand, against a slow oracle of the replacement rule; and what is not there."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aftershock.store import RunReader, RunWriter
from aftershock.store import folder as fs
from aftershock.store.reader import HEARTBEAT_S

STAT = "grad/head/rms"
NAMES = st.sampled_from(["loss/train/ce", "loss/eval/ce", 'a b/c\u00e9/d"e'])
ROWS = st.lists(st.tuples(st.integers(0, 6), st.dictionaries(NAMES, st.floats(), min_size=1, max_size=3)), max_size=8)


def _oracle(segments: list[list[tuple[int, dict[str, float]]]]) -> dict[int, dict[str, float]]:
    """The rule, said slowly: each segment that has a row first deletes everything from its first step on."""
    table: dict[int, dict[str, float]] = {}
    for rows in segments:
        if rows:
            table = {step: row for step, row in table.items() if step < rows[0][0]}
        for step, row in rows:
            table.setdefault(step, {}).update(row)
    return table


@given(st.lists(ROWS, min_size=1, max_size=3))
def test_oracle_round_trip_of_scalars_with_segments(tmp_path_factory: pytest.TempPathFactory, rows: list) -> None:
    """Any floats, NaN and infinities included, any steps, up to three segments; a segment's steps ascend."""
    folder = tmp_path_factory.mktemp("store") / "r"
    segments = [sorted(segment, key=lambda row: row[0]) for segment in rows]
    for segment in segments:
        with RunWriter.open(folder, config={}, flush_every=2) as run:
            for step, values in segment:
                run.scalars(step, values)
    want = _oracle(segments)
    read = RunReader(folder)
    assert read.scalar_names() == sorted({name for row in want.values() for name in row})
    for name in read.scalar_names():
        steps, columns = read.scalars(name)
        expected = {step: row[name] for step, row in sorted(want.items()) if name in row}
        np.testing.assert_array_equal(steps, list(expected))
        np.testing.assert_array_equal(columns[name], list(expected.values()))  # nan equals nan, to the bit otherwise
    everything = read.scalars()
    assert everything.steps.tolist() == sorted(want)
    long = {(row.step, row.name): row.value for row in read.scalar_rows()}
    assert len(long) == sum(map(len, want.values()))
    assert all(math.isnan(v) == math.isnan(want[s][n]) for (s, n), v in long.items())


def test_contract_missing_is_missing(tmp_path: Path) -> None:
    RunWriter.open(tmp_path / "r", config={}).abandon()
    read = RunReader(tmp_path / "r")
    assert read.config == {}
    assert read.scalar_names() == read.stat_names() == read.events() == read.snapshots() == []
    assert read.summary == {}
    assert read.scalars().steps.shape == (0,)
    with pytest.raises(ValueError, match="no scalar 'loss'; none was recorded"):
        read.scalars("loss")
    with pytest.raises(ValueError, match=r"no statistic matches '\*'; none was recorded"):
        read.stats()
    with pytest.raises(ValueError, match="no snapshot of step 3; there: none"):
        read.load_snapshot(3)
    with pytest.raises(ValueError, match=r"no run here \(no config\.yaml\)"):
        RunReader(tmp_path)


def test_contract_patterns_and_near_names(tmp_path: Path) -> None:
    names = [f"grad/blocks.{i}.attn.qkv/rms" for i in range(30)] + [STAT]
    with RunWriter.open(tmp_path / "r", config={}) as run:
        run.scalars(0, {"loss/train/ce": 1.0})
        run.stats(0, names, np.arange(31.0))
    read = RunReader(tmp_path / "r")
    assert read.stat_names() == sorted(names)
    assert list(read.stats("grad/blocks.1*/rms")) == sorted(n for n in names if "blocks.1" in n)
    assert read.stats("grad/blocks.[23].*/*")["grad/blocks.3.attn.qkv/rms"].values.tolist() == [3.0]
    with pytest.raises(ValueError, match="no scalar 'loss/train/cd'; did you mean 'loss/train/ce'"):
        read.scalars("loss/train/cd")
    with pytest.raises(ValueError, match="did you mean 'grad/head/rms'"):
        read.stats("grad/head/rns")
    with pytest.raises(ValueError, match="known: 31 others, such as"):
        read.stats("zzzz")


def test_equivalence_statistics_follow_the_scalars_segment(tmp_path: Path) -> None:
    """Measured every 10 steps, resumed at 13: the statistics of step 20 of the abandoned branch must not show."""
    with RunWriter.open(tmp_path / "r", config={}) as run:
        for step in range(25):
            run.scalars(step, {"a": 0.0})
            if step % 10 == 0:
                run.stats(step, [STAT], np.array([float(step)]))
    with RunWriter.open(tmp_path / "r", config={}) as run:
        run.scalars(13, {"a": 1.0})
    read = RunReader(tmp_path / "r")
    assert read.scalars("a").steps.tolist() == list(range(14))
    assert read.stats()[STAT].steps.tolist() == [0, 10]


def test_planted_newer_schema_and_damage(tmp_path: Path) -> None:
    RunWriter.open(tmp_path / "r", config={}).close("finished", {"a": 1})
    folder = tmp_path / "r"
    event = {"schema": 2, "segment": 0, "step": 0, "kind": "x", "time": 0.0, "data": {}}
    (folder / fs.EVENTS).write_text(json.dumps(event) + "\n")
    words = r"newer aftershock \(schema 2, this one reads 1\); upgrade"
    with pytest.raises(ValueError, match=words):
        RunReader(folder).events()
    (folder / fs.DONE).write_text('{"schema": 7}')
    with pytest.raises(ValueError, match="schema 7"):
        _ = RunReader(folder).status
    (folder / fs.DONE).write_text("{")
    with pytest.raises(ValueError, match=r"done\.json: not JSON"):
        _ = RunReader(folder).status
    (folder / fs.ENV).write_text('{"schema": 2}')
    with pytest.raises(ValueError, match=words):
        RunReader(folder)


@pytest.mark.parametrize(("age_s", "status"), [(0.0, "running"), (HEARTBEAT_S + 60, "interrupted")])
def test_contract_status_of_a_mirror_is_its_heartbeat(tmp_path: Path, age_s: float, status: str) -> None:
    import time

    RunWriter.open(tmp_path / "r", config={}).abandon()
    url = f"file://{tmp_path / 'r'}"
    assert RunReader(url).status == "interrupted"
    (tmp_path / "r" / fs.HEARTBEAT).write_text(json.dumps({"schema": 1, "time": time.time() - age_s, "pid": 1}))
    assert RunReader(url).status == status
    assert RunReader(url).run_id == "r"
