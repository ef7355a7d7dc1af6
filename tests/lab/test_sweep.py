"""Sweeps: the grid, resuming after any death, and what a user's mistake says."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aftershock.config import dump_yaml
from aftershock.lab.launch import Job, JobState, LocalLauncher
from aftershock.lab.recipe import DecoderConfig, LanguageData, OptimConfig, RunConfig
from aftershock.lab.sweep import SweepProgress, SweepSpec, expand, is_complete, load_spec, run_sweep
from aftershock.store.reader import RunReader
from aftershock.store.study import Study

BASE = RunConfig(
    data=LanguageData(context=16),
    model=DecoderConfig(width=8, depth=1, heads=1),
    optim=OptimConfig(warmup_steps=1),
    steps=6,
    batch_size=2,
    measure_every=3,
    eval_sequences=4,
)
SPEC = SweepSpec(name="t", base=BASE, sizes=("8x1", "16x1"), arms=("baseline", "no_qk_norm"), lrs=(1e-3, 1e-2))


class InlineLauncher:
    """Runs each job to its end inside `submit`, in a process of its own; fails those whose number is in `fail`."""

    max_parallel = 1

    def __init__(self, *, fail: tuple[int, ...] = ()) -> None:
        self.jobs: list[Job] = []
        self.fail = fail
        self.states: dict[str, JobState] = {}

    def submit(self, job: Job) -> str:
        handle = str(len(self.jobs))
        self.jobs.append(job)
        job.log.parent.mkdir(parents=True, exist_ok=True)
        if int(handle) in self.fail:
            job.log.write_text("planted: out of memory\n")
            self.states[handle] = "failed"
        else:
            done = subprocess.run(job.command, capture_output=True, check=False)
            job.log.write_bytes(done.stdout + done.stderr)
            self.states[handle] = "done" if done.returncode == 0 else "failed"
        return handle

    def poll(self, handle: str) -> JobState:
        return self.states[handle]

    def cancel(self, handle: str) -> None:
        raise AssertionError("nothing runs after submit")


def test_expand_is_the_whole_grid_in_order() -> None:
    planned = expand(SPEC)
    assert len(planned) == 8
    assert len({p.ref.run_id for p in planned}) == 8
    assert [p.ref.size for p in planned[:4]] == ["8x1"] * 4
    assert planned[2].config.model == dataclasses.replace(planned[0].config.model, qk_norm="off")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sizes": ("8by1",)}, "neither WIDTHxDEPTH"),
        ({"sizes": ("9x1",)}, "must be even"),
        ({"arms": ("no_qknorm",)}, "did you mean 'no_qk_norm'"),
        ({"lrs": (1e-2, 1e-6)}, "above the peak"),
        ({"lrs": (-1.0,)}, "must be above 0"),
    ],
)
def test_a_bad_setting_is_refused_before_anything_trains(
    tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    spec = dataclasses.replace(SPEC, **changes)
    with pytest.raises(ValueError, match=words):
        run_sweep(spec, tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_a_value_twice_or_none_is_refused() -> None:
    with pytest.raises(ValueError, match="lrs has a value twice"):
        dataclasses.replace(SPEC, lrs=(1e-2, 1e-2))
    with pytest.raises(ValueError, match="at least one of seeds"):
        dataclasses.replace(SPEC, seeds=())


def test_round_trip_of_the_spec_file(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(dump_yaml(SPEC))
    assert load_spec(path) == SPEC
    path.write_text("lrs: [1e-3]\nsezes: [8x1]\n")
    with pytest.raises(ValueError, match="unknown key 'sezes'; did you mean 'sizes'"):
        load_spec(path)


def test_run_then_again_keeps_everything(tmp_path: Path) -> None:
    seen: list[SweepProgress] = []
    first = run_sweep(SPEC, tmp_path, launcher=LocalLauncher(num_processes=2), on_progress=seen.append)
    assert (first.num_trained, first.num_kept, first.failures) == (8, 0, ())
    assert seen[-1].num_done == seen[-1].num_runs == 8
    rows = Study(tmp_path).rows()
    assert {row.status for row in rows} == {"finished"}
    written = {p: p.stat().st_mtime_ns for p in tmp_path.glob("runs/*/done.json")}
    again = run_sweep(SPEC, tmp_path)
    assert (again.num_trained, again.num_kept) == (0, 8)
    assert written == {p: p.stat().st_mtime_ns for p in tmp_path.glob("runs/*/done.json")}


def test_planted_failure_is_tried_again_and_then_reported(tmp_path: Path) -> None:
    once = InlineLauncher(fail=(0,))
    assert run_sweep(SPEC, tmp_path / "once", launcher=once).failures == ()
    twice = InlineLauncher(fail=(0, 1))
    result = run_sweep(SPEC, tmp_path / "twice", launcher=twice)
    assert len(result.failures) == 1
    assert "planted: out of memory" in result.failures[0]
    assert 0 < result.num_trained < 8
    rest = run_sweep(SPEC, tmp_path / "twice", launcher=InlineLauncher())
    assert rest.failures == ()
    assert rest.num_trained + result.num_trained == 8


def test_two_sweeps_of_one_folder_are_refused(tmp_path: Path) -> None:
    from aftershock.store.folder import FolderLock

    lock = FolderLock(tmp_path)
    try:
        with pytest.raises(ValueError, match="is being written by process"):
            run_sweep(SPEC, tmp_path)
    finally:
        lock.release()


def test_kill_9_of_the_whole_sweep_loses_and_repeats_nothing(tmp_path: Path) -> None:
    """Round trip: killed -9 with jobs running; the orphans end too; the second call trains what is missing, once."""
    base = dataclasses.replace(BASE, steps=150)
    spec = dataclasses.replace(SPEC, base=base, sizes=("8x1", "16x2"))
    path = tmp_path / "spec.yaml"
    path.write_text(dump_yaml(spec))
    study = tmp_path / "study"
    command = [
        sys.executable,
        "-m",
        "aftershock",
        "sweep",
        "--from",
        str(path),
        "--out",
        str(study),
        "--processes",
        "2",
    ]
    sweep = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    finished: list[Path] = []
    give_up = time.monotonic() + 120
    while not finished and time.monotonic() < give_up:
        finished = [p.parent for p in study.glob("runs/*/done.json")]
        time.sleep(0.05)
    os.kill(sweep.pid, signal.SIGKILL)
    sweep.wait()
    assert finished, "no run finished within two minutes"
    kept = {p: p.stat().st_mtime_ns for p in study.glob("runs/*/done.json")}
    assert len(kept) < 8, "the sweep was over before it was killed; make the runs longer"
    give_up = time.monotonic() + 30
    while any(RunReader(p.parent).status == "running" for p in study.glob("runs/*/config.yaml")):
        assert time.monotonic() < give_up, "a job outlived the sweep that started it"
        time.sleep(0.1)
    kept = {p: p.stat().st_mtime_ns for p in study.glob("runs/*/done.json")}
    result = run_sweep(spec, study)
    assert result.failures == ()
    assert (result.num_kept, result.num_trained) == (len(kept), 8 - len(kept))
    assert kept == {p: p.stat().st_mtime_ns for p in kept}
    for row in Study(study).rows():
        assert row.status == "finished"
        steps = RunReader(study / "runs" / row.ref.run_id).scalars("loss/train/ce").steps
        assert steps.tolist() == sorted(set(steps.tolist())), "a step is recorded twice"


def test_is_complete_needs_a_sealed_result(tmp_path: Path) -> None:
    assert not is_complete(tmp_path)
    for status, complete in (("finished", True), ("diverged", True), ("failed", False)):
        (tmp_path / "done.json").write_text(json.dumps({"status": status}))
        assert is_complete(tmp_path) is complete
    (tmp_path / "done.json").write_text('{"status": "fin')
    assert not is_complete(tmp_path)
