"""The escalation ladder, rung by rung, on rows of numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from aftershock.guard.policies.ladder import Ladder
from aftershock.guard.policy import CONTINUE, Action, Continue, Live, Rewind, ScaleLR, Seen, SkipStep, Stop
from aftershock.signals.detect.rule import Verdict

MODEL = nn.Linear(1, 1)
LIVE = Live(MODEL, torch.optim.SGD(MODEL.parameters()), dict(MODEL.named_parameters()))
HEALTHY = (0, 50, 100, 150)


def seen(step: int, *, batch: int | None = None, verdicts: Mapping[str, Verdict] | None = None, **values: Any) -> Seen:
    full = {"loss": 3.0, "grad_norm": 1.0, "update_norm": 0.1, "lr": 1e-3, "healthy": HEALTHY} | values
    return Seen(step=step, batch_id=step if batch is None else batch, verdicts=verdicts or {}, cause=None, **full)


def warm(ladder: Ladder, start: int = 150, stop: int = 200) -> Ladder:
    for step in range(start, stop):
        assert ladder.before_step(seen(step), LIVE) == CONTINUE
        assert ladder.after_step(seen(step), LIVE) == CONTINUE
    return ladder


SPIKE: dict[str, Verdict] = {"grad_norm": "spike"}
LOSS: dict[str, Verdict] = {"loss": "spike"}
UPDATE: dict[str, Verdict] = {"update_norm": "spike"}


def test_one_bad_batch_is_skipped_and_nothing_else() -> None:
    """planted: spike or NaN at one batch, the next one normal; as often as it likes."""
    ladder = warm(Ladder())
    for batch in range(200, 260, 2):
        kind: dict[str, Any] = {"verdicts": SPIKE, "grad_norm": 12.0} if batch % 4 else {"loss": math.nan}
        assert isinstance(ladder.before_step(seen(200, batch=batch, **kind), LIVE), SkipStep)
        assert ladder.before_step(seen(200, batch=batch + 1), LIVE) == CONTINUE


@pytest.mark.parametrize("kind", [{"loss": math.nan}, {"grad_norm": math.inf}, {"verdicts": {"loss": "nonfinite"}}])
def test_three_nonfinite_in_a_row_go_to_the_last_healthy(kind: dict) -> None:
    """planted: a broken state; the newest snapshot is taken although it lies within the margin."""
    ladder = warm(Ladder())
    healthy = (*HEALTHY, 195)
    actions = [ladder.before_step(seen(200, batch=200 + i, healthy=healthy, **kind), LIVE) for i in range(3)]
    assert [type(a) for a in actions] == [SkipStep, SkipStep, Rewind]
    assert isinstance(actions[2], Rewind)
    assert (actions[2].to_step, actions[2].skip, actions[2].lr_factor) == (195, (200, 203), 1.0)


def test_a_run_of_spikes_rewinds_before_its_first_lead() -> None:
    """planted: the update moved 5 steps ahead of the loss, so the snapshot at 195 is too late, by the margin of 10."""
    ladder = warm(Ladder())
    ladder.before_step(seen(200, verdicts=SPIKE, batch=200), LIVE)  # the lead, skipped
    for step in range(200, 205):
        assert ladder.before_step(seen(step, batch=step + 1), LIVE) == CONTINUE
    healthy = (*HEALTHY, 190, 191, 195)
    actions = [ladder.before_step(seen(205, batch=206 + i, verdicts=LOSS, healthy=healthy), LIVE) for i in range(3)]
    assert isinstance(actions[2], Rewind)
    assert (actions[2].to_step, actions[2].skip) == (190, (200, 209))


def test_an_old_alarm_is_no_lead() -> None:
    """planted: `patience` quiet batches end a run of alarms."""
    ladder = warm(Ladder(patience=4))
    ladder.before_step(seen(200, verdicts=SPIKE), LIVE)
    warm(ladder, 200, 205)
    action: Action = CONTINUE
    for i in range(3):
        action = ladder.before_step(seen(205, batch=206 + i, verdicts=LOSS), LIVE)
    assert isinstance(action, Rewind)
    assert action.skip == (206, 209)


@pytest.mark.parametrize("kind", ["spike", "shift"])
@pytest.mark.parametrize("lr", [1e-3, 2e-2])
def test_a_moved_update_with_a_quiet_gradient_rewinds_at_once_then_further(kind: Verdict, lr: float) -> None:
    """planted: updates grew 20-fold; if they do again, a rate that grew as much is held, and no other is touched."""
    ladder = warm(Ladder())
    moved: dict[str, Verdict] = {"update_norm": kind}
    row = {"verdicts": moved, "update_norm": 2.0, "lr": lr}
    action = ladder.after_step(seen(200, **row), LIVE)
    assert isinstance(action, Rewind)
    assert (action.to_step, action.lr_factor) == (150, 1.0)
    ladder.after_rewind(150)
    again = ladder.after_step(seen(200, batch=251, **row), LIVE)  # in the cool-down, but x10
    assert isinstance(again, Rewind)
    assert (again.to_step, again.lr_factor) == (100, 1.0)
    held = CONTINUE if lr == 1e-3 else ScaleLR(1 / 20, 1, 0, "")
    assert ladder.before_step(seen(101, batch=300, lr=lr), LIVE)._replace(reason="") == held


def test_an_update_that_follows_its_gradient_is_no_rate_fault() -> None:
    """planted: both moved."""
    ladder = warm(Ladder())
    both: dict[str, Verdict] = {"grad_norm": "shift", "update_norm": "spike"}
    assert ladder.before_step(seen(200, verdicts=both), LIVE) == CONTINUE
    assert ladder.after_step(seen(200, verdicts=both), LIVE) == CONTINUE


def test_second_failure_goes_further_and_slower_third_stops() -> None:
    """planted: a place that cannot be passed: never a loop."""
    ladder, batch = warm(Ladder()), 200
    found: list[Action] = []
    for attempt in range(3):
        for _ in range(3):
            found.append(ladder.before_step(seen(200 + attempt, batch=batch, loss=math.nan), LIVE))
            batch += 1
        ladder.after_rewind(found[-1].to_step if isinstance(found[-1], Rewind) else 0)
        warm(ladder, 160, 200)
    first, second, third = found[2], found[5], found[8]
    assert isinstance(first, Rewind)
    assert isinstance(second, Rewind)
    assert isinstance(third, Stop)
    assert (first.to_step, first.skip, first.lr_factor) == (150, (200, 203), 1.0)
    assert (second.to_step, second.skip, second.lr_factor, second.lr_steps) == (100, (203, 209), 0.5, 201)


def test_far_beyond_the_place_it_counts_anew() -> None:
    """contract: each failure lies more than `place` steps beyond the last."""
    ladder = warm(Ladder())
    action: Action = CONTINUE
    for step in (200, 301, 402, 503):
        for i in range(3):
            action = ladder.before_step(seen(step, batch=step + i, loss=math.nan), LIVE)
        assert isinstance(action, Rewind), step
        assert action.lr_factor == 1.0
        ladder.after_rewind(action.to_step)


def test_in_the_cool_down_only_extremes_act() -> None:
    """planted: spikes of x5 are let through until the cool-down ends, x10 and NaN are not."""
    ladder = warm(Ladder())
    ladder.after_rewind(150)
    assert ladder.before_step(seen(180, verdicts=SPIKE, grad_norm=5.0), LIVE) == CONTINUE
    assert ladder.after_step(seen(180, verdicts=UPDATE, update_norm=0.5), LIVE) == CONTINUE
    assert isinstance(ladder.before_step(seen(180, verdicts=SPIKE, grad_norm=10.0), LIVE), SkipStep)
    assert isinstance(ladder.before_step(seen(180, grad_norm=math.nan), LIVE), SkipStep)
    assert isinstance(ladder.after_step(seen(180, verdicts=UPDATE, update_norm=5.0), LIVE), Rewind)
    ladder.after_rewind(150)
    assert isinstance(ladder.before_step(seen(201, verdicts=SPIKE, grad_norm=12.0), LIVE), SkipStep)


def test_a_gradient_alone_acts_only_far_out() -> None:
    """planted: x5 with a quiet loss is taken, x12 is skipped; with the loss it is skipped at any size."""
    ladder = warm(Ladder())
    assert ladder.before_step(seen(200, verdicts=SPIKE, grad_norm=5.0), LIVE) == CONTINUE
    assert isinstance(ladder.before_step(seen(201, verdicts=SPIKE, grad_norm=12.0), LIVE), SkipStep)
    assert isinstance(ladder.before_step(seen(201, batch=202, verdicts=SPIKE | LOSS, grad_norm=2.0), LIVE), SkipStep)


def test_a_gradient_that_stays_high_with_a_calm_loss_is_taken() -> None:
    """planted: two probes, then taken and said once, no rewind; the loss joining it is damage at once."""
    ladder = warm(Ladder())
    rows = [ladder.before_step(seen(200, batch=200 + i, verdicts=SPIKE, grad_norm=12.0), LIVE) for i in range(6)]
    assert [type(row) for row in rows] == [SkipStep] * 2 + [Continue] * 4
    assert [bool(row.reason) for row in rows] == [True, True, True, False, False, False]
    assert isinstance(ladder.before_step(seen(204, verdicts=SPIKE | LOSS, grad_norm=12.0), LIVE), Rewind)


def test_a_small_jump_of_the_update_is_none() -> None:
    """planted: x1.3 over a very steady update is a spike to the detector and nothing to act on."""
    ladder = warm(Ladder())
    assert ladder.after_step(seen(200, verdicts=UPDATE, update_norm=0.13), LIVE) == CONTINUE


def fail(ladder: Ladder, step: int, batch: int, **values: Any) -> Action:
    """Three loud batches in a row at `step`."""
    action: Action = CONTINUE
    for i in range(3):
        action = ladder.before_step(seen(step, batch=batch + i, verdicts=LOSS, **values), LIVE)
    if isinstance(action, Rewind):
        ladder.after_rewind(action.to_step)
    return action


@pytest.mark.parametrize(
    ("settings", "end"),
    [
        ({}, Continue),
        ({"exhausted": "stop"}, Stop),
        ({"riding_factor": 0.5}, ScaleLR),
    ],
)
def test_a_place_that_is_only_loud_is_ridden_out(settings: dict[str, Any], end: type[Action]) -> None:
    """planted: the third failure of a finite state ends the run or the interventions, as told; a NaN acts still."""
    ladder = warm(Ladder(cooldown=0, per=500, **settings))
    found = [fail(ladder, 205 + attempt, 300 + 3 * attempt) for attempt in range(3)]
    assert [type(action) for action in found] == [Rewind, Rewind, end]
    assert [action.lr_factor for action in found if isinstance(action, Rewind)] == [1.0, 1.0]
    if end is Stop:
        return
    if isinstance(found[2], ScaleLR):
        assert found[2][:3] == (0.5, 500, 100)
    assert "this run spikes, riding it out" in found[2].reason
    assert all(ladder.before_step(seen(step, verdicts=LOSS, loss=9.0), LIVE) == CONTINUE for step in range(208, 700))
    assert isinstance(ladder.before_step(seen(300, loss=math.nan), LIVE), SkipStep)
    assert isinstance(ladder.before_step(seen(710, verdicts=LOSS, loss=9.0), LIVE), SkipStep)


def test_a_rate_that_jumps_a_third_time_is_ridden_out_at_what_it_was() -> None:
    """planted: x20 three times at one place: the cap did not hold it; on at a twentieth of it."""
    ladder = warm(Ladder(cooldown=0))
    row = {"verdicts": UPDATE, "update_norm": 2.0, "lr": 2e-2}
    found: list[Action] = []
    for failure in range(3):
        found.append(ladder.after_step(seen(200, batch=200 + failure, **row), LIVE))
        if isinstance(found[-1], Rewind):
            ladder.after_rewind(found[-1].to_step)
    assert [type(action) for action in found] == [Rewind, Rewind, ScaleLR]
    assert isinstance(found[2], ScaleLR)
    assert found[2].factor == pytest.approx(1 / 20)  # one division


def test_a_run_that_spikes_by_nature_is_left_alone() -> None:
    """planted: three places were rewound within a thousand steps; the fourth is not, nor any until those are old."""
    ladder = warm(Ladder(cooldown=0))
    kinds = [type(fail(ladder, step, step)) for step in (205, 405, 605, 805, 1005)]
    assert kinds == [Rewind, Rewind, Rewind, Continue, Continue]
    assert isinstance(fail(ladder, 1900, 1900), Rewind)


def test_bad_data_after_a_rewind_is_skipped_until_it_ends() -> None:
    """planted: a shard of 40 bad batches: one rewind, the rest skipped in the restored state, and then on."""
    ladder = warm(Ladder())
    action = fail(ladder, 200, 200, loss=6.0)
    assert isinstance(action, Rewind)
    for batch in range(203, 240):  # its detector took the loss for the new normal long ago: no verdict
        row = seen(action.to_step, batch=batch, verdicts=LOSS if batch < 215 else {}, loss=6.0)
        assert isinstance(ladder.before_step(row, LIVE), SkipStep), batch
    assert ladder.before_step(seen(action.to_step, batch=240, loss=3.0), LIVE) == CONTINUE


def test_bad_data_without_end_is_taken_in_the_end() -> None:
    """planted: what stays bad after `max_fresh` batches is how the data is now."""
    ladder = warm(Ladder(max_fresh=10))
    action = fail(ladder, 200, 200, loss=6.0)
    assert isinstance(action, Rewind)
    rows = [ladder.before_step(seen(150, batch=203 + i, loss=6.0), LIVE) for i in range(12)]
    assert [type(row) for row in rows] == [SkipStep] * 10 + [Continue] * 2


def test_a_rate_that_jumps_again_may_only_double_every_50_steps() -> None:
    """planted: x30 in the schedule; after two failures the rate is held near the usual one and let up slowly."""
    ladder = warm(Ladder())
    row = {"verdicts": UPDATE, "update_norm": 3.0, "lr": 3e-2}
    for failure in range(2):
        action = ladder.after_step(seen(200, batch=200 + failure, **row), LIVE)
        assert isinstance(action, Rewind)
        ladder.after_rewind(action.to_step)
    rates = []
    for step in range(200, 500):
        action = ladder.before_step(seen(step, lr=3e-2), LIVE)
        rates.append(3e-2 * (action.factor if isinstance(action, ScaleLR) else 1.0))
    assert rates[0] == pytest.approx(1e-3)  # one division
    assert rates[50] == pytest.approx(2e-3)
    assert rates[-1] == 3e-2


@pytest.mark.parametrize("kind", ["shift", "drift", "jump"])
def test_loss_alone_never_rewinds_for_what_is_not_a_spike(kind: Verdict) -> None:
    """planted: data mix, drop of the rate, grokking."""
    ladder = warm(Ladder())
    for step in range(200, 240):
        assert ladder.before_step(seen(step, verdicts={"loss": kind}), LIVE) == CONTINUE
        assert ladder.after_step(seen(step, verdicts={"loss": kind}), LIVE) == CONTINUE


def test_without_a_snapshot() -> None:
    """contract: a broken state stops, a loud one goes on and says so once."""
    ladder = warm(Ladder())
    rows = [ladder.before_step(seen(200, batch=200 + i, verdicts=LOSS, healthy=()), LIVE) for i in range(5)]
    assert [type(a) for a in rows] == [SkipStep, SkipStep, Continue, Continue, Continue]
    assert [bool(a.reason) for a in rows] == [True, True, True, False, False]
    rows = [ladder.before_step(seen(200, batch=205 + i, loss=math.nan, healthy=()), LIVE) for i in range(3)]
    assert isinstance(rows[-1], Stop)
    broken = ladder.after_step(seen(200, verdicts={"update_norm": "nonfinite"}, healthy=()), LIVE)
    assert isinstance(broken, Stop)


def test_dry_run_changes_nothing() -> None:
    """contract: every decision is a Continue that says what it would have been; the incident is told once."""
    ladder = warm(Ladder(dry_run=True))
    rows = [ladder.before_step(seen(200 + i, verdicts=LOSS), LIVE) for i in range(10)]
    assert {type(row) for row in rows} == {Continue}
    assert [row.reason.split(":")[0] for row in rows if row.reason] == ["dry run"] * 3
    assert "rewind to step 150" in rows[2].reason


def test_round_trip_in_the_middle_of_an_incident() -> None:
    """round trip: through JSON, after the second of three spikes and after a rewind."""
    ladder = warm(Ladder())
    for i in range(2):
        ladder.before_step(seen(200, batch=200 + i, verdicts=SPIKE), LIVE)
    copy = Ladder()
    copy.load_state_dict(json.loads(json.dumps(ladder.state_dict())))
    rows = [(200, LOSS, 3.0), (201, SPIKE, 11.0), (202, {}, 11.0), (203, {}, math.nan), (210, {}, 1.0)]
    for step, verdicts, norm in rows:
        row = seen(step, batch=step + 2, verdicts=verdicts, grad_norm=norm)
        mine = ladder.before_step(row, LIVE)
        assert copy.before_step(row, LIVE) == mine
        assert copy.after_step(row, LIVE) == ladder.after_step(row, LIVE)
        if isinstance(mine, Rewind):
            ladder.after_rewind(150)
            copy.after_rewind(150)
        assert copy.state_dict() == ladder.state_dict()


@pytest.mark.parametrize(
    "settings", [{"probe": 0}, {"lr_factor": 0.0}, {"riding_factor": 1.5}, {"extreme": math.nan}, {"margin": -1}]
)
def test_settings_are_checked(settings: dict) -> None:
    """contract."""
    with pytest.raises(ValueError, match=next(iter(settings))):
        Ladder(**settings)


def test_a_foreign_state_is_refused() -> None:
    """contract: another policy's, a missing and a misspelt key."""
    state = Ladder().state_dict()
    for wrong, match in (
        (state | {"policy": "ZClip"}, "of 'ZClip', not of Ladder"),
        ({k: v for k, v in state.items() if k != "run"}, "lacks run"),
        (state | {"runs": 1}, "did you mean 'run'"),
    ):
        with pytest.raises(ValueError, match=match):
            Ladder().load_state_dict(wrong)
