"""claims.emergence_criteria: planted scores that must be supported or contradicted, and the public ones."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from aftershock.claims.claim import Judgement
from aftershock.claims.emergence_criteria import (
    CHECKPOINTS,
    MIXED_EXPERTS,
    MODELS,
    SCORE_TRIALS,
    judge_e1,
    judge_e2,
    judge_e3,
    judge_e4,
    load_scores,
)
from aftershock.forecast.curves import sigmoid
from aftershock.forecast.scores import ScoreTable, read_scores

CHECKOUT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("AFTERSHOCK_SCORES", CHECKOUT.parent / "shared" / "data"))
X_N = np.linspace(20.5, 24.5, 40)
HEADER = "task,metric,model,model_family,train_flops,score,chance_low\n"

Curve = Callable[[int, np.ndarray], np.ndarray]


def table_of(folder: Path, curves: dict[str, np.ndarray], *, family: str = "", name: str = MODELS) -> ScoreTable:
    """One row for each curve and place; the key is `task metric`. The family is the number of five places."""
    rows = []
    for key, y_N in curves.items():
        task, metric = key.split()
        for i, (x, y) in enumerate(zip(X_N, y_N, strict=True)):
            rows.append(f"{task},{metric},m{i},{family and family + str(i // 5)},{10**x:.6g},{y:.6f},\n")
    path = folder / name
    path.write_text(HEADER + "".join(rows), encoding="utf-8")
    return read_scores(path)


def tasks(curve: Curve, *, noise: float = 0.01) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {f"t{t} acc": np.clip(curve(t, X_N) + noise * rng.normal(size=X_N.size), 0, 1) for t in range(8)}


def test_e1_wants_better_and_yet_little(tmp_path: Path) -> None:
    """planted: straight rises contradict it (the logit bends); so do saturating ones, which it foretells too well."""
    straight = judge_e1(table_of(tmp_path, tasks(lambda t, x_N: 0.1 + (0.1 + 0.015 * t) * (x_N - 20.5))))
    assert straight.verdict == "contradicted"
    assert straight.effect > 0
    bent = judge_e1(table_of(tmp_path, tasks(lambda t, x_N: 0.1 + 0.5 * sigmoid(4 * (x_N - 21.5 - 0.1 * t)))))
    assert bent.effect < 0
    assert bent.interval[0] <= bent.effect <= bent.interval[1]


@pytest.mark.parametrize("kept", [True, False])
def test_e2_asks_whether_improvements_go_on(tmp_path: Path, kept: bool) -> None:
    """planted: each family keeps its own pace, or every step is drawn anew."""
    rng = np.random.default_rng(1)
    curves = {}
    for t in range(30):
        steps_FS = np.tile(rng.uniform(0, 0.4, size=(8, 1)), (1, 5)) if kept else rng.uniform(0, 0.4, size=(8, 5))
        curves[f"t{t} acc"] = np.clip(np.cumsum(steps_FS * (X_N[1] - X_N[0]), axis=1), 0, 1).ravel()
    judged = judge_e2(table_of(tmp_path, curves, family="f"))
    assert judged.verdict == ("contradicted" if kept else "supported")
    assert judged.detail["counts"] == {"triples": 240.0, "families": 8.0}


@pytest.mark.parametrize("smooth", [True, False])
def test_e3_asks_what_the_companion_does_before_the_jump(tmp_path: Path, smooth: bool) -> None:
    """planted: p^12 beside 1 - p as a Brier score, and a jump that the companion makes too."""
    p_N = sigmoid(1.2 * (X_N - 21.5))
    step_N = sigmoid(8 * (X_N - 23))
    curves = {}
    for t in range(4):
        curves |= {f"t{t} acc": p_N**12 if smooth else step_N, f"t{t} brier": 1 - (p_N if smooth else step_N)}
    judged = judge_e3(table_of(tmp_path, curves))
    assert judged.verdict == ("supported" if smooth else "contradicted")
    assert judged.effect == float(smooth)
    assert len(judged.detail) == 4


def test_e3_without_a_jump_measures_nothing(tmp_path: Path) -> None:
    """planted: the clean case."""
    line_N = (X_N - 20) / 5
    judged = judge_e3(table_of(tmp_path, {"t acc": line_N, "t brier": 1 - line_N}))
    assert judged.verdict == "inconclusive"
    assert math.isnan(judged.effect)


def test_e4_tells_mixtures_from_single_logits(tmp_path: Path) -> None:
    """planted: tasks that all mix one early and one late curve, and tasks of one steep curve each."""

    def mixed(t: int, x_N: np.ndarray) -> np.ndarray:
        share = 0.4 + 0.06 * t
        return share * sigmoid(1.5 * (x_N - 20.8)) + (1 - share) * sigmoid(1.5 * (x_N - 24.5))

    judged = judge_e4(table_of(tmp_path, tasks(mixed, noise=0.005)))
    assert judged.verdict == "supported"
    assert judged.effect < 0
    assert set(judged.detail["difference by number of curves"]) == {"1", "2", "3", "5"}
    single = judge_e4(table_of(tmp_path, tasks(lambda t, x_N: sigmoid((3 + t) * (x_N - 22 - 0.1 * t)), noise=0.005)))
    assert single.verdict == "contradicted"


def test_mixtures_of_experts_are_left_out(tmp_path: Path) -> None:
    """property: their scores change nothing, whatever they are."""
    line_N = (X_N - 20) / 5
    table_of(tmp_path, {f"t{t} acc": line_N * (0.5 + 0.05 * t) for t in range(4)})
    path = tmp_path / MODELS
    first = judge_e1(read_scores(path))
    with path.open("a", encoding="utf-8") as file:
        file.writelines(f"t0,acc,{model},,1e24,0.01,\n" for model in MIXED_EXPERTS)
    assert judge_e1(read_scores(path)) == first


def test_too_little_to_judge_is_said(tmp_path: Path) -> None:
    """contract."""
    (tmp_path / MODELS).write_text(HEADER + "t,acc,m,,1e21,0.5,\n", encoding="utf-8")
    table = load_scores(tmp_path, [MODELS])
    for criterion in (judge_e1, judge_e4):
        with pytest.raises(ValueError, match="no curve has enough models below and above"):
            criterion(table)
    with pytest.raises(ValueError, match="no family has three sizes"):
        judge_e2(table)
    with pytest.raises(ValueError, match=f"{CHECKPOINTS}: no such file"):
        load_scores(tmp_path, [MODELS, CHECKPOINTS])


@pytest.mark.skipif(not FOLDER.is_dir(), reason="no public scores: set AFTERSHOCK_SCORES to the folder of the files")
@pytest.mark.parametrize("claim_id", SCORE_TRIALS)
def test_public_scores_can_be_judged(claim_id: str) -> None:
    """contract: a verdict that its own numbers bear out, and the same again."""
    trial = SCORE_TRIALS[claim_id]
    table = load_scores(FOLDER, trial.files)
    judged: Judgement = trial.criterion(table)
    assert judged.interval[0] <= judged.effect <= judged.interval[1]
    assert judged.detail
    assert trial.criterion(table) == judged
