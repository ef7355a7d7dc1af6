"""TensorBoard for real: what its own reader shows after a rewind."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from aftershock.store import RunWriter
from aftershock.store.sinks import sink_from_spec

pytest.importorskip("tensorboard", reason="needs tensorboard: pip install 'aftershock[tensorboard]'")
# protobuf's generated modules and tensorboard's own compat layer warn under some versions; not ours to fix
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_round_trip_with_a_rewind_by_reopening_and_in_place(tmp_path: Path) -> None:
    """Steps 0..5, reopened at 3..4, rewound in place to 2: TensorBoard hides every row that was replaced."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    spec = f"tensorboard:{tmp_path / 'board'}"
    with RunWriter.open(tmp_path / "r", config={"lr": 0.1}, sinks=[sink_from_spec(spec)]) as run:
        for step in range(6):
            run.scalars(step, {"loss/train/ce": float(step)})
    with RunWriter.open(tmp_path / "r", config={"lr": 0.1}, sinks=[sink_from_spec(spec)]) as run:
        for step in (3, 4):
            run.scalars(step, {"loss/train/ce": -float(step)})
        run.new_segment()
        run.event("rewind", 2, why={"norm": math.nan})
        run.scalars(2, {"loss/train/ce": math.inf})
        run.close("finished", {})
    board = EventAccumulator(str(tmp_path / "board" / "r"), size_guidance={"scalars": 0, "tensors": 0})
    board.Reload()
    shown = [(e.step, e.value) for e in board.Scalars("aftershock/loss/train/ce")]
    assert shown == [(0, 0.0), (1, 1.0), (2, math.inf)]
    assert [e.value for e in board.Scalars("aftershock/segment")] == [0.0, 0.0, 2.0]
    texts = {tag: board.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in board.Tags()["tensors"]}
    assert texts["aftershock/event/rewind/text_summary"] == '`{"why": {"norm": "nan"}}`'
    assert texts["aftershock/status/text_summary"] == "finished"
    assert "lr: 0.1" in texts["aftershock/file/config.yaml/text_summary"]
