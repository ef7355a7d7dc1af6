"""contract: `aftershock detect`, as text and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tyro

from aftershock.signals.detect.command import Detect


@pytest.fixture
def log(tmp_path: Path) -> Path:
    rows = [f"{i * 5},{9.0 if i == 120 else 2.2 + 0.001 * (i % 7)},{0.3 + 0.001 * (i % 5)},x" for i in range(200)]
    path = tmp_path / "log.csv"
    path.write_text("\n".join(["step,loss,grad_norm,note", *rows]) + "\n")
    return path


def test_flags(log: Path) -> None:
    command = tyro.cli(Detect, args=[str(log), "--rule", "zclip", "--json", "--follow", "--signals", "a", "b"])
    assert command == Detect(file=log, rule="zclip", json=True, follow=True, signals=("a", "b"))


def test_json_is_a_list_of_events(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Detect(file=log, json=True).run() == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == [{"kind": "spike", "signal": "loss", "onset": 600, "peak": 600, "end": 600}]
    assert "note is 'x', not a number" in err


def test_text(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Detect(file=log).run() == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["kind", "signal", "onset", "peak", "end"]
    assert out.splitlines()[1].split() == ["spike", "loss", "600", "600", "600"]
    assert "1 event in 200 rows of loss, grad_norm" in out


def test_quiet_log_prints_an_empty_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log.csv"
    path.write_text("step,loss\n" + "".join(f"{i},2.2\n" for i in range(50)))
    Detect(file=path, json=True).run()
    assert json.loads(capsys.readouterr().out) == []
    Detect(file=path).run()
    assert capsys.readouterr().out == "0 events in 50 rows of loss\n"


def test_follow_prints_each_event_as_it_ends(
    log: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", interrupt)
    assert Detect(file=log, json=True, follow=True).run() == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["peak"] == 600
