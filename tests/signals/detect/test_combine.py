"""planted: each kind of trouble, by what moves first. The orders are those of the fault injections on record."""

from __future__ import annotations

import pytest

from aftershock.signals.detect.combine import CAUSES, Cause, Combiner, Moved, incidents, name_cause
from aftershock.signals.detect.events import SignalEvent
from aftershock.signals.detect.roles import Role, role_of
from aftershock.signals.detect.rule import Verdict

ALL: set[Role] = {"loss", "gradient", "update", "rms_t", "curvature", "logit", "log_z"}


def _spikes(**onsets: int) -> list[Moved]:
    return [Moved(name, "spike", step, step + 5) for name, step in onsets.items()]


@pytest.mark.parametrize(
    ("moved", "measured", "cause"),
    [
        (_spikes(update=100, loss=101), ALL, "rate_or_state_fault"),
        (_spikes(update=100, loss=101, grad_norm=101), ALL, "rate_or_state_fault"),
        (_spikes(update=100, rms_t=100, loss=101), ALL, "rate_or_state_fault"),  # v zeroed at load
        (_spikes(update=100, grad_norm=100, loss=100, rms_t=100), ALL, "data_or_hardware"),
        (_spikes(curvature=85, update=90, grad_norm=80, rms_t=96, loss=100), ALL, "second_moment_lag"),
        (_spikes(grad_norm=80, rms_t=96, loss=100), ALL - {"curvature"}, "second_moment_lag"),
        (_spikes(rms_t=96, loss=100, update=96), ALL - {"curvature"}, "rate_or_state_fault"),
        ([Moved("attn/blocks.0/max_logit", "drift", 10, 500), *_spikes(loss=600, grad_norm=600)], ALL, "growth"),
        ([Moved("output/head/log_z", "shift", 10, 500)], ALL, "growth"),
        ([Moved("loss", "nonfinite", 100, 140)], ALL, "nonfinite"),
        ([Moved("loss", "jump", 100, 108)], ALL, "improvement"),
        (_spikes(loss=100), {"loss"}, "unknown"),
        (_spikes(update=100, loss=101), {"loss", "update"}, "unknown"),  # nobody looked at the gradient
        ([], ALL, "unknown"),
    ],
)
def test_causes(moved: list[Moved], measured: set[Role], cause: Cause) -> None:
    assert name_cause(moved, measured) == cause
    assert CAUSES[cause]


def test_online_and_from_events_agree() -> None:
    """equivalence: verdict by verdict, and afterwards from the events."""
    combiner = Combiner(signals=("loss", "grad_norm", "update_norm"))
    state = combiner.init()
    told: list[Cause | None] = []
    for step in range(300):
        said: dict[str, Verdict] = {"loss": "spike" if 201 <= step < 210 else "ok", "grad_norm": "ok"}
        said["update_norm"] = "spike" if step == 200 else "ok"
        state, cause = combiner.update(state, step, said)
        told.append(cause)
    assert told[:200] == [None] * 200
    assert set(told[200:210]) == {"rate_or_state_fault"}
    events = [SignalEvent("spike", "update_norm", 200, 200, 200), SignalEvent("spike", "loss", 201, 205, 209)]
    (incident,) = incidents(events, combiner.signals)
    assert (incident.cause, incident.onset, incident.end) == ("rate_or_state_fault", 200, 209)


def test_old_moves_are_forgotten() -> None:
    combiner = Combiner(signals=("loss", "grad_norm", "update_norm"))
    state, _ = combiner.update(combiner.init(), 0, {"update_norm": "spike"})
    state, cause = combiner.update(state, 1000, {"loss": "spike"})
    assert cause == "unknown"
    assert len(state.moved) == 1


def test_events_far_apart_are_two_incidents_but_growth_counts_from_afar() -> None:
    events = [
        SignalEvent("drift", "attn/blocks.0/max_logit", 1000, 3000, 3000),
        SignalEvent("spike", "loss", 9000, 9001, 9004),
        SignalEvent("jump", "accuracy", 40_000, 40_001, 40_004),
    ]
    found = incidents(events, ["attn/blocks.0/max_logit", "loss", "accuracy"])
    assert [i.cause for i in found] == ["growth", "growth", "improvement"]


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("loss/train/ce", "loss"),
        ("train_loss", "loss"),
        ("Val Loss", "loss"),
        ("trainLoss", "loss"),
        ("perplexity", "loss"),
        ("grad/all/norm", "gradient"),
        ("grad_norm", "gradient"),
        ("gnorm", "gradient"),
        ("update/blocks.0.attn.qkv/rms", "update"),
        ("update_norm", "update"),
        ("attn/blocks.0/max_logit", "logit"),
        ("output/head/log_z", "log_z"),
        ("rms_t", "rms_t"),
        ("optimizer/embed/rms_t", "rms_t"),
        ("sharpness", "curvature"),
        ("accuracy/eval/mean", "accuracy"),
        ("val_acc", "accuracy"),
        ("optim/all/lr", "setting"),
        ("learning_rate", "setting"),
        ("lr", "setting"),
        ("epoch", "setting"),
        ("tokens", "setting"),
        ("_timestamp", "setting"),
        ("something", "other"),
    ],
)
def test_roles(name: str, role: Role) -> None:
    assert role_of(name) == role
