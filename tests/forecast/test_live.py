"""live: probabilities from names as logs have them, states that go on, and runs that are read as they grow."""

from __future__ import annotations

import io
import itertools
import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aftershock.forecast.hazard import SLOTS, WITHIN, Hazard, Line, Slot, feature_names, features_of, probability
from aftershock.forecast.live import CALM, CLASSES, SOON, LiveForecast, _Level, follow, slot_of
from aftershock.forecast.live_rows import run_rows
from aftershock.guard import incidentrecord
from aftershock.guard.events import EventLog
from aftershock.signals.detect.logs.rows import Problems
from aftershock.store.writer import RunWriter

STEPS, ONSET = 200, 150


def _model(signals: tuple[Slot, ...] = ("loss", "gradient")) -> Hazard:
    """One sigma of a gradient is a little, fifteen are much; the longest k is likelier."""
    names = feature_names(signals)
    coef = tuple({"gradient/now": 2.0, "loss/now": 1.0}.get(name, 0.0) for name in names)
    lines = tuple(Line(-9.0 + place, coef) for place in range(len(WITHIN)))
    return Hazard(signals, (0.0,) * len(names), (0.001, 0.01, 0.03), lines)


def _rows(*, spike: bool = True, seed: int = 0) -> list[dict[str, float]]:
    """A loss near 2 that jumps at step 150; its gradient norm is twenty times its usual from three steps before."""
    rng = random.Random(seed)
    rows = []
    for step in range(STEPS):
        high = spike and ONSET - 3 <= step < ONSET + 5
        loss = 2 + rng.gauss(0, 0.01) + (3.0 if spike and ONSET <= step < ONSET + 5 else 0.0)
        rows.append({"train/loss": loss, "grad_norm": math.exp(rng.gauss(0, 0.2)) * (20 if high else 1), "lr": 1e-3})
    return rows


def _write(folder: Path, rows: list[dict[str, float]], *, status: str = "finished") -> Path:
    with RunWriter.open(folder, config={}) as run:
        for step, row in enumerate(rows):
            run.scalars(step, row)
        run.close(status, {})
    return folder


def _csv(path: Path, rows: list[dict[str, float]]) -> Path:
    lines = [",".join(["step", *rows[0]]), *(",".join(map(str, [i, *row.values()])) for i, row in enumerate(rows))]
    path.write_text("\n".join(lines) + "\n")
    return path


def _told(run: Path, *, as_json: bool = False) -> list[str]:
    out = io.StringIO()
    assert follow(str(run), poll_s=0.01, as_json=as_json, out=out) == 0
    return out.getvalue().splitlines()


def test_a_probability_is_the_lines() -> None:
    """oracle: of the features that the tracks have, for each k; not less for a longer one."""
    live = LiveForecast([_model()])
    within = [live.update(step, row).within for step, row in enumerate(_rows()[:ONSET])][-1]
    x = features_of(live._tracks, ("loss", "gradient"))
    assert within == {k: probability(line.log_odds(x)) for k, line in zip(WITHIN, _model().lines, strict=True)}
    assert list(within.values()) == sorted(within.values())


def test_a_gradient_that_leaps_is_a_warning_with_its_reason() -> None:
    """planted: three steps before the spike, and never in the run without one."""
    for spike in (True, False):
        live = LiveForecast([_model()])
        levels = {step: live.update(step, row) for step, row in enumerate(_rows(spike=spike))}
        warned = [step for step, prospect in levels.items() if prospect.level not in ("calm", "unknown")]
        if not spike:
            assert warned == []
            continue
        assert warned[0] == ONSET - 3
        assert "gradient norm" in levels[warned[0]].reasons[0]
        assert levels[ONSET - 4].reasons == ()


def test_the_shipped_models_see_it_too() -> None:
    """planted: with the coefficients that ship the odds rise fivefold, before the spike where the gradient is known."""
    for names in (("train/loss", "grad_norm"), ("train/loss",)):
        live = LiveForecast()
        found = [live.update(step, {name: row[name] for name in names}) for step, row in enumerate(_rows())]
        calm = sorted(prospect.within[8] for prospect in found[100 : ONSET - 4])[20]
        at = ONSET - 1 if "grad_norm" in names else ONSET
        assert found[at].within[8] > 5 * calm
        assert calm < 0.05


def test_a_state_goes_on_where_it_was() -> None:
    """round trip: through JSON in the middle of a run, the same prospects after; another thing is refused."""
    live, rows = LiveForecast([_model()]), _rows()
    first = ONSET + 8  # in the steps after the spike, while its word still stands
    for step in range(first):
        live.update(step, rows[step])
    copy = LiveForecast.from_dict(json.loads(json.dumps(live.to_dict())), hazards=[_model()])
    assert live.to_dict()["level"] != [0, 0, 0]
    for step in range(first, STEPS):
        assert copy.update(step, rows[step]) == live.update(step, rows[step])
    with pytest.raises(ValueError, match="no state of a live forecast"):
        LiveForecast.from_dict({"rule": "Robust"})


