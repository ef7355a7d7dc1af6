"""Skipping, rewinding, backing off and chains, on rows of numbers against their definitions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from aftershock.guard.policies.backoff import BackOff, RatioBackOff
from aftershock.guard.policies.chain import Chain
from aftershock.guard.policies.rewind import Backtrack, RewindAndSkip
from aftershock.guard.policies.skip import Skip
from aftershock.guard.policy import CONTINUE, Action, Continue, Live, Policy, Rewind, ScaleLR, Seen, SkipStep, Stop
from aftershock.signals.detect.rule import Verdict

MODEL = nn.Linear(1, 1)
LIVE = Live(MODEL, torch.optim.SGD(MODEL.parameters()), dict(MODEL.named_parameters()))
LOSS: dict[str, Verdict] = {"loss": "spike"}
GRAD: dict[str, Verdict] = {"grad_norm": "spike"}


def seen(step: int, *, batch: int | None = None, verdicts: Mapping[str, Verdict] | None = None, **values: Any) -> Seen:
    full = {"loss": 3.0, "grad_norm": 1.0, "update_norm": 0.1, "lr": 1e-3, "healthy": (0, 100, 200, 300)} | values
    return Seen(step=step, batch_id=step if batch is None else batch, verdicts=verdicts or {}, cause=None, **full)


def ask(policy: Policy, *rows: Seen) -> list[Action]:
    return [policy.before_step(row, LIVE) for row in rows]


def test_skip_takes_the_step_after_its_cap() -> None:
    """contract: two spikes skipped, the third taken and told; a quiet step starts anew."""
    skip = Skip(max_skips=2)
    actions = ask(skip, *[seen(5, batch=5 + i, verdicts=GRAD) for i in range(3)], seen(6), seen(7, verdicts=LOSS))
    assert [type(a) for a in actions] == [SkipStep, SkipStep, Continue, Continue, SkipStep]
    assert "taken" in actions[2].reason


def test_skip_never_takes_what_is_not_finite() -> None:
    """planted: NaN in each batch: skipped up to the cap, then the end."""
    actions = ask(Skip(max_skips=2), *[seen(5, batch=5 + i, loss=math.nan) for i in range(3)])
    assert [type(a) for a in actions] == [SkipStep, SkipStep, Stop]
    actions = ask(Skip(max_skips=1, then="stop"), *[seen(5, batch=5 + i, verdicts=LOSS) for i in range(2)])
    assert [type(a) for a in actions] == [SkipStep, Stop]


def test_skip_reads_only_its_signals() -> None:
    """contract: and knows that an update comes too late."""
    assert ask(Skip(on=("grad_norm",)), seen(1, verdicts=LOSS)) == [CONTINUE]
    with pytest.raises(ValueError, match="loss and grad_norm only"):
        Skip(on=("update_norm",))


def test_rewind_and_skip_goes_about_100_back_from_the_first_lead() -> None:
    """planted: the update's verdict at 315 leads the loss at 318..320: 100 before 315 is after 200."""
    policy = RewindAndSkip()
    lead: dict[str, Verdict] = {"update_norm": "spike"}
    assert policy.after_step(seen(315, verdicts=lead), LIVE) == CONTINUE
    actions = ask(policy, seen(316), seen(317), *[seen(s, verdicts=LOSS) for s in (318, 319, 320)])
    assert [type(a) for a in actions] == [Continue] * 4 + [Rewind]
    assert isinstance(actions[-1], Rewind)
    assert (actions[-1].to_step, actions[-1].skip) == (200, (315, 515))


def test_rewind_and_skip_doubles_and_stops() -> None:
    """planted: the same step fails whatever the data: 200, 400, 800 batches, then the end."""
    policy, lengths, batch = RewindAndSkip(cooldown=0), [], 320
    for _ in range(3):
        *_, action = ask(policy, *[seen(320 + i, batch=batch + i, verdicts=LOSS) for i in range(3)])
        assert isinstance(action, Rewind)
        lengths.append(action.skip[1] - action.skip[0])
        policy.after_rewind(action.to_step)
        batch = action.skip[1] + 100
    assert lengths == [200, 400, 800]
    *_, action = ask(policy, *[seen(320 + i, batch=batch + i, verdicts=LOSS) for i in range(3)])
    assert isinstance(action, Stop)


def test_rewind_and_skip_cools_down() -> None:
    """contract: for 50 steps after the rewind only what is not finite acts, and never is it stepped on."""
    policy = RewindAndSkip()
    policy.after_rewind(200)
    assert ask(policy, *[seen(s, verdicts=LOSS) for s in range(201, 251)]) == [CONTINUE] * 50
    actions = ask(policy, *[seen(250, batch=260 + i, grad_norm=math.inf) for i in range(3)])
    assert [type(a) for a in actions] == [SkipStep, SkipStep, Rewind]


