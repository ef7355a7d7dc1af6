"""Jobs: `aftershock run FOLDER...` trains the folders' runs, in fleets of the size asked for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from aftershock.config import dump_yaml
from aftershock.lab.job import run_folders
from aftershock.lab.recipe import DecoderConfig, LanguageData, OptimConfig, RunConfig
from aftershock.store.reader import RunReader

BASE = RunConfig(
    data=LanguageData(context=16),
    model=DecoderConfig(width=8, depth=1, heads=1),
    optim=OptimConfig(warmup_steps=1),
    steps=5,
    batch_size=2,
    measure_every=2,
    eval_sequences=4,
)


def _folders(tmp_path: Path, configs: list[RunConfig]) -> list[Path]:
    folders = [tmp_path / f"run{i}" for i in range(len(configs))]
    for folder, config in zip(folders, configs, strict=True):
        folder.mkdir()
        (folder / "config.yaml").write_text(dump_yaml(config))
    return folders


def test_equivalence_of_fleet_sizes(tmp_path: Path) -> None:
    """Five runs as fleets of 2, 2 and 1 end where one fleet of 5 ends; float32 sums differ in order, hence 1e-4."""
    configs = [dataclasses.replace(BASE, seed=i, data_seed=i) for i in range(5)]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    together = run_folders(_folders(tmp_path / "a", configs))
    folders = _folders(tmp_path / "b", configs)
    apart = run_folders(folders, fleet_size=2)
    assert [s["fleet_size"] for s in apart] == [2, 2, 2, 2, 1]
    for one, other in zip(together, apart, strict=True):
        assert one["final_loss"] == pytest.approx(other["final_loss"], abs=1e-4)
    reader = RunReader(folders[-1])
    assert reader.status == "finished"
    assert "data" in reader.env
    assert reader.scalars("loss/train/ce").steps.tolist() == [0, 1, 2, 3, 4]
    assert reader.stats("attn/blocks.0/max_logit")["attn/blocks.0/max_logit"].steps.tolist() == [0, 2, 4]


def test_a_folder_without_config_and_a_mixed_fleet_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        run_folders([tmp_path])
    mixed = [BASE, dataclasses.replace(BASE, batch_size=3)]
    with pytest.raises(ValueError, match="differ in batch_size"):
        run_folders(_folders(tmp_path, mixed))


def test_a_sink_and_a_mirror_follow_the_run(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    [folder] = _folders(tmp_path, [BASE])
    run_folders([folder], sinks=[f"tensorboard:{tmp_path / 'tb'}"], mirror=f"file://{tmp_path / 'mirror'}")
    assert list((tmp_path / "tb").rglob("events.out.tfevents.*"))
    copy = RunReader(tmp_path / "mirror" / folder.name)
    assert copy.summary == RunReader(folder).summary