@given(st.lists(st.sampled_from([0.0, 0.02, 0.05, 0.2, 0.9]), max_size=60))
def test_a_word_rises_at_once_and_falls_after_calmer_steps(series: list[float]) -> None:
    """contract: never below the word of now; it falls only after `SOON` steps below it, and does not wait for long."""
    level, names = _Level(), [name for _, name in CLASSES]
    now = [next(i for i, (limit, _) in enumerate(CLASSES) if p < limit) for p in series]
    said = [names.index(level.update(p)) for p in series]
    for step, (at, word) in enumerate(zip(now, said, strict=True)):
        assert word >= at
        if step and word < said[step - 1]:
            assert max(now[step - SOON + 1 : step + 1]) < said[step - 1]
            assert step >= SOON
        if step >= 2 * SOON * len(CLASSES):
            assert word <= max(now[step - 2 * SOON * len(CLASSES) : step + 1])
        if step and word > said[step - 1]:
            assert word == at


def test_a_probability_at_a_limit_does_not_flicker() -> None:
    """planted: one that swings about a limit at every step is one word, not forty."""
    level = _Level()
    assert {level.update(CALM + (0.001 if step % 2 else -0.001)) for step in range(1, 80)} == {"watch"}


@pytest.mark.parametrize(
    ("name", "slot"),
    [
        *(("loss/train/mean", "loss"), ("train_loss", "loss"), ("eval/loss", None), ("loss/held_out", None)),
        *(("batch/max/loss", None), ("grad/all/norm", "gradient"), ("grad_norm", "gradient"), ("gnorm", "gradient")),
        *(("grad_norm_clipped", None), ("grad/all/cosine_previous", None), ("grad/embed/over_median", None)),
        *(("update/all/norm", "update"), ("update_norm", "update"), ("update/max/ratio", None), ("lr", None)),
        *(("optim/max/rms_t_share", "rms_t_share"), ("optim/max/rms_t", None), ("output/log_z", "log_z")),
        *(
            ("attention/max/logit", "logit"),
            ("attn/blocks.0/max_logit", "logit"),
            ("accuracy", None),
            ("logit", "logit"),
        ),
    ],
)
def test_names_as_logs_have_them(name: str, slot: Slot | None) -> None:
    """contract."""
    assert slot_of(name) == slot


def test_one_name_for_a_slot() -> None:
    """contract: the whole model's norm before a tensor's, whichever comes first; of logits the largest counts."""
    live = LiveForecast([_model(SLOTS)])
    row = {"grad/blocks.0/norm": 1.0, "grad/all/norm": 9.0, "attn/a/max_logit": 1.0, "attn/b/max_logit": math.e}
    live.update(0, {"loss/train/ce": 2.0, "loss/train/total": 2.1} | row)
    logits = {"attn/a/max_logit": "logit", "attn/b/max_logit": "logit"}
    assert live.signals == {"loss/train/ce": "loss", "grad/all/norm": "gradient"} | logits
    tracks = live.to_dict()["tracks"]
    assert tracks["gradient"]["window"] == [math.log(9.0)]
    assert tracks["logit"]["window"] == [1.0]


def test_a_signal_that_comes_later_is_used_from_then_on() -> None:
    """contract: and one that is logged now and then does not stop the forecast in between."""
    live = LiveForecast([_model(("loss",)), _model()])
    rows = _rows(spike=False)
    for step in range(60):
        live.update(step, {"loss": rows[step]["train/loss"]})
    assert live.model is not None
    assert live.model.signals == ("loss",)
    for step in range(60, 140):
        few = {} if step % 2 else {"grad_norm": rows[step]["grad_norm"]}
        assert live.update(step, {"loss": rows[step]["train/loss"]} | few).within
    assert live.model.signals == ("loss", "gradient")


def test_a_loss_that_is_not_finite_is_no_forecast_any_more() -> None:
    """planted: the trouble is there, and what comes after is judged as before."""
    live = LiveForecast([_model()])
    before = [live.update(step, row) for step, row in enumerate(_rows(spike=False)[:100])][-1]
    now = live.update(100, {"train/loss": math.nan, "grad_norm": 1.0})
    assert (set(now.within.values()), now.level) == ({1.0}, "alarm")
    assert live.update(101, {"train/loss": 2.0, "grad_norm": 1.0}).within[1] == pytest.approx(
        before.within[1], abs=0.01
    )
    assert LiveForecast([_model()]).update(0, {"loss": 2.0}).within == {}


