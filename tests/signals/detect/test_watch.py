"""planted: events in logs of every kind, and what is wrong with logs."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import aftershock
from aftershock.signals.detect.events import SignalEvent
from aftershock.signals.detect.logs.rows import Follow
from aftershock.signals.detect.watch import Detection, detect_file
from aftershock.store import RunWriter


def _loss(step: int) -> float:
    """Quiet noise with a spike of three steps, 120 to 122, worst at 121."""
    return {120: 4.0, 121: 9.0, 122: 5.0}.get(step, 2.2 + random.Random(step).gauss(0, 0.02))


SPIKE = SignalEvent("spike", "loss", 120, 121, 122)


def _csv(path: Path, rows: list[str], header: str = "step,loss") -> Path:
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def _plain(path: Path, n: int = 200) -> Path:
    return _csv(path, [f"{i},{_loss(i)}" for i in range(n)])


def _found(path: Path, **more: str) -> Detection:
    return detect_file(path, **more)  # pyright: ignore[reportArgumentType]


def test_csv(tmp_path: Path) -> None:
    found = _found(_plain(tmp_path / "log.csv"))
    assert found.events == [SPIKE]
    assert found.warnings == []
    assert (found.signals, found.num_rows) == (["loss"], 200)


@pytest.mark.parametrize("mark", [";", "\t"])
def test_other_separators_line_ends_and_a_byte_order_mark(tmp_path: Path, mark: str) -> None:
    path = tmp_path / "log.csv"
    text = "\r\n".join([f"Step{mark}loss{mark}lr", *[f"{i}{mark}{_loss(i)}{mark}0.1" for i in range(200)]])
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    found = _found(path)
    assert (found.events, found.signals, found.num_rows) == ([SPIKE], ["loss"], 200)


def test_several_signals_name_the_kind_of_trouble(tmp_path: Path) -> None:
    rows = [f"{i},{_loss(i)},{0.3 + 0.001 * (i % 7)},{(9 if i == 119 else 0.1) + 0.001 * (i % 5)}" for i in range(200)]
    found = _found(_csv(tmp_path / "log.csv", rows, "step,loss,grad_norm,update_norm"))
    assert found.events == [SignalEvent("spike", "update_norm", 119, 119, 119), SPIKE]
    assert [i.cause for i in found.incidents] == ["rate_or_state_fault"]


def test_jsonl_flat_and_ours(tmp_path: Path) -> None:
    flat = tmp_path / "log.jsonl"
    flat.write_text("".join(json.dumps({"step": i, "loss": _loss(i), "note": None}) + "\n" for i in range(200)))
    assert _found(flat).events == [SPIKE]
    ours = tmp_path / "scalars.jsonl"
    ours.write_text("".join(json.dumps({"step": i, "values": {"loss": _loss(i)}}) + "\n" for i in range(200)))
    assert _found(ours).events == [SPIKE]
    mixed = tmp_path / "mixed.jsonl"  # training and evaluation on lines of their own
    lines = [
        json.dumps({"step": i, "loss": _loss(i)}) + "\n" + json.dumps({"step": i, "eval_loss": 2.0}) for i in range(200)
    ]
    mixed.write_text("\n".join(lines) + "\n")
    assert (_found(mixed).events, _found(mixed).warnings) == ([SPIKE], [])


def test_run_folder_with_a_rewound_segment(tmp_path: Path) -> None:
    """Rows of a later segment replace the earlier ones: the spike of the abandoned branch is not there."""
    with RunWriter.open(tmp_path / "run", config={"lr": 0.1}) as run:
        for i in range(150):
            run.scalars(i, {"loss/train/ce": _loss(i), "optim/all/lr": 0.1})
    with RunWriter.open(tmp_path / "run", config={"lr": 0.1}) as run:
        for i in range(110, 200):
            run.scalars(i, {"loss/train/ce": 2.2 if i != 170 else float("nan")})
    found = _found(tmp_path / "run")
    assert found.events == [SignalEvent("nonfinite", "loss/train/ce", 170, 170, 170)]
    assert found.signals == ["loss/train/ce"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "empty"),
        ("\n\n", "empty"),
        ("step,loss\n", "no rows"),
        ("1,2.0\n2,2.1\n", "not column names"),
        ("step\n1\n", "no column besides 'step'"),
        ("[1, 2]\n", "one JSON object a line"),
        ("{\n", "no line is a JSON object"),
        ("step,lr\n1,0.1\n", "no column with numbers to watch"),
    ],
)
def test_files_without_a_log_get_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "log.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=sentence) as raised:
        _found(path)
    assert "log.csv" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_paths_that_are_no_log(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        _found(tmp_path / "nothing.csv")
    with pytest.raises(ValueError, match="no run folder, no TensorBoard"):
        _found(tmp_path)
    (tmp_path / "x.bin").write_bytes(b"\0\1\2" * 100)
    with pytest.raises(ValueError, match="binary file"):
        _found(tmp_path / "x.bin")
    (tmp_path / "x.wandb").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="not a W&B run"):
        _found(tmp_path / "x.wandb")


def test_a_signal_or_rule_that_is_not_there(tmp_path: Path) -> None:
    path = _plain(tmp_path / "log.csv")
    with pytest.raises(ValueError, match="no signal 'los'; did you mean 'loss'"):
        detect_file(path, signals=("los",))
    with pytest.raises(ValueError, match="no detector 'robst'; did you mean 'robust'"):
        detect_file(path, rule="robst")


def test_steps_that_come_again_are_a_rewound_run(tmp_path: Path) -> None:
    steps = [*range(100), *range(80, 200)]
    rows = [f"{s},{_loss(s)}" for s in steps]
    found = _found(_csv(tmp_path / "log.csv", rows))
    assert found.events == [SPIKE]
    (warning,) = found.warnings
    assert "line 102: step 80 comes after 99; read as a rewound run" in warning


def test_repeated_steps_are_said_once_and_counted(tmp_path: Path) -> None:
    rows = [f"{i // 2},{2.2 + 0.001 * (i % 7)}" for i in range(400)]
    found = _found(_csv(tmp_path / "log.csv", rows))
    assert found.events == []
    assert len(found.warnings) == 2
    assert "line 3: step 0 comes again" in found.warnings[0]
    assert "200 times in all" in found.warnings[1]


def test_a_spike_is_seen_right_after_a_rewind(tmp_path: Path) -> None:
    rows = [f"{s},{2.2 + 0.001 * (s % 7)}" for s in range(200)] + ["150,2.2", "151,9.0", "152,2.2"]
    assert _found(_csv(tmp_path / "log.csv", rows)).events == [SignalEvent("spike", "loss", 151, 151, 151)]


def test_cells_that_are_no_numbers(tmp_path: Path) -> None:
    rows = [f"{i},{_loss(i)},{'warm' if i < 50 else 'full'},,nan" for i in range(200)]
    rows[10] = "10,oops,warm,,nan"
    rows[11] = "eleven,2.2,warm,,nan"
    rows[12] = "12,2.2"
    rows[13] = "13,2.2,warm,,nan,7"
    found = _found(_csv(tmp_path / "log.csv", rows, "step,loss,phase,empty,grad_norm"))
    assert found.events == [SPIKE]
    text = "\n".join(found.warnings)
    for sentence in (
        "line 12: loss is 'oops', not a number",
        "line 2: phase is 'warm', not a number",
        "no number in phase: 198 times in all",
        "line 13: the step is 'eleven', not a number; the row is left out",
        "line 14: 2 cells under 5 columns",
        "column empty has no number in any row",
        "grad_norm is not finite in all of 198 rows; left out",
    ):
        assert sentence in text


def test_a_nan_in_a_column_is_an_event(tmp_path: Path) -> None:
    rows = [f"{i},{'nan' if 50 <= i < 53 else _loss(i)},{'inf' if i < 3 else 0.5}" for i in range(200)]
    found = _found(_csv(tmp_path / "log.csv", rows, "step,loss,grad_norm"))
    assert found.events == [
        SignalEvent("nonfinite", "grad_norm", 0, 0, 2),
        SignalEvent("nonfinite", "loss", 50, 50, 52),
        SPIKE,
    ]


def test_no_step_and_no_loss_column_are_said(tmp_path: Path) -> None:
    found = _found(_csv(tmp_path / "log.csv", [f"{_loss(i)}" for i in range(200)], "grad_norm"))
    # A norm is judged by factors: only the top of this spike, three times the usual, is one.
    assert found.events == [SPIKE._replace(signal="grad_norm", onset=121, end=121)]
    assert "rows are counted from 0" in found.warnings[0]
    assert "no loss column" in found.warnings[1]


def test_a_damaged_line_and_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    lines = [json.dumps({"step": i, "loss": _loss(i)}) for i in range(200)]
    lines[7] = "{broken"
    path.write_text("\n".join(lines) + '\n{"step": 200, "lo')
    found = _found(path)
    assert found.events == [SPIKE]
    assert "line 8 is not a JSON object" in found.warnings[0]


def test_a_quote_that_never_ends(tmp_path: Path) -> None:
    path = _plain(tmp_path / "log.csv")
    path.write_text(path.read_text() + '200,"' + "x" * 200_000)
    found = _found(path)
    assert found.events == [SPIKE]
    assert "read up to there" in found.warnings[0]


def test_another_tools_rule(tmp_path: Path) -> None:
    path = _csv(tmp_path / "log.csv", [f"{i},{_loss(i)},{_loss(i)}" for i in range(200)], "step,loss,grad_norm")
    found = _found(path, rule="olmo-skip")
    assert found.signals == ["loss", "grad_norm"]
    assert SignalEvent("spike", "loss", 120, 121, 121) in found.events
    assert _found(path, rule="zclip").signals == ["grad_norm"]


MEASURE = """
import json, resource, sys
from aftershock.signals.detect import detect_file
with open(sys.argv[1]) as file:
    short = [next(file) for _ in range(2000)]
