"""Subjects: recorded, read from a guard's incident, gone back to; and what is refused, with what can still be done."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aftershock.guard.guard import Guard
from aftershock.guard.incident import fingerprint, read_incidents
from aftershock.guard.incidentrecord import RECORD, SNAPSHOT
from aftershock.guard.policies.skip import Skip
from aftershock.guard.policy import CONTINUE, Action, Live, Policy, ScaleLR, Seen
from aftershock.replay.controls import run_controls
from aftershock.replay.recording import Spike, find_spikes, record
from aftershock.replay.run import CONTROL
from aftershock.replay.runner import run_cell
from aftershock.replay.subject import Subject, Window
from aftershock.workload import Workload

Build = Callable[..., Workload]


class TestSpikes:
    def test_one_spike_and_its_ends(self) -> None:
        """oracle."""
        assert find_spikes([1.0] * 60 + [1.4, 5.0, 2.0] + [1.0] * 60) == [Spike(60, 61, 63)]

    def test_two_spikes_and_a_slow_fall(self) -> None:
        """planted: among noise and a falling curve; the curve alone has none."""
        random = torch.Generator().manual_seed(0)
        noise = (0.02 * torch.randn(400, generator=random)).tolist()
        losses = [math.exp(-i / 300 + z) for i, z in enumerate(noise)]
        assert find_spikes(losses) == []
        for at in (150, 300):
            losses[at : at + 4] = [9.0, 20.0, 9.0, 4.0]
        assert find_spikes(losses) == [Spike(150, 151, 154), Spike(300, 301, 304)]

    def test_one_that_lasts_and_one_that_is_not_finite(self) -> None:
        """planted: `end` is then the number of losses; NaN is the peak wherever it is."""
        assert find_spikes([1.0] * 60 + [9.0] * 10) == [Spike(60, 60, 70)]
        assert find_spikes([1.0] * 60 + [9.0, math.nan, 50.0] + [1.0] * 30) == [Spike(60, 61, 63)]
        assert find_spikes([math.nan] * 3) == [Spike(0, 0, 3)]

    @pytest.mark.parametrize(
        ("height", "fall", "noise"), [(100.0, 3, 0.0), (1e3, 4, 0.0), (1e4, 2, 0.0), (1e3, 6, 0.02), (50.0, 8, 0.05)]
    )
    def test_the_way_down_is_no_further_spike(self, height: float, fall: int, noise: float) -> None:
        """planted: from a twentieth of its height on a spike is over, though far above the calm loss for long; and one
        that comes after its tail is another."""
        random = torch.Generator().manual_seed(0)
        losses = (noise * torch.randn(400, generator=random)).exp().tolist()
        for step in range(100, 400):
            losses[step] += height * math.exp((100 - step) / fall)
        (spike,) = find_spikes(losses)
        assert (spike.onset, spike.peak) == (100, 100)
        assert abs(spike.end - (100 + fall * math.log(20))) <= 2  # the noise moves it by a step
        losses[300:303] = [9.0, 20.0, 9.0]
        assert [found.onset for found in find_spikes(losses)] == [100, 300]


class TestRecord:
    def test_where_it_goes_back_to(self, subject: Subject) -> None:
        """contract: a margin before the onset, the earlier state two margins before that, far enough past the end."""
        window = subject.window
        assert (window.onset, window.end) == (150, 153)
        assert window.start == 100
        assert subject.earlier == 20
        assert max(subject.recorded) + 1 == subject.full
        assert set(subject.digests) == set(subject.recorded)
        assert subject.notes == ()
        assert subject.changes == ()

    @pytest.mark.parametrize("kind", [{}, {"accumulate": 3, "clip_norm": 0.5, "dropout": 0.2}], ids=["plain", "all"])
    def test_recording_changes_no_bit(self, make: Build, kind: dict[str, Any]) -> None:
        """oracle: the losses of a loop written out by hand."""
        subject = record(make(**kind), steps=170, tail=0)
        assert subject is not None
        workload = make(**kind)
        for step in range(160):
            assert workload.backward(step).item() == subject.recorded[step]
            if workload.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(workload.model.parameters(), workload.clip_norm)
            workload.optimizer.step()
            assert workload.scheduler is not None
            workload.scheduler.step()
            workload.optimizer.zero_grad()

    def test_the_earlier_state_leads_to_the_later_one(self, subject: Subject) -> None:
        """round trip: trained on from the earlier state, every loss up to the spike is the recorded one."""
        assert subject.earlier is not None
        found = run_cell(subject, CONTROL, at=subject.earlier, steps=140, stop_early=False)
        assert found.by_step == {s: subject.recorded[s] for s in range(20, 160)}

    def test_no_spike_no_subject(self, make: Build) -> None:
        """planted: the healthy run."""
        assert record(make(), steps=120) is None

    def test_a_label_of_ones_own(self, make: Build) -> None:
        """contract: the window is what the rule said, and `nth` picks."""
        seen = record(make(), steps=140, label=lambda losses: [(50, 51, 53), (90, 91, 99)][: len(losses) // 60], nth=1)
        assert seen is not None
        assert seen.window == Window(40, 90, 91, 99)

    def test_a_workload_that_stands_further_on(self, make: Build, subject: Subject) -> None:
        """equivalence: with the losses of its first 70 steps, which it has taken, the same window and losses come out;
        the snapshots are from after it."""
        workload = make()
        for step in range(70):
            workload.backward(step)
            workload.optimizer.step()
            assert workload.scheduler is not None
            workload.scheduler.step()
            workload.optimizer.zero_grad()
        seen = record(workload, steps=400, before=[subject.recorded[step] for step in range(70)])
        assert seen is not None
        assert seen.window == subject.window
        assert seen.recorded == subject.recorded
        assert sorted(seen.states) == [100]
        assert min(seen.rows) == 70

    def test_a_loss_that_stays_not_finite_ends_the_recording(self, make: Build) -> None:
        """planted: the weights become NaN at step 100; the snapshots are from before."""
        workload = make()

        def break_it(step: int) -> None:
            if step == 100:
                with torch.no_grad():
                    next(workload.model.parameters()).fill_(math.nan)

        seen = record(workload, steps=400, before_step=break_it)
        assert seen is not None
        assert (seen.window.onset, seen.window.start) == (100, 60)
        assert len(seen.recorded) < 200
        assert not math.isfinite(seen.recorded[101])

    @pytest.mark.parametrize("settings", [{"steps": 0}, {"steps": 5, "margin": 0}, {"steps": 5, "nth": -1}])
    def test_bad_settings(self, make: Build, settings: dict[str, Any]) -> None:
        """contract."""
        with pytest.raises(ValueError, match="give at least 1"):
            record(make(), **settings)


class TestSubject:
    def test_states_and_window_must_belong_together(self, make: Build, subject: Subject) -> None:
        """contract."""
        make_one: Any = lambda **changes: Subject(  # noqa: E731 - one call with one thing wrong at a time
            make(), **({"states": subject.states, "recorded": subject.recorded, "window": subject.window} | changes)
        )
        with pytest.raises(ValueError, match="no order"):
            make_one(window=Window(100, 90, 95, 99))
        with pytest.raises(ValueError, match="need states"):
            make_one(window=Window(101, 150, 150, 153))
        with pytest.raises(ValueError, match="nothing of it can be replayed"):
            make_one(stop=140)
        with pytest.raises(ValueError, match="no state of step 7"):
            subject.restore(7)

    def test_random_numbers_go_back(self, make: Build) -> None:
        """round trip: the next random number after each restore is the same."""
        subject = record(make(dropout=0.5), steps=260, tail=0)
        assert subject is not None
        drawn = []
        for _ in range(2):
            subject.restore()
            drawn.append(torch.rand(3))
            torch.manual_seed(99)
        assert torch.equal(*drawn)


# ---------------------------------------------------------------------------------------------- incidents of a guard


class Slow(Skip):
    """Halves the rate at a spike, and takes the step."""

    def before_step(self, seen: Seen, live: Live) -> Action:
        spiked = "loss" in seen.verdicts
        return ScaleLR(0.5, 30, 10, "spike") if spiked else CONTINUE


def guarded(
    workload: Workload,
    folder: Path,
    *,
    steps: int = 230,
    loader: bool = True,
    code: Any = None,
    policy: Policy | None = None,
) -> Path:
    """Train under a guard, by default one that skips spikes; the incident's folder."""
    guard = Guard(
        workload.model,
        workload.optimizer,
        scheduler=workload.scheduler,
        policy=policy or Skip(),
        clip_norm=workload.clip_norm,
        accumulate=workload.accumulate,
        folder=folder,
        snapshot_every=20,
        code=code,
        incident_state="all",
    )
    batches = [micro for i in range(steps) for micro in workload.micro_batches(i)]
    with guard:
        for batch in guard.batches(batches) if loader else batches:
            loss = workload.loss(workload.model, batch) / workload.accumulate
            loss.backward()
            guard.step(loss)
    (incident, *_) = read_incidents(folder)
    return incident.folder


