"""What a user names on the command line is found, or one sentence says what is wrong with it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from aftershock.guard.incidentrecord import Incident, Point, to_record
from aftershock.replay.given import as_workload, find_incident, load_workload
from aftershock.workload import Workload

SOURCE = """
import torch
from beside import RATE
from aftershock.workload import Workload

def build():
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    return Workload(model=model, optimizer=optimizer, batch=int, loss=lambda model, batch: None)

ready = build()

def decode(ids):
    return "".join(map(chr, ids))

def nothing():
    return 3

def broken():
    return torch.zeros(2) @ torch.zeros(3)

def needy(size):
    return size
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with `given_run.py` and a module beside it; nothing of it stays importable."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "given_run.py").write_text(SOURCE)
    (tmp_path / "beside.py").write_text("RATE = 0.5\n")
    known = set(sys.modules)
    yield tmp_path
    for name in {"given_run", "given_run_workload", "given_late", "beside"} & (set(sys.modules) - known):
        del sys.modules[name]


def _incident(home: Path, number: int, *, snapshot: bool = True) -> Path:
    """A folder as a guard leaves it, as far as finding it needs."""
    folder = home / "incidents" / f"{number}-spike"
    (folder / "snapshot").mkdir(parents=True) if snapshot else folder.mkdir(parents=True)
    point = Point(number, number)
    incident = Incident(
        *(folder, number, "spike", "recovered", point, point, None, point, (), "unknown", ()),
        start=point if snapshot else None,
        surroundings={},
        fingerprint={},
    )
    (folder / "incident.json").write_text(json.dumps(to_record(incident)))
    return folder


# -------------------------------------------------------------------------------------------------------- incidents


def test_an_incident_by_itself_and_the_newest_of_several(tmp_path: Path) -> None:
    """contract: by its own folder, by the guard's, by the run's, by the one in between; the choice is said."""
    first = _incident(tmp_path / "guard", 3)
    assert find_incident(first) == (first, "")
    assert "the only one" in find_incident(tmp_path).words
    second = _incident(tmp_path / "guard", 8)
    _incident(tmp_path / "guard", 9, snapshot=False)
    for path in (tmp_path, tmp_path / "guard", tmp_path / "guard" / "incidents"):
        found = find_incident(path)
        assert found.folder == second
        assert found.words.endswith("the newest with a snapshot; there are 2 others besides.")
        assert "8-spike" in found.words


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nowhere", "no such folder"),
        ("empty", "holds no incident"),
        ("bare", r"none of the incidents in .*bare/incidents \(2\) has a snapshot"),
    ],
)
def test_where_there_is_none(tmp_path: Path, path: str, words: str) -> None:
    """contract: one sentence each."""
    (tmp_path / "empty").mkdir()
    for number in (1, 2):
        _incident(tmp_path / "bare", number, snapshot=False)
    with pytest.raises(ValueError, match=words):
        find_incident(tmp_path / path)


# -------------------------------------------------------------------------------------------------------- workloads


@pytest.mark.parametrize("target", ["given_run.py:build", "given_run:build", "given_run.py:ready"])
def test_a_workload_from_file_or_module(here: Path, target: str) -> None:
    """contract: what lies beside the file is importable, and `decode` comes along."""
    given = load_workload(target)
    assert given.workload.optimizer.param_groups[0]["lr"] == 0.5
    assert given.decode is not None
    assert given.decode([104, 105]) == "hi"


def test_a_file_of_a_taken_name_is_still_that_file(here: Path) -> None:
    """contract: a module of the same name stays what it is."""
    other = ModuleType("given_run")
    sys.modules["given_run"] = other
    assert isinstance(load_workload("given_run.py:build").workload, Workload)
    assert sys.modules.pop("given_run") is other


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("given_run.py", "takes FILE.py:function"),
        (":build", "takes FILE.py:function"),
        ("given_run.py:", "takes FILE.py:function"),
        ("gone.py:build", "gone.py: no such file"),
        ("given_gone:build", "failed: ModuleNotFoundError: No module named 'given_gone'"),
        ("given_run.py:bild", "has no 'bild'; did you mean 'build'"),
        ("given_run.py:nothing", "returned an int; return an aftershock.workload.Workload"),
        ("given_run.py:broken", "failed at given_run.py line 20: RuntimeError"),
        ("given_run.py:needy", "missing 1 required positional argument: 'size'"),
        ("given_late.py:build", "failed at given_late.py line 2: ZeroDivisionError"),
    ],
)
def test_what_is_wrong_with_it_is_said(here: Path, target: str, words: str) -> None:
    """planted."""
    (here / "given_late.py").write_text("x = 1\ny = x / 0\n")
    with pytest.raises(ValueError, match="--workload") as caught:
        load_workload(target)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "given_late" not in sys.modules


def test_foreign_trainers_become_workloads(monkeypatch: pytest.MonkeyPatch, make: Callable[..., Workload]) -> None:
    """contract: each is handed to its adapter; stand-ins, since the adapters have tests of their own."""
    from aftershock.replay.adapters import hf, lightning

    class Trainer:
        def __init__(self, **settings: Any) -> None:
            self.settings = settings

    class Module:
        pass

    made, asked = make(), list[Any]()

    def from_trainer(trainer: Any) -> Workload:
        asked.append(trainer)
        return made

    def from_lightning(module: Any, data: Any, *, trainer: Any) -> Workload:
        asked.append((module, data, trainer))
        return made

    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(Trainer=Trainer))
    monkeypatch.setitem(sys.modules, "lightning.pytorch", SimpleNamespace(LightningModule=Module, Trainer=Trainer))
    monkeypatch.setattr(hf, "workload_from_trainer", from_trainer)
    monkeypatch.setattr(lightning, "workload_from_lightning", from_lightning)
    trainer, module = Trainer(), Module()
    assert as_workload(trainer, "x:y") is made
    assert as_workload((module, "loader"), "x:y") is made
    assert as_workload((module, "loader", trainer), "x:y") is made
    assert asked[0] is trainer
    assert asked[1][:2] == (module, "loader")
    assert asked[1][2].settings["logger"] is False
    assert asked[2] == (module, "loader", trainer)
    with pytest.raises(ValueError, match="returned 1 things"):
        as_workload((module,), "x:y")
    with pytest.raises(ValueError, match="returned a tuple"):
        as_workload((1, 2), "x:y")
