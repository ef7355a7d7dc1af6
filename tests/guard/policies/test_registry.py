"""Every policy, in one contract: healthy runs, non-finite gradients, resuming, a planted spike."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from aftershock.guard.policies import POLICIES, policy
from aftershock.guard.policies.qk_clip import grouped
from aftershock.guard.policies.switches import Dial
from aftershock.guard.policy import Action, Continue, Policy, Rewind, ScaleLR, Seen, SkipStep, Stop


def _layers() -> list:
    return [grouped("inner", query="inner.weight", key="inner.weight", heads=2, key_heads=1, width=2, fused=True)]


SETTINGS: dict[str, Callable[[], dict[str, Any]]] = {
    "zclip": lambda: {"max_norm": float("inf")},
    "adagc": lambda: {"warmup": 25, "max_norm": 1e9},
    "relative_clip": lambda: {"ratio": 3.0},
    "tensor_clip": lambda: {"ratio": 4.0},
    "spam": lambda: {"period": 25, "warmup": 10},
    "stable_spam": lambda: {"period": 25},
    "update_clip": lambda: {"arm_after": 25},
    "qk_clip": lambda: {"layers": _layers(), "max_logits": lambda: {"inner": [50.0, 70.0]}},
    "beta_switch": lambda: {"beta2": 0.95, "moments": "recompute"},
    "eps_switch": lambda: {"eps": 1e-6},
    "zloss_switch": lambda: {"dial": Dial()},
    "precision_switch": lambda: {"apply": lambda dtype: None, "steps": 5},
    "adaptive_lr": lambda: {"window": 12, "threshold": 50.0},
    "ratio_back_off": lambda: {"threshold": 2.0},
    "chain": lambda: {"policies": [policy("ladder"), policy("zclip", max_norm=float("inf")), policy("update_clip")]},
}
CHANGES = {"tensor_clip", "unit_clip", "stable_spam", "embedding_shrink", "rms_clip", "stable_adamw"}
"""By their definition these change healthy steps too. All others must keep the bits of the first 20 steps."""
SPIKED: dict[str, type] = {
    **dict.fromkeys(("ladder", "skip", "momentum_reset", "chain"), SkipStep),
    "backtrack": Rewind,
    "back_off": ScaleLR,
}
"""What a spike of the gradient norm makes them say; all others let the step be taken."""
CLIPS = ("zclip", "adagc", "relative_clip", "tensor_clip", "unit_clip", "stable_spam")
"""These bring the gradient of a spike back to the size of those before it."""


def build(name: str) -> Policy:
    return policy(name, **SETTINGS.get(name, dict)())


@pytest.mark.parametrize("name", POLICIES)
def test_a_healthy_run_keeps_its_bits_where_the_definition_says_so(kit: Any, name: str) -> None:
    """contract: 20 steps against the same run without a policy; those that change it must really do so."""
    with_it, without = kit.Loop().run(build(name), 20), kit.Loop().run(None, 20)
    same = all(torch.equal(one, without.weights()[key]) for key, one in with_it.weights().items())
    assert same is (name not in CHANGES)
    assert [a for a in with_it.actions if not isinstance(a, Continue)] == []


@pytest.mark.parametrize("name", POLICIES)
def test_fifty_steps_stay_finite_and_learn(kit: Any, name: str) -> None:
    """contract: and say at most a few times that they did something."""
    loop = kit.Loop()
    loop.run(build(name), 50)
    assert loop.is_finite()
    assert loop.step == 50
    assert sum(bool(a.reason) for a in loop.actions) <= 5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", POLICIES)
def test_a_gradient_that_is_not_finite_is_never_taken(kit: Any, name: str, value: float) -> None:
    """contract: the step is skipped or the state rewound, nothing is poisoned, and the policy goes on as before."""
    one = build(name)
    loop = kit.Loop().run(one, 10)
    before = loop.weights()
    loop.run(one, 1, fault=kit.poison(10, value))
    assert isinstance(loop.actions[-1], SkipStep | Rewind)
    if isinstance(loop.actions[-1], SkipStep):
        assert all(torch.equal(before[key], new) for key, new in loop.weights().items())
    loop.run(one, 15)
    assert loop.is_finite()
    assert "nan" not in json.dumps(one.state_dict()).lower()


@pytest.mark.parametrize("name", POLICIES)
def test_a_state_that_stays_broken_ends_the_run(kit: Any, name: str) -> None:
    """contract: never a loop: a hundred batches with a NaN in each."""
    one, loop = build(name), kit.Loop()
    for batch in range(100):
        loop.run(one, 1, fault=kit.poison(batch, float("nan")))
        if isinstance(loop.actions[-1], Stop):
            break
    assert isinstance(loop.actions[-1], Stop)


@pytest.mark.parametrize("name", POLICIES)
def test_round_trip_in_the_middle(kit: Any, name: str) -> None:
    """round trip: the state through JSON into a new policy at step 30, then a spike and a NaN: same actions, bits."""
    one, loop = build(name), kit.Loop()
    verdicts = {28: {"loss": "spike"}, 36: {"grad_norm": "spike"}, 37: {"grad_norm": "spike"}}
    loop.run(one, 30, verdicts=verdicts)
    twin, other = copy.deepcopy(loop), build(name)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other.state_dict() == one.state_dict()
    for each, its in ((loop, one), (twin, other)):
        each.run(its, 10, fault=kit.spike(36), verdicts=verdicts)
        each.run(its, 10, fault=kit.poison(45, float("nan")))
    assert loop.actions == twin.actions
    assert other.state_dict() == one.state_dict()
    assert all(torch.equal(new, twin.weights()[key]) for key, new in loop.weights().items())


@pytest.mark.parametrize("name", POLICIES)
def test_a_state_handed_out_does_not_change_with_the_run(kit: Any, name: str) -> None:
    """contract: what was saved at step 30 is still that at step 40."""
    one, loop = build(name), kit.Loop()
    loop.run(one, 30)
    state = one.state_dict()
    kept = copy.deepcopy(state)
    loop.run(one, 10)
    assert state == kept


@pytest.mark.parametrize("name", POLICIES)
def test_a_spike_is_met_as_the_definition_says(kit: Any, name: str) -> None:
    """planted: all gradients x1000 at batch 30, with the detector's verdict on them."""
    one, loop = build(name), kit.Loop()
    loop.run(one, 30)
    loop.actions.clear()
    usual = max(loop.grad_norms)
    loop.run(one, 1, fault=kit.spike(30), verdicts={30: {"grad_norm": "spike"}})
    first: Action = loop.actions[0]
    assert isinstance(first, SPIKED.get(name, Continue))
    if name in CLIPS:
        # Some clips allow a few times the usual norm; unclipped it would be near 1,000 times.
        assert loop.grad_norms[-1] < 5 * usual
    loop.run(one, 10)
    assert loop.is_finite()