@pytest.mark.parametrize("kind", [{}, {"accumulate": 2, "dropout": 0.2, "clip_norm": 1.0}], ids=["plain", "all"])
def test_an_incident_becomes_the_spike_that_the_guard_prevented(
    make: Build, subject: Subject, tmp_path: Path, kind: dict[str, Any]
) -> None:
    """equivalence: unguarded, with the recorded bits up to the alarm, and the spike's end found by the replay."""
    folder = guarded(make(**kind), tmp_path)
    found = Subject.from_incident(folder, make(**kind))
    free = record(make(**kind), steps=260)
    assert free is not None
    assert found.window[1:] == free.window[1:]
    assert found.stop is None
    again = run_cell(found, CONTROL, stop_early=False)
    assert all(loss == free.recorded.get(step, loss) for step, loss in again.by_step.items())
    controls = run_controls(found)
    assert (controls.kind, controls.came_back) == ("deterministic", 3)
    assert any("the guard stepped in" in note for note in found.notes)


def test_what_came_after_the_guard_stepped_in_is_no_record(make: Build, tmp_path: Path) -> None:
    """planted: the rate was halved from step 150 on; the subject's losses after it are those of the run by itself."""
    found = Subject.from_incident(guarded(make(), tmp_path, policy=Slow()), make())
    free = record(make(), steps=260)
    assert free is not None
    assert found.window[1:] == free.window[1:]
    assert all(loss == free.recorded[step] for step, loss in found.recorded.items() if step in free.recorded)
    assert run_controls(found).kind == "deterministic"


