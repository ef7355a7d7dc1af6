"""`aftershock replay`: from what a user types to the verdict, and one sentence where that cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aftershock import cli
from aftershock.config import dump_yaml, override
from aftershock.lab.recipe import MlpConfig, ModularData, OptimConfig, RunConfig
from aftershock.replay.command import Chosen, Replay
from aftershock.replay.explain import Explanation
from aftershock.replay.subject import Subject


def _no_zoo(name: str, seed: int) -> Chosen:
    raise AssertionError("the zoo was not asked for")


def _page(explanation: Explanation, folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "page.txt").write_text(explanation.words)
    return folder / "page.txt"


def test_a_specimen_is_trained_and_explained(
    subject: Subject, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """contract: the zoo is asked with name and seed; verdict, shams and page's path are printed, progress beside it."""
    asked: list[tuple[str, int]] = []

    def zoo(name: str, seed: int) -> Chosen:
        asked.append((name, seed))
        return Chosen(subject, None, "a sentence on the choice")

    command = Replay(
        "zoo:some", cells=("skip", "lr*0.5", "sham:ulp#1"), parts=("places",), seed=4, processes=1, out=tmp_path / "out"
    )
    assert command.run(_page, zoo) == 0
    text = capsys.readouterr()
    assert asked == [("some", 4)]
    assert (tmp_path / "out/page.txt").read_text().splitlines()[0] in " ".join(text.out.split())
    assert "Shams: 1 of 1 still spike" in text.out
    assert text.out.endswith(f"page: {tmp_path / 'out/page.txt'}\n")
    told = text.err.splitlines()
    assert told[:2] == ["training some with seed 4 until it spikes", "a sentence on the choice"]
    assert told[2:] == [*(f"controls: {i}/3" for i in (1, 2, 3)), *(f"cells: {i}/3" for i in (1, 2, 3)), "places"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nowhere"], "nowhere: no such folder"),
        (["."], "holds no incident"),
        (["zoo:slingshott"], "did you mean 'slingshot'"),
        (["zoo:cosine"], "cosine is a healthy specimen"),
        (["zoo:slingshot", "--workload", "a.py:b"], "brings its own workload"),
        (["zoo:slingshot", "--anyway"], "brings its own workload"),
        (["zoo:slingshot", "--step", "5"], "brings its own workload"),
        ([".", "--step", "5"], "--step is of a run of the lab's"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argv: list[str], words: str
) -> None:
    """planted."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["replay", *argv]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("aftershock: ")
    assert words in error
    assert not (tmp_path / "out").exists()


def test_an_unknown_cell_is_a_mistake_before_any_replay(subject: Subject, tmp_path: Path) -> None:
    """planted: with the nearest name."""
    command = Replay("zoo:some", cells=("skipp",), out=tmp_path / "out")
    with pytest.raises(ValueError, match="no cell 'skipp'; did you mean 'skip'"):
        command.run(_page, lambda name, seed: Chosen(subject, None, ""))


def test_a_missing_workload_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """planted: an incident alone is not enough; the sentence says what the function returns, and where one is shown."""
    (tmp_path / "incident.json").write_text("{}")
    with pytest.raises(ValueError, match=r"--workload FILE.py:function is missing: .*Workload.*--help") as caught:
        Replay(str(tmp_path)).run(_page, _no_zoo)
    assert "\n" not in str(caught.value)


def _trained(folder: Path, **changes: Any) -> Path:
    """A net on modular arithmetic whose rate rises until it is far too high, as `aftershock run` trains it."""
    config = RunConfig(
        data=ModularData(modulus=7),
        model=MlpConfig(embed=16, hidden=16),
        optim=OptimConfig(lr=2 / 3, warmup_steps=200),
        steps=200,
        batch_size=64,
        measure_every=0,
    )
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_yaml(override(config, changes)))
    assert cli.main(["run", str(folder)]) == 0
    return folder


def test_a_run_of_the_lab_needs_no_workload(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """planted: a rate that gets too high, from the run's folder to the verdict: every recorded loss comes out again,
    unchanged replays have its bits, and a tenth of the rate removes the spike."""
    folder = _trained(tmp_path / "run")
    few = ["--cells", "lr*0.1", "sham:ulp#1", "--parts", "--processes", "1", "--json"]
    capsys.readouterr()
    assert cli.main(["replay", str(folder), *few, "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr()
    assert f"{folder}: a spike from step 164 to the end" in text.err
    assert "recorded losses came out again, bit for bit" in text.err
    found = json.loads(text.out)
    assert found["controls"]["kind"] == "deterministic"
    spikes = {cell["name"]: cell["response"]["present"] for cell in found["cells"]}
    assert spikes["sham:ulp#1"]
    assert not spikes["lr*0.1"]


@pytest.mark.parametrize(
    ("changes", "argv", "words"),
    [
        ({"optim.lr": 0.01}, [], "no spike in its 200 losses"),
        ({"optim.lr": 0.01}, ["--step", "200"], "whose losses are of steps 0 to 199"),
        ({"optim.lr": 1.0, "optim.warmup_steps": 100, "steps": 120}, [], "rises at step 31, but no higher"),
        ({"optim.lr": 0.01}, ["--snapshot", "."], "holds no incident"),
    ],
    ids=["calm", "too late", "too early", "another snapshot"],
)
def test_a_run_of_the_lab_that_cannot_be_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], argv: list[str], words: str
) -> None:
    """planted: one sentence, status 2, and nothing written."""
    folder = _trained(tmp_path / "run", **changes)
    assert cli.main(["replay", str(folder), *argv, "--out", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_the_help_shows_a_workload(capsys: pytest.CaptureFixture[str]) -> None:
    """contract: six lines that can be copied."""
    with pytest.raises(SystemExit):
        cli.main(["replay", "--help"])
    text = capsys.readouterr().out
    assert "return Workload(model=model, optimizer=optimizer, batch=lambda i: data[i], loss=loss)" in text
    assert "aftershock replay zoo:slingshot" in text


def test_the_zoo_by_its_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """planted: a specimen with garbage labels, end to end; its known cause is the verdict's."""
    few = ["--cells", "skip", "lr*0.5", "sham:skip#1", "sham:ulp#1", "--parts", "--processes", "1", "--json"]
    assert cli.main(["replay", "zoo:garbage_labels", *few, "--out", str(tmp_path)]) == 0
    text = capsys.readouterr()
    assert json.loads(text.out)["verdict"]["ranked"][0]["cause"] == "C7"
    assert "Known cause: C7." in text.err
    assert (tmp_path / "replay.html").exists()