open(sys.argv[1] + ".short.csv", "w").writelines(short)
detect_file(sys.argv[1] + ".short.csv")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = detect_file(sys.argv[1])
print(json.dumps([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, found.num_rows, found.events]))
"""


def test_memory_stays_bounded(tmp_path: Path) -> None:
    """300,000 rows, a file of 4.5 MB, in a process of its own: after 2,000 rows its peak grows by less than 4 MB, which
    is a few read buffers. Keeping the rows would take 50 MB."""
    path = tmp_path / "long.csv"
    rng = random.Random(0)
    with path.open("w") as file:
        file.write("step,loss\n")
        for start in range(0, 300_000, 1000):
            file.writelines(
                f"{i},{9.0 if i == 250_000 else rng.gauss(2.2, 0.02):.6f}\n" for i in range(start, start + 1000)
            )
    env = os.environ | {"PYTHONPATH": str(Path(aftershock.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", MEASURE, path], capture_output=True, text=True, check=True, env=env)
    grown_kb, rows, events = json.loads(done.stdout)
    assert rows == 300_000
    assert events == [["spike", "loss", 250_000, 250_000, 250_000]]
    assert grown_kb < 4_000


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_follow_a_growing_file(tmp_path: Path, kind: str) -> None:
    """The writer stops within a line and goes on; the event is told while the file still grows."""
    path = tmp_path / f"log.{kind}"
    lines = [
        f"{i},{_loss(i)}\n" if kind == "csv" else json.dumps({"step": i, "loss": _loss(i)}) + "\n" for i in range(300)
    ]
    head = "step,loss\n" if kind == "csv" else ""
    path.write_text(head + "".join(lines[:100]))
    told: list[SignalEvent] = []
    early: list[int] = []

    def write() -> None:
        with path.open("a") as file:
            for piece in ("".join(lines[100:121])[:-5], "".join(lines[100:121])[-5:], "".join(lines[121:200])):
                file.write(piece)
                file.flush()
                time.sleep(0.1)
            early.append(len(told))
            file.write("".join(lines[200:]))

    writer = threading.Thread(target=write)
    writer.start()
    found = detect_file(path, follow=Follow(poll_s=0.01, idle_s=0.6), on_event=told.append)
    writer.join()
    assert found.num_rows == 300
    assert found.events == told == [SPIKE]
    assert early == [1]


def test_follow_a_file_that_is_started_anew(tmp_path: Path) -> None:
    path = _plain(tmp_path / "log.csv", 150)

    def restart() -> None:
        time.sleep(0.15)
        _plain(path, 100)

    writer = threading.Thread(target=restart)
    writer.start()
    found = detect_file(path, follow=Follow(poll_s=0.01, idle_s=0.5))
    writer.join()
    assert found.events == [SPIKE]
    assert found.num_rows == 250
    assert any("cut short" in warning for warning in found.warnings)


def test_follow_ends_with_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupt)
    assert detect_file(_plain(tmp_path / "log.csv"), follow=Follow()).events == [SPIKE]
