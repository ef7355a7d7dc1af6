"""replaying: which folders are runs of the lab, what is recorded there, and what is refused, in one sentence each."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from aftershock.config import dump_yaml, override, run_id
from aftershock.lab.job import run_folders
from aftershock.lab.recipe import DecoderConfig, LanguageData, MlpConfig, ModularData, OptimConfig, RunConfig
from aftershock.lab.replaying import find_run, recorded_losses
from aftershock.store.reader import RunReader
from aftershock.store.study import RunRef, write_manifest

SMALL = RunConfig(
    data=ModularData(modulus=7),
    model=MlpConfig(embed=16, hidden=16),
    optim=OptimConfig(warmup_steps=2),
    steps=24,
    batch_size=8,
    measure_every=0,
    snapshot_every=8,
)


def trained(folder: Path, config: RunConfig = SMALL) -> Path:
    """As `aftershock run FOLDER`."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_yaml(config))
    run_folders([folder])
    return folder


def test_a_run_is_found_and_built_at_its_snapshots(tmp_path: Path) -> None:
    """contract: losses of every step; fresh workloads at the newest snapshot that is early enough, or the start."""
    run = find_run(trained(tmp_path / "a"))
    assert run is not None
    assert (run.config, run.steps, run.notes) == (SMALL, 24, ())
    assert sorted(run.losses) == list(range(24))
    # the writer keeps the latest two of the snapshots at 8, 16 and 24
    for asked, stands in ((15, 0), (16, 16), (23, 16), (24, 24)):
        workload, step = run.build(asked)
        assert step == stands
        if step < 24:
            assert workload.backward(step).item() == run.losses[step]


def test_what_is_no_run_of_the_lab(tmp_path: Path) -> None:
    """contract: an empty folder, none at all, and somebody's run with a guard in it are not the lab's."""
    assert find_run(tmp_path) is None
    assert find_run(tmp_path / "nowhere") is None
    (tmp_path / "config.yaml").write_text("lr: 1\n")
    (tmp_path / "guard" / "incidents").mkdir(parents=True)
    assert find_run(tmp_path) is None


def test_a_run_that_broke_has_a_loss_that_is_nan(tmp_path: Path) -> None:
    """planted: the first update overflows float32, and the step after it is not finite."""
    broken = override(SMALL, {"optim.lr": 1e25, "optim.warmup_steps": 0})
    losses = recorded_losses(RunReader(trained(tmp_path / "a", broken)))
    assert math.isfinite(losses[0])
    assert not math.isfinite(losses[max(losses)])
    last = override(broken, {"steps": 1})  # only the evaluation at the end sees it
    assert list(map(math.isfinite, recorded_losses(RunReader(trained(tmp_path / "b", last))).values())) == [True, False]


def test_a_study_of_several_names_those_with_a_spike(tmp_path: Path) -> None:
    """planted: one calm run, one that breaks, one that is missing; a study of one run is that run."""
    broken = override(SMALL, {"optim.lr": 1e25, "optim.warmup_steps": 0})
    for name, config in (("calm", SMALL), ("broken", broken)):
        trained(tmp_path / "runs" / name, config)
    refs = [RunRef(run_id=name, size="mlp16", arm="baseline", lr=0.1, seed=0) for name in ("calm", "broken", "missing")]
    write_manifest(tmp_path, name="s", title="", runs=refs)
    with pytest.raises(ValueError, match="is a study of 3 runs, give the folder of one; with a spike is 1: ") as caught:
        find_run(tmp_path)
    assert f"{tmp_path}/runs/broken (mlp16 baseline lr 0.1 seed 0, step 1)" in str(caught.value)
    assert "calm" not in str(caught.value)
    write_manifest(tmp_path, name="s", title="", runs=[refs[0], refs[2]])
    with pytest.raises(ValueError, match="none of them has a spike"):
        find_run(tmp_path)
    write_manifest(tmp_path, name="s", title="", runs=refs[:1])
    run = find_run(tmp_path)
    assert run is not None
    assert run.folder == tmp_path / "runs" / "calm"


def test_what_has_changed_is_named(tmp_path: Path) -> None:
    """planted: another version, an edited config, other data; --anyway goes on and keeps it as a note."""
    named = trained(tmp_path / run_id(SMALL))
    assert find_run(named) is not None

    def change(key: str, inner: str, value: Any) -> str:
        env = json.loads((named / "env.json").read_text())
        old, env[key][inner] = env[key][inner], value
        (named / "env.json").write_text(json.dumps(env))
        return old

    old = change("versions", "aftershock", "0.0.1")
    with pytest.raises(ValueError, match="trained by aftershock 0.0.1 and this is .*--anyway"):
        find_run(named)
    run = find_run(named, anyway=True)
    assert run is not None
    assert "0.0.1" in run.notes[0]
    change("versions", "aftershock", old)
    old = change("data", "train_equations", 5)
    with pytest.raises(ValueError, match=r"its data was .*\(train_equations 5\) and is"):
        find_run(named)
    change("data", "train_equations", old)
    change("versions", "torch", "0.1")
    run = find_run(named)  # only the last bits may differ: a note
    assert run is not None
    assert "trained with torch 0.1" in run.notes[0]
    (named / "config.yaml").write_text(dump_yaml(override(SMALL, {"seed": 3})))
    with pytest.raises(ValueError, match="config.yaml was edited"):
        find_run(named)


def test_what_cannot_be_trained_again(tmp_path: Path) -> None:
    """planted: no losses yet, a config that is not the lab's, a corpus that is gone."""
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_yaml(SMALL))
    with pytest.raises(ValueError, match="has no losses: train it first, with aftershock run"):
        find_run(folder)
    (folder / "config.yaml").write_text("specimen: slingshot\nseed: 0\n")
    with pytest.raises(ValueError, match="unknown key 'specimen'.*replayed as zoo:NAME"):
        find_run(folder)
    text = tmp_path / "text.txt"
    text.write_text("all work and no play " * 40)
    language = override(
        RunConfig(data=LanguageData(context=8), model=DecoderConfig(width=16, depth=0, heads=1), batch_size=2),
        {"data.source": str(text), "steps": 2, "optim.warmup_steps": 0},
    )
    trained(tmp_path / "b", language)
    text.unlink()
    with pytest.raises(ValueError, match="its data is not to be had: .*no such file or folder"):
        find_run(tmp_path / "b")
