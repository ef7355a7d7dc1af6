"""Verdicts: every signature recognises itself, strangers stay undecided, shams discount remedies."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aftershock.causes import CAUSES
from aftershock.guard.state import State, Training
from aftershock.replay.cells import KINDS
from aftershock.replay.loop import Taken
from aftershock.replay.response import Baseline, Response
from aftershock.replay.run import Window
from aftershock.replay.signatures import ALWAYS, NEVER, QUESTIONS, SIGNATURES, STRUCK, Signature
from aftershock.replay.symptoms import Symptoms, symptoms
from aftershock.replay.verdict import DECIDED, Answer, answers, judge, judge_struck, zero_line

WINDOW = Window(100, 140, 142, 150)
CALM = Symptoms("none", None, False, 1.0, None, None, False, False, False)


def response(*, present: bool, onset: int | None = 140) -> Response:
    return Response(present, 1.0, 142, 1.0, 3, onset, 150, None, None, 1.0, 1.0, False)


def subject(**more: Any) -> Any:
    base = Baseline(0.0, 0.1, 2.0, 1.0, "log", 1.0)
    states = {WINDOW.start: State({}, {"group": [], "optimizer": {}})}
    work = SimpleNamespace(clip_norm=None)
    return SimpleNamespace(window=WINDOW, baseline=base, rows={}, recorded={}, states=states, workload=work, **more)


def as_it_says(one: Signature) -> list[Answer]:
    """What an incident of that kind answers: a yes where one is more likely than not."""
    found = [Answer(name, float(one.yes.get(name, NEVER) > 0.5), "cell") for name in QUESTIONS]
    return found if one.yes.get("data", NEVER) > 0.5 else [x for x in found if QUESTIONS[x.question].after is None]


@pytest.mark.parametrize("one", SIGNATURES, ids=lambda one: f"{one.cause} {one.way}")
def test_every_signature_recognises_itself(one: Signature) -> None:
    """contract: the answers that a class gives most often put it first, by a clear margin."""
    found = judge(as_it_says(one), zero=0.1)
    assert found.ranked[0].cause == one.cause
    assert found.ranked[0].share > 2 * found.ranked[1].share


def test_questions_ask_for_cells_that_there_are() -> None:
    """contract: the matrix names known cells, questions and causes, and probabilities that one replay cannot settle."""
    for question in QUESTIONS.values():
        assert all(cell.replace("*", ":").replace("=", ":").split(":")[0] in KINDS for cell in question.cells)
        assert question.after is None or question.after in QUESTIONS
    for one in SIGNATURES:
        assert one.cause in CAUSES
        assert set(one.yes) <= set(QUESTIONS)
        assert all(NEVER <= p <= ALWAYS for p in one.yes.values())
    assert all(sum(shares.values()) == pytest.approx(1.0) for shares in STRUCK.values())


def test_where_shams_remove_it_too_no_remedy_tells() -> None:
    """planted: the same answers, with shams that always spike and with shams that never do."""
    given = [Answer("data", 1.0, "skip"), Answer("earlier", 0.0, "earlier"), Answer("half_rate", 0.0, "lr*0.5")]
    sure = judge(given, zero=zero_line([response(present=True)] * 4)).ranked[0]
    unsure = judge(given, zero=zero_line([response(present=False)] * 4)).ranked[0]
    assert sure.cause == "C7"
    assert unsure.share < 0.75 * sure.share


def test_a_stranger_is_not_judged_with_confidence() -> None:
    """planted: answers that no class gives together."""
    odd = ("wide_loss", "decay", "qk", "data")
    given = [Answer(name, float(name in odd), "cell") for name in QUESTIONS if name != "earlier"]
    found = judge(given, zero=0.1)
    assert found.kind == "undecided"
    assert found.cause is None
    assert "Undecided" in found.words


def test_undecided_names_the_cell_that_would_decide() -> None:
    """planted: bad batches, and nothing known of an earlier state: C7 and C8 differ in that most."""
    given = [Answer("data", 1.0, "skip"), Answer("half_rate", 1.0, "lr*0.5"), Answer("clip", 0.0, "clip*2")]
    found = judge(given, zero=0.1, possible=["earlier", "qk-norm", "z-loss=1e-4"])
    assert {one.cause for one in found.ranked[:2]} == {"C7", "C8"}
    assert found.next_cells[0] == "earlier"
    assert "--cells earlier" in found.words


@given(st.lists(st.sampled_from(sorted(QUESTIONS)), unique=True, min_size=1), st.randoms(use_true_random=False))
def test_shares_are_shares(names: list[str], random: Any) -> None:
    """property: of whatever was answered, shares lie in [0, 1], fall, and sum to 1 with that of the unknown."""
    given = [Answer(name, random.choice([0.0, 0.5, 1.0]), random.choice(["cell", "moot"])) for name in names]
    found = judge(given, zero=random.random() * 0.9 + 0.05)
    shares = [one.share for one in found.ranked]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) + found.unknown == pytest.approx(1.0)
    assert (found.kind == "decided") == (shares[0] >= DECIDED)


def test_answers_of_cells_moot_cells_and_symptoms() -> None:
    """contract: gone is a yes, later half of one, what is not there a no, and what did not run is not answered."""
    responses = {
        "skip": response(present=False),
        "lr*0.5": response(present=True),
        "hold:v": response(present=True, onset=151),
        "earlier": response(present=True),
    }
    found = {x.question: x for x in answers(subject(), responses, ["qk-norm", "qk-clip", "float64"], CALM)}
    assert (found["data"].yes, found["half_rate"].yes, found["hold_v"].yes) == (1.0, 0.0, 0.5)
    assert (found["qk"].yes, found["qk"].by) == (0.0, "moot")
    assert found["earlier"].yes == 0.0
    assert not {"wide_all", "clip", "eps"} & found.keys()  # float64 left out is no answer: it may not be possible here
    assert found["sudden"].by == "symptom"
    without = answers(subject(), {"skip": response(present=True), "earlier": response(present=True)}, [], CALM)
    assert "earlier" not in {x.question for x in without}  # asked of batches that matter


def test_what_a_cause_needs_must_be_there() -> None:
    """planted: without a second moment no lag of one is the verdict, though all else looks like it."""
    lag = next(one for one in SIGNATURES if one.needs == "hold_v")
    there = as_it_says(lag)
    gone = [Answer(x.question, 0.0, "moot") if x.question == "hold_v" else x for x in there]
    assert judge(there, zero=0.1).ranked[0].cause == lag.cause
    shares = [{one.cause: one.share for one in judge(each, zero=0.1).ranked}[lag.cause] for each in (there, gone)]
    assert shares[1] < 0.3 * shares[0]


def test_no_answer_is_refused() -> None:
    """contract: a verdict needs evidence."""
    with pytest.raises(ValueError, match="no cell and no symptom"):
        judge([], zero=0.1)


# ------------------------------------------------------------------------------------------------- struck from outside


def rows(steps: range, **changes: tuple[int, float]) -> dict[int, Taken]:
    """Rows that differ from step `changes[field][0]` on by a factor."""
    found = {}
    for step in steps:
        values = {"loss": 1.0, "grad_norm": 2.0, "update_norm": 3.0, "lr": 0.1}
        for name, (since, factor) in changes.items():
            values[name] *= factor if step >= since else 1.0
        found[step] = Taken(step, *values.values())
    return found


@pytest.mark.parametrize(
    ("changes", "struck"),
    [
        ({"loss": (140, 3.0), "grad_norm": (140, 4.0)}, "weights"),
        ({"grad_norm": (140, 9.0), "loss": (141, 2.0)}, "gradient"),
        ({"lr": (140, 30.0), "update_norm": (140, 30.0), "loss": (141, 2.0)}, "rate"),
        ({"update_norm": (140, 30.0), "loss": (141, 2.0)}, "optimizer"),
    ],
)
def test_what_differs_first_says_what_struck(changes: dict[str, tuple[int, float]], struck: str) -> None:
    """planted: a disturbance of the recorded run shows in the order in which a step computes."""
    then = rows(range(60, 150), **changes)
    one = subject()
    one.rows, one.recorded = then, {step: row.loss for step, row in then.items()}
    found = symptoms(one, rows(range(100, 150)))
    assert (found.struck, found.at) == (struck, 140)
    controls: Any = SimpleNamespace(why="hardware", first_difference=141, words="")
    verdict = judge_struck(controls, found)
    assert verdict.ranked[0].cause == ("C10" if struck in ("weights", "gradient") else "C11")
    assert (verdict.kind == "undecided") == (struck == "weights")
    assert "step 140" in verdict.words


def test_nondeterminism_is_no_cause() -> None:
    """contract: replays that differ among themselves tell no class."""
    controls: Any = SimpleNamespace(why="nondeterminism", first_difference=101, words="They differ.")
    verdict = judge_struck(controls, CALM)
    assert (verdict.kind, verdict.ranked) == ("not_reproducible", ())


def test_symptoms_of_a_rate_that_jumped() -> None:
    """planted: rate and update jump a step before the loss, the gradient after it."""
    then = rows(range(60, 150), lr=(139, 30.0), update_norm=(139, 30.0), loss=(140, 9.0), grad_norm=(140, 9.0))
    one = subject()
    one.rows, one.recorded = then, {step: row.loss for step, row in then.items()}
    found = symptoms(one)
    assert (found.rate_factor, found.rate_jumped) == (pytest.approx(30.0), True)
    assert (found.update_moved, found.grad_moved, found.update_first, found.ahead) == (139, 140, True, False)
    assert found.sudden


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_second_moment_that_gradients_left_behind_is_stale(clip_norm: float | None) -> None:
    """oracle: v_hat over squared gradients, of Adam's own formula, on a gradient that was 10 and then 2."""
    weight = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.Adam([weight], lr=0.0, betas=(0.9, 0.999))
    one, v, last = subject(), 0.0, {}
    one.workload = SimpleNamespace(clip_norm=clip_norm)
    for step in range(WINDOW.start):
        norm = 10.0 if step < 60 else 2.0
        weight.grad = torch.full_like(weight, norm / 2)
        v = 0.999 * v + 0.001 * norm**2
        last[step] = Taken(step, 1.0, norm, 0.1, 1e-3)
        optimizer.step()
    one.rows = last
    model = torch.nn.ParameterList([weight])
    one.states = {WINDOW.start: Training(model, optimizer).read()}
    squared = 4.0 if clip_norm is None else clip_norm**2
    lag = symptoms(one).lag
    assert lag == pytest.approx(v / (1 - 0.999**WINDOW.start) / squared, rel=1e-5)  # v is held in float32
    assert symptoms(one).stale


@pytest.mark.parametrize("amsgrad", [True, None])
def test_what_has_no_second_moment_to_lag_has_no_lag(amsgrad: bool | None) -> None:
    """contract: AMSGrad divides by what never falls, and SGD by nothing."""
    weight = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([weight]) if amsgrad is None else torch.optim.Adam([weight], amsgrad=amsgrad)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    one = subject()
    one.rows = {step: Taken(step, 1.0, 2.0, 0.1, 1e-3) for step in range(WINDOW.start)}
    one.states = {WINDOW.start: Training(torch.nn.ParameterList([weight]), optimizer).read()}
    assert (symptoms(one).lag, symptoms(one).stale) == (None, None)


def test_symptoms_without_rows_are_unknown() -> None:
    """contract: a record of losses alone says nothing of gradients and rates."""
    one = subject()
    one.recorded = {step: 1.0 if step < 140 else 9.0 for step in range(100, 150)}
    found = symptoms(one)
    assert (found.rate_factor, found.update_first, found.ahead, found.sudden) == (None, None, None, True)
    assert found.rate_jumped is None
    assert math.isfinite(one.baseline.height)