@pytest.mark.parametrize("name", POLICIES)
def test_a_foreign_state_is_refused(name: str) -> None:
    """contract."""
    with pytest.raises(ValueError, match="policy state is of 'Other'"):
        build(name).load_state_dict({"policy": "Other"})


def test_sparse_gradients_are_refused_with_a_sentence(kit: Any) -> None:
    """contract: by those that read elements or norms per tensor."""
    loop = kit.Loop(optimizer="sgd")
    loop.model.embed.sparse = True
    loop.model(torch.tensor([1, 2])).sum().backward()
    row = Seen(0, 0, 1.0, 1.0, float("nan"), 0.1, {}, None, ())
    for name in ("adagc", "tensor_clip", "unit_clip", "spam", "stable_spam", "update_clip"):
        with pytest.raises(ValueError, match=r"gradient of embed\.weight is sparse"):
            build(name).before_step(row, loop.live)


def test_names_and_settings_are_checked() -> None:
    """contract: the nearest name in the sentence."""
    with pytest.raises(ValueError, match="did you mean 'zclip'"):
        policy("zlip")
    with pytest.raises(ValueError, match="did you mean 'max_norm'"):
        policy("zclip", maxnorm=1.0)
    assert repr(policy("zclip", threshold=3.0)).startswith("ZClip(threshold=3.0")


def test_every_policy_says_what_it_is() -> None:
    """contract: a docstring with an example."""
    assert [name for name, kind in POLICIES.items() if "Example:" not in (kind.__doc__ or "")] == []