def test_backtrack_lowers_the_rate_each_time() -> None:
    """planted: three backtracks with 0.5, 0.25, 0.125 of the schedule's rate, floored, then the end."""
    policy = Backtrack()
    actions = ask(policy, *[seen(310, batch=310 + i, verdicts=GRAD) for i in range(4)])
    assert [a.lr_factor for a in actions if isinstance(a, Rewind)] == [0.5, 0.25, 0.125]
    assert [(a.to_step, a.skip) for a in actions if isinstance(a, Rewind)][1] == (300, (311, 312))
    assert isinstance(actions[3], Stop)
    (floored,) = ask(Backtrack(), seen(310, loss=math.nan, lr=1.5e-9))
    assert isinstance(floored, Rewind)
    assert floored.lr_factor == pytest.approx(1 / 1.5)  # 1e-9 / 1.5e-9


@pytest.mark.parametrize("policy", [RewindAndSkip(patience=1), Backtrack()])
def test_an_update_that_is_not_finite_rewinds_and_without_a_snapshot_stops(policy: Policy) -> None:
    """contract."""
    broken: dict[str, Verdict] = {"update_norm": "nonfinite"}
    assert isinstance(policy.after_step(seen(310, verdicts=broken), LIVE), Rewind)
    assert isinstance(policy.after_step(seen(310, verdicts=broken, healthy=()), LIVE), Stop)


def test_back_off_halves_again_and_recovers() -> None:
    """contract: cool-down, halving while low, floor, and the full rate again once re-warmed."""
    policy = BackOff(steps=100, rewarm=100, floor=0.2, cooldown=20)

    def at(step: int) -> Action:
        return policy.before_step(seen(step, verdicts=GRAD), LIVE)

    assert at(10) == ScaleLR(0.5, 100, 100, "grad_norm spiked (1 near here)")
    assert at(29) == CONTINUE
    factors = [a.factor if isinstance(a, ScaleLR) else None for a in (at(40), at(100), at(500))]
    assert factors == [0.25, 0.2, 0.5]


def test_back_off_after_repeated_failure() -> None:
    """contract: only the third spike within `place` steps acts."""
    policy = BackOff(after=3)
    rows = [seen(step, verdicts=LOSS) for step in (10, 200, 250, 299)]
    assert [type(a) for a in ask(policy, *rows)] == [Continue, Continue, Continue, ScaleLR]


def test_ratio_back_off_is_metaseqs_power() -> None:
    """oracle: ratio^-4 over an average of the losses that did not exceed it."""
    policy = RatioBackOff(threshold=1.2)
    average = weight = 0.0
    losses = [3.0, 2.9, 2.8, 6.0, 2.7, 3.6, 2.6, 2.5]
    for t, loss in enumerate(losses):
        (action,) = ask(policy, seen(t, loss=loss))
        ratio = loss / (average / weight) if weight else 1.0
        if ratio > 1.2:
            assert isinstance(action, ScaleLR)
            assert (action.factor, action.steps, action.rewarm) == (pytest.approx(ratio**-4), 1, 0)  # same formula
        else:
            assert action == CONTINUE
            average, weight = 0.8 * average + 0.2 * loss, 0.8 * weight + 0.2
    assert ask(policy, seen(9, loss=-1.0)) == [CONTINUE]


class Script(Policy):
    """Says what it is told to, and counts what it saw."""

    def __init__(self, *, before: Action = CONTINUE, after: Action = CONTINUE) -> None:
        self.before, self.after, self.saw = before, after, [0, 0, 0]

    def before_step(self, seen: Seen, live: Live) -> Action:
        self.saw[0] += 1
        return self.before

    def after_step(self, seen: Seen, live: Live) -> Action:
        self.saw[1] += 1
        return self.after

    def after_rewind(self, step: int) -> None:
        self.saw[2] += 1

    def state_dict(self) -> dict[str, Any]:
        return {"policy": "Script", "saw": list(self.saw)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.saw = list(state["saw"])


def test_chain_lets_the_first_strong_word_win() -> None:
    """contract: a skip ends the round, a slower rate does not; all finish a step that was taken."""
    slow, skip = ScaleLR(0.5, 1, 0, "slow"), SkipStep("bad")
    first, second, third = Script(before=slow), Script(before=skip), Script()
    chain = Chain([first, second, third])
    assert chain.before_step(seen(1), LIVE) == skip
    assert (first.saw[0], second.saw[0], third.saw[0]) == (1, 1, 0)
    chain = Chain([Script(before=Continue("a")), first, Script(before=Continue("b"))])
    assert chain.before_step(seen(1), LIVE) == slow._replace(reason="slow; a; b")
    rewind = Rewind(0, (0, 1), "back")
    last = Script(after=Stop("late"))
    chain = Chain([Script(after=rewind), last])
    assert chain.after_step(seen(1), LIVE) == rewind
    chain.after_rewind(0)
    assert last.saw == [0, 1, 1]


def test_chain_saves_all_and_checks_their_number() -> None:
    """round trip."""
    chain = Chain([Script(), Script()])
    chain.before_step(seen(1), LIVE)
    other = Chain([Script(), Script()])
    other.load_state_dict(chain.state_dict())
    assert other.state_dict() == chain.state_dict()
    with pytest.raises(ValueError, match="Chain of 2 policies; this one has 1"):
        Chain([Script()]).load_state_dict(chain.state_dict())
    with pytest.raises(ValueError, match="no policies"):
        Chain([])
