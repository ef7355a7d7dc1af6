"""Binary logs: TensorBoard against its own writer and reader, W&B against its format; damage, growth."""

from __future__ import annotations

import json
import math
import struct
import warnings
import zlib
from pathlib import Path

import pytest

from aftershock.signals.detect.events import SignalEvent
from aftershock.signals.detect.logs import wire
from aftershock.signals.detect.logs.binary import tensorboard_rows, wandb_rows
from aftershock.signals.detect.logs.rows import Problems
from aftershock.signals.detect.watch import detect_file


def _loss(step: int) -> float:
    return {120: 4.0, 121: 9.0}.get(step, 2.2 + 0.01 * ((step * 7919) % 13 - 6) / 6)


def _ignore(sentence: str) -> None:
    raise AssertionError(sentence)


@pytest.fixture
def tensorboard_folder(tmp_path: Path) -> Path:
    pytest.importorskip("tensorboard")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.utils.tensorboard.writer import SummaryWriter

        with SummaryWriter(str(tmp_path / "tb")) as writer:
            writer.add_text("note", "not a number", 0)
            for step in range(200):
                writer.add_scalar("loss/train", _loss(step), step * 10)
                writer.add_scalar("grad_norm", 0.5, step * 10, new_style=True)
    return tmp_path / "tb"


def test_tensorboard_as_its_own_reader_has_it(tensorboard_folder: Path) -> None:
    """equivalence: names, steps and float32 values, for both ways to write a scalar."""
    (path,) = tensorboard_folder.iterdir()
    rows = list(tensorboard_rows([path], None, Problems("x", _ignore)))
    assert [row.step for row in rows] == list(range(0, 2000, 10))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

        theirs: dict[str, list[float]] = {}
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tensor.float_val:
                    theirs.setdefault(value.tag, []).append(value.tensor.float_val[0])
    assert {name: [row.values[name] for row in rows] for name in rows[0].values} == {
        name: theirs[name] for name in ("loss/train", "grad_norm")
    }


def test_events_of_a_tensorboard_folder_and_file(tensorboard_folder: Path) -> None:
    (path,) = tensorboard_folder.iterdir()
    for where in (tensorboard_folder, path):
        found = detect_file(where)
        assert found.events == [SignalEvent("spike", "loss/train", 1200, 1210, 1210)]
        assert found.warnings == []


def test_a_torn_and_a_damaged_tensorboard_file(tensorboard_folder: Path) -> None:
    (path,) = tensorboard_folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    assert detect_file(path).events[0].peak == 1210
    path.write_bytes(whole + b"\xff" * 64)
    found = detect_file(path)
    assert found.events[0].peak == 1210
    assert "is damaged" in found.warnings[0]


def _field(number: int, payload: bytes | int) -> bytes:
    if isinstance(payload, int):
        return _varint(number << 3) + _varint(payload)
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


def _varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def _wandb_bytes(records: list[bytes]) -> bytes:
    """LevelDB's log format, written independently of the reader: fragments that never cross a block of 32 KiB."""
    out = bytearray(b":W&B" + struct.pack("<HB", 0xBEE1, 0))
    for record in records:
        first = True
        while True:
            room = 32_768 - len(out) % 32_768
            if room < 7:
                out += bytes(room)
                continue
            piece, record = record[: room - 7], record[room - 7 :]
            kind = (1 if first else 4) if not record else (2 if first else 3)
            crc = zlib.crc32(bytes([kind]) + piece)
            out += struct.pack("<IHB", crc, len(piece), kind) + piece
            first = False
            if not record:
                break
    return bytes(out)


def _history(step: int, values: dict[str, object]) -> bytes:
    items = b""
    for name, value in {**values, "_step": step, "_runtime": 1.5}.items():
        head, *inner = name.split(".")
        keys = b"".join(_field(2, part.encode()) for part in (head, *inner)) if inner else _field(1, head.encode())
        items += _field(1, keys + _field(16, json.dumps(value).encode()))
    return _field(1, step + 1) + _field(2, items + _field(2, _field(1, step)))


@pytest.fixture
def wandb_file(tmp_path: Path) -> Path:
    other = _field(1, 0) + _field(17, b"config" * 20_000)  # a record of another kind, over several blocks
    records = [other]
    for step in range(200):
        values: dict[str, object] = {"loss": _loss(step), "grad.norm": 0.5, "image": {"path": "x"}}
        records.append(_history(step, values | ({"aux": float("nan")} if step == 50 else {"aux": 1.0})))
    path = tmp_path / "run-abc.wandb"
    path.write_bytes(_wandb_bytes(records))
    return path


def test_wandb_rows(wandb_file: Path) -> None:
    rows = list(wandb_rows(wandb_file, None, Problems("x", _ignore)))
    assert [row.step for row in rows] == list(range(200))
    assert rows[121].values == {"loss": 9.0, "grad.norm": 0.5, "aux": 1.0}
    assert math.isnan(rows[50].values["aux"])


def test_events_of_a_wandb_file_and_folder(wandb_file: Path) -> None:
    for where in (wandb_file, wandb_file.parent):
        assert detect_file(where).events == [
            SignalEvent("nonfinite", "aux", 50, 50, 50),
            SignalEvent("spike", "loss", 120, 121, 121),
        ]


def test_a_wandb_file_cut_anywhere_is_read_up_to_there(wandb_file: Path) -> None:
    whole = wandb_file.read_bytes()
    for size in (len(whole) - 1, len(whole) - 40, 140_000):
        wandb_file.write_bytes(whole[:size])
        assert 0 < len(list(wandb_rows(wandb_file, None, Problems("x", _ignore)))) < 200


def test_containers_do_not_care_how_bytes_arrive(wandb_file: Path) -> None:
    """equivalence: in one piece, and in pieces of 1, 5 and 1,000 bytes."""
    data = wandb_file.read_bytes()
    whole = list(wire.leveldb_records([data]))
    assert len(whole) == 201
    tf = b"".join(struct.pack("<QI", len(r), 0) + r + bytes(4) for r in whole[1:20])
    for size in (1, 5, 1000):
        cut = data[-3000:] if size == 1 else data
        pieces = [cut[i : i + size] for i in range(0, len(cut), size)]
        if size > 1:
            assert list(wire.leveldb_records(pieces)) == whole
        assert list(wire.tfrecords([tf[i : i + size] for i in range(0, len(tf), size)])) == whole[1:20]


@pytest.mark.parametrize("data", [b"\x0a\x05ab", b"\x80" * 11, b"\x0b", b"\x09abc"])
def test_a_broken_message_is_damage(data: bytes) -> None:
    with pytest.raises(wire.Damaged):
        list(wire.fields(data))


def test_a_real_offline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """equivalence: written by wandb itself, where it is installed."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = wandb.init(project="p", dir=str(tmp_path))
        for step in range(200):
            run.log({"loss": _loss(step)})
        run.finish()
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert detect_file(path).events == [SignalEvent("spike", "loss", 120, 121, 121)]