def test_a_finished_run_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """planted: the spike, the warning before it, and the highest probability; no waiting."""
    monkeypatch.setattr(time, "sleep", _fail)
    lines = _told(_write(tmp_path / "a", _rows()))
    assert lines[0].startswith("forecast from loss, gradient norm; it would take update norm")
    assert "1 spike came, from step 150; 1 with 3% or more" in lines[-1]
    assert lines[-2].startswith("200 steps; highest probability within 8 steps: ")
    assert any(f"step {ONSET - 3:>8}" in line for line in lines)
    assert "no spike came" in _told(_write(tmp_path / "b", _rows(spike=False)))[-1]


def test_json_is_an_object_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """contract: the model, each change of level, the summary."""
    monkeypatch.setattr(time, "sleep", _interrupt)
    found = [json.loads(line) for line in _told(_csv(tmp_path / "log.csv", _rows()), as_json=True)]
    assert {one["kind"] for one in found} == {"model", "level", "summary"}
    changes = [one for one in found if one["kind"] == "level"]
    assert all(a["level"] != b["level"] for a, b in itertools.pairwise(changes))
    assert all(set(one["within"]) == {"1", "8", "32"} for one in changes)
    assert found[-1]["onsets"] == [ONSET]
    assert {one["level"] for one in changes} <= {name for _, name in CLASSES}


def test_a_log_is_followed_until_it_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """contract: rows written while it waits are read, Ctrl-C ends it with the summary."""
    rows = _rows()
    path = _csv(tmp_path / "log.csv", rows[:100])
    waits: list[float] = []

    def more(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) > 1:
            raise KeyboardInterrupt
        with path.open("a") as file:
            file.writelines(f"{step},{','.join(map(str, rows[step].values()))}\n" for step in range(100, STEPS))

    monkeypatch.setattr(time, "sleep", more)
    assert "1 spike came" in _told(path)[-1]
    assert waits == [0.01, 0.01]


def test_a_run_folder_is_followed_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """contract: rows while its process holds it, late ones with their own step, and the end at its end."""
    rows, done = _rows(), 0
    run = RunWriter.open(tmp_path / "a", config={}, flush_every=1)

    def write(_: float = 0.0) -> None:
        nonlocal done
        for step in range(done, min(done + 90, STEPS)):
            run.scalars(step, {"loss": rows[step]["train/loss"]})
            if step:
                run.scalars(step - 1, {"grad_norm": rows[step - 1]["grad_norm"]})
        done += 90
        if done >= STEPS:
            run.close("finished", {})

    write()
    monkeypatch.setattr(time, "sleep", write)
    seen = list(run_rows(tmp_path / "a", Problems("a", _fail), poll_s=5.0))
    assert [row.step for row in seen] == list(range(STEPS))
    assert all(row.values.keys() == {"loss", "grad_norm"} for row in seen[:-1])


def test_a_rewound_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """contract: steps of the segment that was left come out before those of the new one."""
    run = RunWriter.open(tmp_path / "a", config={}, flush_every=1)
    for step in range(5):
        run.scalars(step, {"loss": 1.0})
    run.new_segment()
    run.scalars(2, {"loss": 2.0})
    monkeypatch.setattr(time, "sleep", lambda _: run.close("finished", {}))
    seen = [(row.step, row.values["loss"]) for row in run_rows(tmp_path / "a", Problems("a", _fail), poll_s=1.0)]
    assert seen == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (2, 2.0)]


def test_a_guards_folder(tmp_path: Path) -> None:
    """contract: the steps that it kept around its incidents, each once; without one it is said what to do."""
    EventLog(tmp_path).event("attached", 0, 0)
    with pytest.raises(ValueError, match="a guard's folder without incidents"):
        _told(tmp_path)
    kept = [
        incidentrecord.Row(i, i, row["train/loss"], row["grad_norm"], math.nan if i else 1.0)
        for i, row in enumerate(_rows())
    ]
    for number, rows in enumerate((kept[:120], kept[100:])):
        folder = tmp_path / "incidents" / f"{number}-spike"
        folder.mkdir(parents=True)
        at = incidentrecord.Point(number, number)
        incident = incidentrecord.Incident(
            *(folder, number, "spike", "recovered", at, at, None, None, (), "unknown", (), None, {}, {})
        )
        (folder / incidentrecord.RECORD).write_text(json.dumps(incidentrecord.to_record(incident)))
        (folder / incidentrecord.SIGNALS).write_text(incidentrecord.to_table(rows))
    assert _told(tmp_path)[-1].startswith("1 spike came, from step 150; 1 with 3% or more")


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda path: None, "no such file or folder"),
        (lambda path: path.write_text("step,accuracy\n0,1\n1,1\n"), "no training loss in it"),
        (lambda path: path.mkdir(), "no run folder"),
    ],
)
def test_what_cannot_be_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], Any], told: str
) -> None:
    """contract: bad input."""
    monkeypatch.setattr(time, "sleep", _interrupt)
    make(tmp_path / "a.csv")
    with pytest.raises(ValueError, match=told):
        _told(tmp_path / "a.csv")


def _fail(*_: Any) -> None:
    raise AssertionError("nothing is to be said or waited for here")


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt
