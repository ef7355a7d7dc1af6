"""Run folders as the corpus reads them, written by hand."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from aftershock.bench.corpus import LOSS, is_trained, read_trace, run_folder, train_corpus
from aftershock.bench.scoring import HORIZON, Target
from aftershock.lab.workers import worker_pool
from aftershock.lab.zoo.specimen import Kind, Specimen, Trial
from aftershock.store.writer import RunWriter

STEPS, ONSET = 300, 200


def _never(seed: int, *, faulty: bool = True) -> Trial:
    raise AssertionError("nothing is to be trained here")


def _specimen(kind: Kind = "spontaneous") -> Specimen:
    return Specimen(
        name="spiky",
        kind=kind,
        cause="none" if kind == "healthy" else "C1",
        about="A loss that rises once.",
        source="a test",
        steps=STEPS,
        build=_never,
        onset=ONSET if kind == "planted" else None,
    )


def _write(folder: Path, *, sealed: bool = True) -> Path:
    rng = random.Random(0)
    with RunWriter.open(folder, config={}, tags={}) as run:
        for step in range(STEPS):
            row = {LOSS: 2 + rng.gauss(0, 0.01), "grad/all/norm": 1 + rng.gauss(0, 0.1), "optim/all/lr": 1e-3}
            if ONSET <= step < ONSET + 5:
                row[LOSS] = 2.0 + (1.0, 2.0, 4.0, 2.0, 1.0)[step - ONSET]
            if step >= 4:
                row["curvature/all/directional"] = 0.5
            run.scalars(step, row)
        if sealed:
            run.close("finished", {})
    return folder


def test_a_run_folder_becomes_a_trace(tmp_path: Path) -> None:
    """planted: the spike where it was put, signals by the steps that have them, settings left out."""
    folder = _write(tmp_path / "spiky-3")
    trace = read_trace(folder, _specimen(), 3)
    assert list(trace.signals) == [LOSS, "grad/all/norm", "curvature/all/directional"]
    assert trace.signals["curvature/all/directional"].steps[0] == 4
    assert trace.signals[LOSS].values[ONSET + 2] == 6.0
    assert (trace.seed, trace.num_steps) == (3, STEPS)
    assert trace.targets == (Target(ONSET - HORIZON, ONSET, ONSET + 2, ONSET + 5),)
    assert read_trace(folder, _specimen("planted"), 3).targets[0].opens == ONSET


def test_a_healthy_run_has_nothing_to_warn_of(tmp_path: Path) -> None:
    """planted: whatever its loss does."""
    assert read_trace(_write(tmp_path / "a"), _specimen("healthy"), 0).targets == ()


def test_what_is_trained_stays(tmp_path: Path) -> None:
    """contract: a finished folder is not trained again, and one that was interrupted is not finished."""
    paths = [_write(run_folder(tmp_path, "spiky", seed)) for seed in (0, 1)]
    told: list[tuple[int, int]] = []
    found = train_corpus(tmp_path, ["spiky"], seeds=(0, 1), on_progress=lambda done, total: told.append((done, total)))
    assert (found, told) == (paths, [(2, 2)])
    assert not is_trained(tmp_path / "spiky-2")
    assert not is_trained(_write(tmp_path / "spiky-4", sealed=False))


def test_a_pool_needs_a_process() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        worker_pool(0)


def test_workers_have_one_thread() -> None:
    """contract."""
    with worker_pool(1) as pool:
        assert pool.submit(_threads).result() == "1"


def _threads() -> str:
    import os

    return os.environ["OMP_NUM_THREADS"]
