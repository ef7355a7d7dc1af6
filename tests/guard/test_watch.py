"""The watch: three detectors, decided on values that are finite, with a state that survives."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from aftershock.guard.watch import Watch
from aftershock.signals.detect.robust import Robust


def _fed(num: int = 200, threshold: float | None = None) -> Watch:
    watch, noise = Watch(threshold=threshold), np.random.default_rng(0)
    for step in range(num):
        loss, norm, update = np.exp(0.02 * noise.standard_normal(3))
        assert watch.judge(step, {"loss": 2 * loss, "grad_norm": norm, "update_norm": 0.1 * update}).verdicts == {}
    return watch


@pytest.mark.parametrize(
    ("values", "verdicts", "cause"),
    [
        ({"loss": 9.0, "grad_norm": 30.0}, {"loss": "spike", "grad_norm": "spike"}, "unknown"),
        ({"update_norm": 5.0}, {"update_norm": "spike"}, "rate_or_state_fault"),
        ({"loss": math.nan, "grad_norm": 1.0}, {"loss": "nonfinite"}, "nonfinite"),
        ({"grad_norm": math.inf}, {"grad_norm": "nonfinite"}, "nonfinite"),
        ({"loss": 2.0, "grad_norm": 1.0, "update_norm": 0.1}, {}, None),
    ],
)
def test_verdicts_and_their_cause(values: dict[str, float], verdicts: dict[str, str], cause: str | None) -> None:
    """planted: one value of each kind of trouble, and a normal one."""
    assert _fed().judge(200, values) == (verdicts, cause)


def test_state_survives_and_decides_alike() -> None:
    """round trip: through JSON, in the middle of a run of spikes."""
    one = _fed()
    one.judge(200, {"loss": 9.0, "grad_norm": math.nan})
    other = Watch()
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for step in range(201, 260):
        values = {"loss": 9.0 if step < 230 else 2.0, "grad_norm": 1.0}
        assert one.judge(step, values) == other.judge(step, values)


def test_a_rewind_keeps_the_baseline_and_forgets_what_moved() -> None:
    """contract."""
    watch = _fed()
    watch.judge(200, {"update_norm": 5.0})
    watch.rewind()
    assert watch.judge(150, {"loss": 9.0}) == ({"loss": "spike"}, "unknown")


def test_settings() -> None:
    """contract: a threshold for all, a rule for one; a signal that is not there is an error."""
    assert _fed(threshold=1000.0).judge(200, {"loss": 5.0}).verdicts == {}
    assert Watch(rules={"loss": Robust(arm_after=4)}).judge(0, {"loss": 1.0}).verdicts == {}
    with pytest.raises(ValueError, match="no signal 'lss'"):
        Watch(rules={"lss": Robust()})
