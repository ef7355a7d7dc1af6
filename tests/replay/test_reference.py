"""docs/replay.md: its tables are the code's, and its example runs from the guard's incident to the verdict."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aftershock import cli
from aftershock.replay import reference
from aftershock.replay.signatures import QUESTIONS, SIGNATURES

PAGE = (Path(__file__).parents[2] / "docs" / "replay.md").read_text(encoding="utf-8")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of its own to work in; nothing of it stays importable."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = set(sys.modules)
    yield tmp_path
    for name in {"my_run"} & (set(sys.modules) - known):
        del sys.modules[name]


@pytest.mark.parametrize(
    "table",
    [
        reference.causes_markdown,
        reference.cells_markdown,
        reference.ways_markdown,
        reference.matrix_markdown,
        reference.struck_markdown,
    ],
)
def test_the_tables_are_the_codes(table: Callable[[], str]) -> None:
    """equivalence: a new signature without new documents fails here."""
    assert table() in PAGE


def test_the_matrix_is_whole() -> None:
    """contract: a row a question, a column a way, each with its own name."""
    lines = reference.matrix_markdown().splitlines()
    assert len(lines) == 2 + len(QUESTIONS)
    assert {line.count("|") for line in lines} == {3 + len(SIGNATURES)}
    assert len(reference.columns()) == len(SIGNATURES)


def test_the_example_runs_as_printed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """contract: guard, incident, command, verdict: three bad batches are named, and --json prints nothing else."""
    [code] = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    Path("my_run.py").write_text(code)
    runpy.run_path("my_run.py", run_name="__main__")
    [command] = re.findall(r"^aftershock (replay runs/a .*)$", PAGE, re.MULTILINE)
    capsys.readouterr()
    few = ["--cells", "skip", "lr*0.5", "clip*2", "sham:ulp#1", "sham:skip#1", "--parts", "--processes", "1"]
    assert cli.main([*command.split(), *few, "--json"]) == 0
    text = capsys.readouterr()
    found = json.loads(text.out)
    assert found["verdict"]["cause"] == "C7"
    assert found["remedies"][0]["cell"] == "skip"
    assert found["places"] is None
    assert "Incident 190-skip of runs/a, the only one." in text.err
    assert "cells: 5/5" in text.err
    assert "</html>" in (here / "out/replay/replay.html").read_text(encoding="ascii")


def test_commands_and_flags_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """contract: every flag that the page names is the command's, or of the sweep that makes a run to replay."""
    for command in ("replay", "sweep"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
    usage = capsys.readouterr().out
    flags = set(re.findall(r"`?(--[a-z]+)", PAGE)) - {"--rerun"}
    assert flags
    assert [flag for flag in flags if flag not in usage] == []
