"""The guard in a plain loop: the same bits while nothing happens, the right thing when something does; all told."""

from __future__ import annotations

import copy
import io
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from aftershock.guard.events import read_events
from aftershock.guard.guard import Guard
from aftershock.guard.policy import (
    CONTINUE,
    Action,
    Continue,
    Live,
    Policy,
    Rewind,
    ScaleLR,
    Seen,
    SkipStep,
    Stop,
)

Fault = Callable[[int, Tensor], Tensor]


class Net(nn.Module):
    """Dropout, so that random numbers matter."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Run(NamedTuple):
    """A small run and its parts."""

    model: Net
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    data: list[Tensor]
    target: Tensor


def _run(kind: str = "adamw", **settings: Any) -> Run:
    torch.manual_seed(0)
    model = Net()
    settings = {"lr": 1e-2} | settings
    make = torch.optim.AdamW if kind == "adamw" else torch.optim.SGD
    optimizer = make(model.parameters(), **settings)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.01 * step))
    return Run(model, optimizer, scheduler, [torch.randn(16, 8) for _ in range(200)], torch.randn(8, 1))


def _loss(run: Run, x: Tensor, scale: float = 1.0) -> Tensor:
    return scale * (run.model(x) - x @ run.target - 0.3).square().mean()


def _state(run: Run) -> list[Tensor]:
    tensors = [*run.model.parameters(), *(v for s in run.optimizer.state.values() for v in s.values())]
    return [t.detach().clone() for t in tensors if isinstance(t, Tensor)]


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _plain(run: Run, *, steps: int, faults: Mapping[int, float] | None = None, clip: float = 1.0) -> list[Tensor]:
    """The loop without a guard."""
    for i in range(steps):
        _loss(run, run.data[i % len(run.data)], (faults or {}).get(i, 1.0)).backward()
        nn.utils.clip_grad_norm_(run.model.parameters(), clip)
        run.optimizer.step()
        run.scheduler.step()
        run.optimizer.zero_grad()
    return _state(run)


def _guarded(run: Run, guard: Guard, *, faults: Mapping[int, float] | None = None, epochs: int = 1) -> list[Any]:
    found = []
    for x in guard.batches(run.data, epochs=epochs):
        loss = _loss(run, x, (faults or {}).get(guard.batch_id - 1, 1.0))
        loss.backward()
        found.append(guard.step(loss))
    return found


class Scripted(Policy):
    """Says what it is told to say, by batch id."""

    def __init__(self, before: Mapping[int, Action] | None = None, after: Mapping[int, Action] | None = None) -> None:
        self.before, self.after = dict(before or {}), dict(after or {})
        self.seen: list[Seen] = []
        self.updates: list[float] = []
        self.rewound: list[int] = []

    def before_step(self, seen: Seen, live: Live) -> Action:
        self.seen.append(seen)
        return self.before.pop(seen.batch_id, CONTINUE)

    def after_step(self, seen: Seen, live: Live) -> Action:
        self.updates.append(seen.update_norm)
        return self.after.pop(seen.batch_id, CONTINUE)

    def after_rewind(self, step: int) -> None:
        self.rewound.append(step)

    def state_dict(self) -> dict[str, Any]:
        return {"policy": "Scripted"}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        assert state == {"policy": "Scripted"}


class Meddler(Scripted):
    """Edits everything a policy may edit, without a word."""

    def before_step(self, seen: Seen, live: Live) -> Action:
        for p in live.params.values():
            if p.grad is not None:
                p.grad.mul_(0.5)
        next(iter(live.params.values())).grad = None
        live.optimizer.param_groups[0]["lr"] = 1.0
        return super().before_step(seen, live)

    def after_step(self, seen: Seen, live: Live) -> Action:
        with torch.no_grad():
            for p in live.params.values():
                p.zero_()
        live.optimizer.state.clear()
        return super().after_step(seen, live)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("clip", [0.1, 1e9])
def test_nothing_happens_and_no_bit_changes(kind: str, clip: float) -> None:
    """equivalence: the loop without a guard, over snapshots, clipping and a schedule."""
    plain = _plain(_run(kind), steps=200, clip=clip)
    run = _run(kind)
    guard = Guard(run.model, run.optimizer, scheduler=run.scheduler, clip_norm=clip, snapshot_every=20)
    outcomes = _guarded(run, guard)
    assert _same(_state(run), plain)
    assert all(one.taken for one in outcomes)
    assert guard.report() == "guard: 200 steps, nothing happened"
    assert guard.recorder.healthy == (140, 160, 180, 200)


@pytest.mark.parametrize("policy", [None, Meddler()])
def test_a_dry_run_changes_no_bit(policy: Policy | None) -> None:
    """equivalence: NaN, spikes and a policy that edits; what would have been done is told."""
    faults = {60: 1e4, 61: 1e4, 62: 1e4, 120: math.nan}
    plain = _plain(_run(), steps=200, faults=faults)
    run = _run()
    guard = Guard(run.model, run.optimizer, scheduler=run.scheduler, clip_norm=1.0, policy=policy, dry_run=True)
    _guarded(run, guard, faults=faults)
    assert all(torch.equal(a.isnan(), b.isnan()) for a, b in zip(_state(run), plain, strict=True))
    assert [a.nan_to_num().tolist() for a in _state(run)] == [b.nan_to_num().tolist() for b in plain]
    assert "nonfinite" in guard.report()
    if policy is None:
        assert "dry_run_rewind" in guard.report()
        assert "1 rewind" not in guard.report().replace("dry_run_rewind", "")


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_skipped_step_leaves_no_trace(kind: str) -> None:
    """oracle: the run that never saw the batch, but for its random numbers; counters and schedule included."""
    faults = {40: math.nan, 90: 1e4}
    run, settings = _run(kind), {"momentum": 0.9, "weight_decay": 0.1} if kind == "sgd" else {}
    run = _run(kind, **settings)
    run.model.eval()
    guard = Guard(run.model, run.optimizer, scheduler=run.scheduler)
    outcomes = _guarded(run, guard, faults=faults)
    assert [one.batch_id for one in outcomes if not one.taken] == [40, 90]
    assert guard.step_count == 198
    other = _run(kind, **settings)
    other.model.eval()
    del other.data[90], other.data[40]
    assert _same(_state(run), _plain(other, steps=198, clip=math.inf))
    assert run.scheduler.last_epoch == other.scheduler.last_epoch == 198


def test_in_place_rewind_goes_back_and_the_data_moves_on(tmp_path: Path) -> None:
    """oracle: train to 50, leave out what was skipped, train on; the list is written where a person finds it."""
    run = _run()
    run.model.eval()
    action = Rewind(50, (70, 71), "told to")
    guard = Guard(run.model, run.optimizer, scheduler=run.scheduler, policy=Scripted({70: action}), folder=tmp_path)
    outcomes = _guarded(run, guard)
    assert [one.batch_id for one in outcomes] == list(range(200))
    assert outcomes[70].action == action
    assert guard.step_count == 179
    other = _run()
    other.model.eval()
    other.data[50:] = other.data[71:]
    assert _same(_state(run), _plain(other, steps=179, clip=math.inf))
    assert "start: 70" in (tmp_path / "skip.yaml").read_text()
    assert [event.kind for event in read_events(tmp_path)] == ["attached", "rewind"]


@pytest.mark.parametrize("late", [False, True])
def test_restart_takes_data_and_random_numbers_back(late: bool) -> None:
    """oracle: after going back, the run is the one that left those batches out from the beginning, dropout and all."""
    run = _run()
    action = Rewind(50, (60, 70), "told to")
    script = Scripted({} if late else {75: action}, {75: action} if late else {})
    guard = Guard(run.model, run.optimizer, scheduler=run.scheduler, policy=script, mode="restart")
    outcomes = _guarded(run, guard)
    ids = [one.batch_id for one in outcomes]
    assert ids == [*range(76), *range(50, 60), *range(70, 200)]
    other = _run()
    del other.data[60:70]
    assert _same(_state(run), _plain(other, steps=190, clip=math.inf))
    assert script.rewound == [50]


@pytest.mark.parametrize("reset", ["none", "first", "both"])
def test_a_rewind_resets_and_slows_down(reset: Any) -> None:
    """contract: moments of the first step after it, and rates for as long as told, never seen by the schedule."""
    run = _run()
    action = Rewind(0, (20, 21), "told to", lr_factor=0.5, lr_steps=2, rewarm=1, reset=reset)
    script = Scripted({20: action})
    guard = Guard(run.model, run.optimizer, scheduler=run.scheduler, policy=script, snapshot_every=10)
    script.before[20] = action._replace(to_step=10)
    _guarded(run._replace(data=run.data[:26]), guard)
    base = [1e-2 / (1 + 0.01 * step) for step in (10, 11, 12, 13)]
    assert [seen.lr for seen in script.seen[21:25]] == pytest.approx(
        [0.5 * base[0], 0.5 * base[1], 0.75 * base[2], base[3]]
    )
    state = next(iter(run.optimizer.state.values()))
    assert float(state["step"]) == (5 if reset == "both" else 15)
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 / 1.15)


def test_scaled_rates_train_as_such() -> None:
    """oracle: a loop that halves its rates by hand for those steps."""
    run = _run("sgd")
    run.model.eval()
    guard = Guard(run.model, run.optimizer, policy=Scripted({5: ScaleLR(0.5, 3, 0, "told to")}))
    _guarded(run._replace(data=run.data[:12]), guard)
    other = _run("sgd")
    other.model.eval()
    for i, x in enumerate(other.data[:12]):
        other.optimizer.param_groups[0]["lr"] = 1e-2 * (0.5 if 5 <= i < 8 else 1.0)
        _loss(other, x).backward()
        other.optimizer.step()
        other.optimizer.zero_grad()
    assert _same(_state(run), _state(other))


def test_stop_ends_the_loop_at_the_last_healthy_state() -> None:
    """contract: the data ends, the state is that of the snapshot, another step is refused."""
    run = _run()
    guard = Guard(run.model, run.optimizer, scheduler=run.scheduler, policy=Scripted({70: Stop("enough")}))
    outcomes = _guarded(run, guard)
    assert len(outcomes) == 71
    assert guard.step_count == run.scheduler.last_epoch == 50
    assert guard.stopped == Stop("enough")
    assert "stopped: enough" in guard.report()
    loss = _loss(run, run.data[0])
    loss.backward()
    with pytest.raises(ValueError, match="has stopped this run: enough"):
        guard.step(loss)


def test_state_in_the_middle_goes_on_alike() -> None:
    """round trip: guard, model and random numbers, just before trouble; the same decisions and bits."""
    faults = {120: 1e4, 121: 1e4, 122: 1e4, 150: math.nan}

    def whole(cut: int | None) -> tuple[list[Any], list[Tensor]]:
        run = _run()
        guard = Guard(run.model, run.optimizer, scheduler=run.scheduler, snapshot_every=10)
        found = []
        for x in guard.batches(run.data):
            loss = _loss(run, x, faults.get(guard.batch_id - 1, 1.0))
            loss.backward()
            found.append(guard.step(loss))
            if guard.batch_id == cut:
                break
        if cut is None:
            return found, _state(run)
        saved = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict(), run.scheduler.state_dict()))
        words, state = torch.get_rng_state(), copy.deepcopy(guard.state_dict())
        run = _run()
        run.model.load_state_dict(saved[0])
        run.optimizer.load_state_dict(saved[1])
        run.scheduler.load_state_dict(saved[2])
        guard = Guard(run.model, run.optimizer, scheduler=run.scheduler, snapshot_every=10)
        guard.load_state_dict(state)
        torch.set_rng_state(words)
        found += _guarded(run, guard, faults=faults)
        return found, _state(run)

    straight, resumed = whole(None), whole(110)
    key = [(o.batch_id, o.taken, type(o.action)) for o in straight[0]]
    assert [(o.batch_id, o.taken, type(o.action)) for o in resumed[0]] == key
    assert _same(straight[1], resumed[1])
    assert [o.batch_id for o in straight[0] if isinstance(o.action, Rewind)] == [122]


def test_the_guards_state_is_plain() -> None:
    """round trip: through a file that torch loads with weights_only."""
    run = _run()
    guard = Guard(run.model, run.optimizer)
    _guarded(run, guard, faults={120: 1e4})
    file = io.BytesIO()
    torch.save(guard.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["step"] == guard.step_count == 199


def test_accumulation_is_one_step() -> None:
    """equivalence: four micro-batches against a loop that accumulates; a bad one takes the whole step with it."""
    run, script = _run(), Scripted({8: Rewind(0, (4, 9), "told to")})
    run.model.eval()
    guard = Guard(run.model, run.optimizer, scheduler=run.scheduler, policy=script, accumulate=4, clip_norm=1.0)
    kinds = []
    for x in guard.batches(run.data[:24]):
        loss = _loss(run, x) / 4
        loss.backward()
        kinds.append(guard.step(loss).action)
    assert [kind is None for kind in kinds] == [True, True, True, False] * 6
    assert [seen.batch_id for seen in script.seen] == [0, 4, 8, 12, 16, 20]
    assert [(one.start, one.stop) for one in guard.skips.ranges] == [(4, 12)]
    other = _run()
    other.model.eval()
    for i in range(3):
        for x in other.data[12 + 4 * i : 16 + 4 * i]:
            (_loss(other, x) / 4).backward()
        nn.utils.clip_grad_norm_(other.model.parameters(), 1.0)
        other.optimizer.step()
        other.scheduler.step()
        other.optimizer.zero_grad()
    assert _same(_state(run), _state(other))


def test_without_batches_the_steps_are_counted() -> None:
    """contract: a loop that fetches its own data; skip and in-place rewind work."""
    run = _run()
    guard = Guard(run.model, run.optimizer, snapshot_every=10)
    for i, x in enumerate(run.data[:100]):
        loss = _loss(run, x, 1e4 if 60 <= i < 63 else 1.0)
        loss.backward()
        outcome = guard.step(loss)
        assert outcome.batch_id == i
    assert guard.step_count == 50 + 100 - 63
    assert guard.recorder.healthy[-1] == 80


def test_an_ema_goes_back_too() -> None:
    """contract."""
    run = _run()
    ema = torch.optim.swa_utils.AveragedModel(run.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    guard = Guard(run.model, run.optimizer, ema=ema, policy=Scripted({7: Rewind(0, (7, 8), "told to")}))
    start = [p.detach().clone() for p in ema.parameters()]
    for x in guard.batches(run.data[:8]):
        loss = _loss(run, x)
        loss.backward()
        if guard.step(loss).taken:
            ema.update_parameters(run.model)
    assert _same([p.detach() for p in ema.parameters()], start)


def test_what_happened_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """contract: every skip, rewind and NaN is an event: file, tracker, console; no line per step."""
    told: list[Mapping[str, Any]] = []
    run = _run()
    with Guard(run.model, run.optimizer, folder=tmp_path, mirror=told.append) as guard:
        _guarded(run, guard, faults={60: math.nan, 120: 1e4, 121: 1e4, 122: 1e4})
    events = read_events(tmp_path)
    kinds = [event.kind for event in events]
    assert [kind for kind in kinds if kind != "alarm"] == ["attached", "nonfinite", "skip", "skip", "skip", "rewind"]
    assert [one["kind"] for one in told] == kinds
    assert math.isnan(events[1].data["loss"])
    assert events[2].data["verdicts"] == {"loss": "nonfinite", "grad_norm": "nonfinite"}
    lines = [record.getMessage() for record in caplog.records if record.name == "aftershock.guard"]
    assert len(lines) == len(events)  # the calm "attached" is not shown, the report is
    assert lines[-1].startswith("guard: ")
    assert len(list((tmp_path / "incidents").iterdir())) == 2
    assert json.loads((tmp_path / "events.jsonl").read_text().splitlines()[0])["kind"] == "attached"


def test_skip_and_policy_words_are_events(tmp_path: Path) -> None:
    """contract: what a policy says it changed, and a step it skips."""
    run = _run()
    script = Scripted({3: Continue("clipped"), 5: SkipStep("told to")})
    guard = Guard(run.model, run.optimizer, policy=script, folder=tmp_path)
    _guarded(run._replace(data=run.data[:8]), guard)
    found = [(event.kind, event.batch_id, event.data.get("reason")) for event in read_events(tmp_path)][1:]
    assert found == [("policy", 3, "clipped"), ("skip", 5, "told to")]
