"""W&B: the calls we make, and offline for real what its log file holds after a rewind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def test_contract_calls(fake: Callable[[str], Any], story: Callable[[str], None]) -> None:
    wandb = fake("wandb")
    story("wandb:team/proj")
    first, second = wandb.named("init")
    assert first[2] == second[2]
    assert first[2] == {
        "entity": "team",
        "project": "proj",
        "id": "run-1",
        "name": "run-1",
        "config": {"optim": {"lr": 0.1}},
        "tags": ["arm:x"],
        "resume": "allow",
        "reinit": "create_new",
    }
    assert wandb.named("define_metric")[0][1:] == (("aftershock/*",), {"step_metric": "aftershock/step"})
    logs = [args[0] for _, args, _ in wandb.named("log")]
    assert all("aftershock/step" in log for log in logs), "rows without our step would be drawn over W&B's own"
    assert not any(kwargs for _, _, kwargs in wandb.named("log")), "W&B drops rows whose step goes back"
    assert logs[-1] == {
        "aftershock/step": 9.0,
        "aftershock/event/spike": 1.0,
        "aftershock/event/spike/size": 3.0,
        "aftershock/event/spike/why": "x",
    }
    assert [kwargs["exit_code"] for _, _, kwargs in wandb.named("finish")] == [1, 0]
    assert wandb.summary == {"aftershock/status": "finished"}
    assert [kwargs["name"] for _, _, kwargs in wandb.named("add_file")] == ["config.yaml", "events.jsonl"] * 2


def test_round_trip_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, story: Callable[[str], None]) -> None:
    pytest.importorskip("wandb", reason="needs wandb: pip install 'aftershock[wandb]'")
    for key, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(key, value)
    story("wandb:proj")
    rows = [row for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"), key=_age) for row in _history(path)]
    shown = [(r["aftershock/step"], r["aftershock/loss/train/ce"]) for r in rows if "aftershock/loss/train/ce" in r]
    assert repr(shown) == repr(
        [(5, 5), (6, 6), (7, 7), (8, float("nan")), (9, 9), (7, 7.5), (8, float("nan")), (9, 9.5)]
    )


def _age(path: Path) -> int:
    return path.stat().st_mtime_ns


def _history(path: Path) -> list[dict[str, Any]]:
    """W&B's log is LevelDB's: blocks of 32 KiB, records of crc32 (4), length (2), type (1), after 7 bytes of header."""
    from wandb.proto import wandb_internal_pb2  # type: ignore[import-not-found]

    data, at, joined, rows = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32_768 - at % 32_768 < 7:
            at += 32_768 - at % 32_768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        joined += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or last piece
            record = wandb_internal_pb2.Record()
            record.ParseFromString(joined)
            joined = b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows
