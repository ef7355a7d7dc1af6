"""The command line: each command does what its help says, and a mistake gets one sentence and exit status 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from aftershock import cli

TINY = [
    *("--set", "model.width=8", "--set", "model.depth=1", "--set", "model.heads=1", "--set", "data.context=16"),
    *("--set", "steps=4", "--set", "optim.warmup_steps=1", "--set", "batch_size=2", "--set", "eval_sequences=4"),
]


def _cli(*argv: str) -> int:
    return cli.main(argv)


def test_sweep_then_report_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "study")
    grid = ["--sizes", "8x1", "--arms", "baseline", "no_qk_norm", "--lrs", "1e-3", "1e-2"]
    assert _cli("sweep", "--out", out, *grid, *TINY) == 0
    text = capsys.readouterr().out
    assert "4 runs trained, 0 kept" in text
    assert "no_qk_norm" in text
    assert (tmp_path / "study/report/report.html").exists()
    assert _cli("sweep", "--from", f"{out}/sweep.yaml", "--out", out) == 0
    assert "0 runs trained, 4 kept" in capsys.readouterr().out
    assert _cli("report", out, "--out", str(tmp_path / "page")) == 0
    numbers = json.loads((tmp_path / "page/report.json").read_text())
    assert len(numbers["runs"]) == 4
    kinds = {path.suffix for path in (tmp_path / "page/figures").iterdir()}
    assert kinds == {".png", ".svg"}


def test_dry_run_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _cli("sweep", "--out", str(tmp_path / "study"), "--sizes", "2.4M", "--dry-run") == 0
    assert len(capsys.readouterr().out.strip().splitlines()) == 7
    assert not (tmp_path / "study").exists()


def test_a_model_that_is_set_is_the_one_that_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The usual sizes step back: the second task with its own model, from flags alone."""
    task = ["--set", "data.kind=modular", "--set", "model.kind=mlp", "--lrs", "1e-2"]
    assert _cli("sweep", "--out", str(tmp_path / "study"), *task, "--dry-run") == 0
    [line] = capsys.readouterr().out.strip().splitlines()
    assert "mlp256" in line


def test_sensitivity_of_a_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "losses.csv"
    path.write_text("group,lr,loss\na,1e-3,3.0\na,1e-2,2.0\na,1e-1,nan\n")
    assert _cli("sensitivity", str(path), "--l0", "5", "--json") == 0
    [row] = json.loads(capsys.readouterr().out)
    assert row == {"group": "a", "lr_sensitivity": pytest.approx(4 / 3), "best_lr": 0.01, "best_loss": 2.0}
    assert _cli("sensitivity", str(path), "--l0", "5") == 0
    assert "1.3333" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["sweep", "--set", "model.widht=3"], "did you mean 'model.width'"),
        (["sweep", "--set", "steps"], "path=value"),
        (["sweep", "--lrs", "-1"], "optim.lr must be above 0"),
        (["sweep", "--sizes", "30x2x4"], "does not divide model.width=30"),
        (["sweep", "--arms", "no_qknorm"], "did you mean 'no_qk_norm'"),
        (["sweep", "--from", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["sweep", "--processes", "-2"], "at least 1"),
        (["sweep", "--set", "data.source=nowhere"], "nowhere"),
        (["sweep", "--set", "data.source=/bin/sh"], "is not UTF-8 text"),
        (["report", "nowhere"], "no study"),
        (["run", "nowhere"], "no such file"),
        (["sensitivity", "nowhere.csv", "--l0", "3"], "no such file"),
        (["claims", "--run", "P99"], "P99"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argv: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _cli(*argv) == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert error.startswith("aftershock: ")
    assert "\n" not in error
    assert not list(tmp_path.rglob("done.json")), "nothing may be trained"


def test_unknown_flags_and_commands_suggest_the_nearest() -> None:
    for argv, words in ((["sweep", "--sises", "3"], "--sizes"), (["swep"], "sweep")):
        done = subprocess.run([sys.executable, "-m", "aftershock", *argv], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert words in done.stdout + done.stderr


FLAGS = {
    "demo": {"--out", "--processes"},
    "sweep": {
        *("--out", "--from", "--name", "--sizes", "--arms", "--lrs", "--seeds", "--set", "--processes"),
        *("--sinks", "--mirror", "--dry-run", "--report"),
    },
    "run": {"--fleet-size", "--device", "--sinks", "--mirror", "--lifeline"},
    "report": {"--out", "--figures"},
    "sensitivity": {"--l0", "--json"},
    "detect": {"--rule", "--signals", "--json", "--follow"},
    "claims": {"--run", "--scores", "--out", "--processes", "--json"},
    "replay": {
        *("--workload", "--cells", "--minutes", "--parts", "--processes", "--seed", "--snapshot", "--anyway"),
        *("--json", "--out", "--step"),
    },
    "forecast": {
        *(
            "--to",
            "--arm",
            "--lr",
            "--early",
            "--at",
            "--backtest",
            "--fit-seeds",
            "--live",
            "--every",
            "--out",
            "--json",
        ),
    },
    "plan": {"--to", "--budget", "--arm", "--json"},
    "fit": {"--cutoff", "--at", "--task", "--json"},
    "bench": {"--out", "--rerun", "--specimens", "--policies", "--seeds", "--processes", "--json"},
}


@pytest.mark.parametrize("command", FLAGS)
def test_the_flags_are_these_and_no_more(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A frozen list: a recipe belongs in a file or in Python; a new flag needs a reason in the change log."""
    with pytest.raises(SystemExit):
        _cli(command, "--help")
    import re

    text = capsys.readouterr().out
    found = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text))
    usage_only = {"--help", *(f"--no-{flag[2:]}" for flag in found)}
    in_prose = {"--set"} if command != "sweep" else set()
    assert found - usage_only - in_prose == FLAGS[command]
    assert set(cli.COMMANDS) == set(FLAGS)