def test_kept_copies_stand_in_for_a_lost_loader(make: Build, tmp_path: Path) -> None:
    """round trip: the copies have the recorded bits, and nothing after them is promised."""
    folder = guarded(make(), tmp_path)

    def gone(index: int) -> Any:
        raise LookupError("the stream is over")

    workload = make()
    workload.batch = gone
    found = Subject.from_incident(folder, workload)
    assert found.stop == 151, "the guard kept batches up to its alarm at step 150"
    assert any("kept copies are replayed" in note and "the stream is over" in note for note in found.notes)
    again = run_cell(found, CONTROL)
    assert again.by_step == {s: v for s, v in found.recorded.items() if s >= found.window.start}


def test_another_loader_is_noticed(make: Build, tmp_path: Path) -> None:
    """planted: the workload gives shifted batches; the kept ones are replayed, and it is said."""
    folder = guarded(make(), tmp_path)
    workload = make()
    batch = workload.batch
    workload.batch = lambda index: batch(index + 1)
    found = Subject.from_incident(folder, workload)
    assert any("are not those recorded" in note for note in found.notes)
    assert run_controls(found).responses[0].present


def test_no_batches_at_all(make: Build, tmp_path: Path) -> None:
    """contract: neither copies nor a loader."""
    folder = guarded(make(), tmp_path, loader=False)
    workload = make()
    workload.batch = lambda index: [][index]
    with pytest.raises(ValueError, match=r"batch 140 of step 140 is not to be had.*keeps copies"):
        Subject.from_incident(folder, workload)
    assert run_controls(Subject.from_incident(folder, make())).kind == "deterministic"


def test_no_snapshot(make: Build, tmp_path: Path) -> None:
    """contract: says so, and takes another one of the same run."""
    folder = guarded(make(), tmp_path)
    shutil.move(folder / SNAPSHOT, tmp_path / "kept")
    with pytest.raises(ValueError, match="no snapshot to replay from.*snapshot="):
        Subject.from_incident(folder, make())
    (kept,) = (tmp_path / "kept").iterdir()
    assert Subject.from_incident(folder, make(), snapshot=kept).window.onset == 150


def test_changed_code_or_config_is_named(make: Build, tmp_path: Path) -> None:
    """planted: another clip and another rate; nothing where nothing has changed."""
    folder = guarded(make(), tmp_path, code=fingerprint(make(), config={"data": "v1"}))
    assert [n for n in Subject.from_incident(folder, make()).notes if "have changed" in n] == []
    other = make(clip_norm=0.5)
    with pytest.raises(ValueError, match=r"config.clip_norm: None recorded, 0.5 now.*anyway=True"):
        Subject.from_incident(folder, other)
    assert any("clip_norm" in note for note in Subject.from_incident(folder, other, anyway=True).notes)
    with pytest.raises(ValueError, match="config.data: v1 recorded, v2 now"):
        Subject.from_incident(folder, make(), fingerprint=fingerprint(make(), config={"data": "v2"}))


def test_another_model_is_refused(make: Build, tmp_path: Path) -> None:
    """contract."""
    folder = guarded(make(), tmp_path)
    workload = make()
    model = torch.nn.Linear(8, 1)
    other = Workload(
        model=model, optimizer=torch.optim.AdamW(model.parameters()), batch=workload.batch, loss=workload.loss
    )
    with pytest.raises(ValueError, match="does not fit this workload.*Build model, optimizer and scheduler"):
        Subject.from_incident(folder, other)


def test_another_number_of_threads_is_told(make: Build, tmp_path: Path) -> None:
    """planted: a record of 8 threads."""
    folder = guarded(make(), tmp_path)
    record_file = folder / RECORD
    body = json.loads(record_file.read_text())
    body["surroundings"]["threads"] = 8
    record_file.write_text(json.dumps(body))
    found = Subject.from_incident(folder, make())
    assert any("threads: 8 recorded, 1 now" in note for note in found.notes)
    assert found.threads == 8
