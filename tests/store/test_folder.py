"""Locks between processes, torn and damaged files, atomic writes, plain values."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aftershock.store import folder as fs

JSON_LIKE = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.sampled_from(["a", "b"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["x", "y"]), inner, max_size=2),
    max_leaves=8,
)


def test_contract_lock_excludes_and_ends_with_release(tmp_path: Path) -> None:
    assert not fs.is_locked(tmp_path)
    lock = fs.FolderLock(tmp_path)
    assert fs.is_locked(tmp_path)
    with pytest.raises(ValueError, match=f"is being written by process {os.getpid()}; wait for it"):
        fs.FolderLock(tmp_path)
    lock.release()
    assert not fs.is_locked(tmp_path)
    fs.FolderLock(tmp_path).release()


def test_contract_a_reader_probing_the_lock_does_not_turn_a_writer_away(tmp_path: Path) -> None:
    """A probe holds the lock shared for an instant; here it is held so by a thread for a fifth of a second."""
    import fcntl
    import threading

    fd = os.open(tmp_path / fs.LOCK, os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_SH)
    timer = threading.Timer(0.2, os.close, [fd])
    timer.start()
    lock = fs.FolderLock(tmp_path)
    assert fs.is_locked(tmp_path)  # the writer has it, not the probe
    lock.release()
    timer.join()


@pytest.mark.parametrize(
    ("number", "words"),
    [(2, r"newer aftershock \(schema 2, this one reads 1\); upgrade"), (None, "not written by"), (True, "not written")],
)
def test_planted_schema(number: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fs.check_schema(number, "env.json")


def test_planted_torn_tail_is_ignored_then_cut(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a":1}\n{"a":2}\n{"a":')
    assert fs.read_lines(path.read_bytes(), "rows") == [{"a": 1}, {"a": 2}]
    lines = fs.JsonLines(path)
    lines.append(b'{"a":3}\n')
    lines.close()
    assert fs.read_lines(path.read_bytes(), "rows") == [{"a": 1}, {"a": 2}, {"a": 3}]


@pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, 65_537, 200_000])
def test_planted_torn_tail_of_any_length(tmp_path: Path, size: int) -> None:
    """The search for the last newline goes back in blocks of 65,536 bytes: lengths on both sides of one."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a":1}\n' + b"x" * size)
    fs.JsonLines(path).close()
    assert path.read_bytes() == b'{"a":1}\n'
    path.write_bytes(b"x" * size)
    fs.JsonLines(path).close()
    assert path.read_bytes() == b""


def test_planted_damage_before_the_tail_is_an_error() -> None:
    with pytest.raises(ValueError, match="rows: line 2 is not a JSON object"):
        fs.read_lines(b'{"a":1}\n{"a"\n{"a":3}\n', "rows")
    with pytest.raises(ValueError, match="line 1"):
        fs.read_lines(b"3\n", "rows")


def test_contract_replacing_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "done.json"
    fs.atomic_write(path, b"old")

    def fail() -> None:
        with fs.replacing(path) as tmp:
            tmp.write_bytes(b"half")
            assert path.read_bytes() == b"old"
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["done.json"]
    fs.atomic_write(path, b"new")
    assert path.read_bytes() == b"new"


def test_contract_disk_errors_names_the_folder_and_passes_others_on(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=f"{tmp_path}: no room left to write") as caught, fs.disk_errors(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(PermissionError), fs.disk_errors(tmp_path):
        raise PermissionError(errno.EACCES, "no")
    with pytest.raises(KeyError, match="no space left on device"), fs.disk_errors(tmp_path):
        raise KeyError("no space left on device")


@given(JSON_LIKE)
def test_round_trip_plain_values(value: Any) -> None:
    assert fs.unspell(json.loads(fs.to_json({"v": value})))["v"] == fs.plain(value, "v") or _has_inf(value)


@given(st.floats())
def test_round_trip_any_float_to_the_bit(value: float) -> None:
    back = fs.unspell(json.loads(fs.to_json({"v": [value]})))["v"][0]
    assert isinstance(back, float)
    assert (math.isnan(back) and math.isnan(value)) or (
        back == value and math.copysign(1, back) == math.copysign(1, value)
    )


def test_round_trip_numpy_and_paths() -> None:
    record = {"a": np.float32(0.5), "b": np.int64(3), "c": np.array([1.0, np.nan]), "d": (1, 2), "e": Path("x")}
    back = fs.unspell(json.loads(fs.to_json(record)))
    assert back["a"] == 0.5
    assert back["b"] == 3
    assert back["c"][0] == 1.0
    assert math.isnan(back["c"][1])
    assert back["d"] == [1, 2]
    assert back["e"] == "x"


def test_planted_value_that_json_cannot_hold() -> None:
    with pytest.raises(ValueError, match=r"event spike\.who: object cannot be stored"):
        fs.plain({"who": object()}, "event spike")


def _has_inf(value: Any) -> bool:
    if isinstance(value, float):
        return math.isinf(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return any(_has_inf(v) for v in inner)
