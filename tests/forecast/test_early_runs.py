"""What early forecasts read of a study: features up to step k and nothing later, outcomes, and bad studies refused."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from aftershock import cli
from aftershock.forecast.early import early_divergence
from aftershock.forecast.early_runs import FEATURES, read_early
from aftershock.forecast.observations import LOG_Z, LOGIT
from aftershock.lab.presets import tiny_run
from aftershock.lab.recipe import RunConfig
from aftershock.lab.sizes import parse_size, with_size
from aftershock.lab.sweep import expand, load_spec
from aftershock.store.study import RunRef, write_manifest
from aftershock.store.writer import RunWriter

STEPS, L0 = 100, 6.0
Write = Callable[..., Path]
SIGNALS = (LOGIT, LOG_Z, "output/blocks.0/rms", "output/blocks.1/rms", "update/blocks.0.mlp.in/rms")
"""In the order in which `write` gives them the values 1, 2, 3, ... at step 0."""


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write(...)`: a study whose runs are written, not trained. Every signal grows by `1 + lr` a step, to step 10."""
    return _builder(tmp_path)


def _builder(tmp_path: Path) -> Write:
    def build(
        *,
        name: str = "study",
        sizes: Sequence[str] = ("16x2", "32x2"),
        rates: Sequence[float] = (0.01, 0.1, 1.0),
        seeds: Sequence[int] = (0,),
        signals: Sequence[str] = SIGNALS,
        every: int = 2,
        unfinished: Callable[[RunRef], bool] = lambda ref: False,
        dies: Callable[[RunRef], int | None] = lambda ref: None,
        fails: Callable[[RunRef], bool] = lambda ref: ref.lr > 0.05 * (ref.seed + 1),
        change: Callable[[RunRef, RunConfig], RunConfig] = lambda ref, config: config,
        later: float = 1.0,
    ) -> Path:
        folder = tmp_path / name
        arms = [
            RunRef(run_id=f"{name}-{size}-{lr}-{seed}", size=size, arm="baseline", lr=lr, seed=seed)
            for size in sizes
            for lr in rates
            for seed in seeds
        ]
        write_manifest(folder, name=name, title="", runs=arms)
        for ref in arms:
            sized = with_size(tiny_run(steps=STEPS), parse_size(ref.size))
            optim = dataclasses.replace(sized.optim, lr=ref.lr)
            config = dataclasses.replace(sized, optim=optim, seed=ref.seed, measure_every=every)
            _write_run(folder, ref, change(ref, config), signals, every, unfinished(ref), dies(ref), fails(ref), later)
        return folder

    return build


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of two sizes, three rates and three seeds, every run done; only read."""
    return _builder(tmp_path_factory.mktemp("whole"))(seeds=(0, 1, 2))


def _write_run(
    folder: Path,
    ref: RunRef,
    config: RunConfig,
    signals: Sequence[str],
    every: int,
    unfinished: bool,
    died_at: int | None,
    fails: bool,
    later: float,
) -> None:
    writer = RunWriter.open(folder / "runs" / ref.run_id, config=config)
    for step in range(11):
        if died_at is not None and step > died_at:
            break
        growth = (1 + ref.lr) ** step * (later if step > 4 else 1.0)
        loss = math.nan if step == died_at else L0 / growth
        writer.scalars(step, {"loss/train/ce": loss, "grad/all/norm": 2.0 * growth})
        if step % every == 0:
            writer.stats(step, list(signals), growth * np.arange(1.0, len(signals) + 1))
    if unfinished:
        writer.flush()
        writer.abandon()
        return
    final = None if died_at is not None else 4.0 if fails else 2.0 + 0.01 * abs(math.log10(ref.lr) + 2)
    summary = {"initial_loss": L0, "final_loss": final, "seconds": 1.0}
    writer.close("finished" if final is not None else "diverged", summary)


def test_features_are_what_was_recorded(whole: Path) -> None:
    """oracle: by hand, at 2 % of 100 steps and at step 5, whose statistics are those of step 4."""
    found = read_early([whole])
    assert (found.step, found.steps, found.notes) == (2, STEPS, ())
    assert [feature.key for feature in found.features] == list(FEATURES)
    run = next(run for run in found.runs if run.run_id == "study-32x2-0.1-1")
    up = 2 * math.log10(1.1)
    expected = {
        "rate": -1.0,
        "size": math.log10(12 * 2 * 32**2),
        "logit": up,
        "log_z": math.log10(2) + up,
        "grad_norm": math.log10(2) + up,
        "grad_growth": up,
        "update": math.log10(5) + up,
        "output": math.log10(4) + up,
        "loss": -up,
    }
    assert run.features == pytest.approx([expected[feature.key] for feature in found.features])
    late = read_early([whole], at=5)
    assert late.step == 5
    assert "logit, log_z, update, output were last measured at step 4; for step 5" in late.notes[0]
    values = next(run.features for run in late.runs if run.run_id == "study-32x2-0.1-1")
    assert values is not None
    assert values[list(expected).index("logit")] == pytest.approx(4 * math.log10(1.1))
    assert values[list(expected).index("grad_growth")] == pytest.approx(5 * math.log10(1.1))


def test_nothing_later_than_the_step_matters(write: Write) -> None:
    """property: two studies alike up to step 4 and a thousandfold apart after it give the same features."""
    folders = [write(name=name, sizes=("16x2",), later=factor) for name, factor in (("a", 1.0), ("b", 1000.0))]
    for step, same in ((4, True), (6, False)):
        one, other = ([run.features for run in read_early([folder], at=step).runs] for folder in folders)
        assert (one == other) is same


def test_outcomes_need_whole_curves(write: Write) -> None:
    """contract: an unfinished run opens the outcome of its curve, a death is known at once; each is counted."""
    folder = write(
        seeds=(0, 1),
        unfinished=lambda ref: ref.size == "16x2" and ref.seed == 0 and ref.lr == 0.1,
        dies=lambda ref: {0: 1, 1: 8}[ref.seed] if ref.size == "32x2" and ref.lr == 1.0 else None,
    )
    found = read_early([folder])
    runs = {run.run_id.removeprefix("study-"): run for run in found.runs}
    assert runs["16x2-0.01-0"].fails is None
    assert runs["16x2-0.01-0"].diverged is False
    assert runs["16x2-0.1-0"].status == "interrupted"
    assert runs["16x2-0.1-0"].diverged is None
    assert runs["16x2-0.1-0"].features is not None  # it passed the step before it was stopped
    assert runs["32x2-0.1-0"].fails is True
    assert runs["32x2-0.1-1"].fails is False
    assert runs["32x2-1.0-0"].features is None  # it had died by then
    assert runs["32x2-1.0-1"].features is not None
    assert runs["32x2-1.0-1"].diverged is True
    assert runs["32x2-1.0-1"].fails is True
    assert "1 runs had ended" in found.notes[0]
    assert "2 runs are done but their curve is not" in found.notes[1]


def test_a_missing_signal_is_dropped_by_name(write: Write) -> None:
    """contract: its predictors go, with notes; the others stand."""
    early = early_divergence([write(seeds=(0, 1, 2), signals=[name for name in SIGNALS if name != LOGIT])], at=2)
    assert "logit" not in early.features
    assert f"logit is dropped: 18 of 18 finished runs lack {LOGIT}" in early.notes
    assert "no predictor 'attention logit': none of its features is there" in early.notes
    names = [score.predictor for score in early.outcomes[0].splits[0].scores]
    assert "attention logit" not in names
    assert "signals" in names


@pytest.mark.parametrize(
    ("study", "at", "words"),
    [
        ({"every": 20}, None, "no measurement between 2% and 5% .* measure_every=2; or choose a step .* --at"),
        ({"signals": SIGNALS[1:]}, None, "measure_every=2"),
        ({"rates": (0.1, 1.0)}, None, "size 16x2, seed 0 has 2 rates, needs 3"),
        ({"dies": lambda ref: 8}, None, "no run of arm 'baseline' has finished.* lower rates"),
        ({"fails": lambda ref: False}, None, "the run fails in 0 of the 6 runs .* add higher rates"),
    ],
)
def test_a_study_that_cannot_tell_is_refused(
    write: Write, study: dict[str, object], at: int | None, words: str
) -> None:
    """contract: each with a sentence that says what to add."""
    folder = write(**study)
    with pytest.raises(ValueError, match=words):
        early_divergence([folder], at=at)


@pytest.mark.parametrize("at", [0, 100])
def test_a_step_outside_of_the_run_is_refused(whole: Path, at: int) -> None:
    """contract: at step 0 nothing has happened yet, and step 100 never comes."""
    with pytest.raises(ValueError, match=f"--at {at} lies outside of these runs, which have steps 1 to 99"):
        read_early([whole], at=at)


def test_mixed_settings_and_arms_are_refused(write: Write) -> None:
    """contract: the field that differs is named, and the arm that was meant."""

    def change(ref: RunRef, config: RunConfig) -> RunConfig:
        return dataclasses.replace(config, batch_size=8 if ref.lr < 1 else 9)

    folder = write(sizes=("16x2",), change=change)
    with pytest.raises(ValueError, match=r"differ in batch_size \(8, 9\)"):
        early_divergence([folder])
    with pytest.raises(ValueError, match="no arm 'baselin'; did you mean 'baseline'"):
        early_divergence([folder], arm="baselin")


def test_the_command_prints_and_writes_the_same(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    """equivalence: the JSON holds the numbers of the table; null, not nan."""
    folder = str(write(seeds=(0, 1, 2, 3), unfinished=lambda ref: ref.lr == 1.0 and ref.seed == 3))
    assert cli.main(["forecast", folder, "--early", "--at", "4", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert cli.main(["forecast", folder, "--early", "--at", "4"]) == 0
    text = capsys.readouterr().out
    assert "What step 4 of 100 (4.0%) tells of a run's end" in text
    seeds = record["outcomes"][0]["splits"][0]
    for score in seeds["scores"]:
        assert f"{score['predictor']} " in text
        assert "{:.3f} ({:.3f} to {:.3f})".format(*score["brier"].values()) in text
    unknown = [chance for chance in record["chances"] if chance["fails"] is None]
    assert {chance["seed"] for chance in unknown} == {3}
    assert all(f"{chance['probability']:.2f}?" in text for chance in unknown)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "takes one of --to SIZE, --early, --backtest and --live, got none"),
        (["--early", "--to", "64x2"], "got --to SIZE and --early"),
        (["--early", "--live"], "got --early and --live"),
        (["--to", "64x2", "--at", "3"], "--at is the step that --early looks at"),
        (["--early", "--lr", "0.1"], "--lr is a rate of the size given by --to"),
        (["--live", "--arm", "baseline"], "one folder or log, and no --arm"),
    ],
)
def test_one_forecast_at_a_time(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """contract: a mistake is one sentence and status 2, before any study is read."""
    assert cli.main(["forecast", "nowhere", *flags]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "runs", "seeds"),
    [("early_divergence", 140, {10, 11, 12, 13}), ("early_edge", 144, {20, 21, 22, 23})],
)
def test_the_studies_of_the_page_are_those_it_says(name: str, runs: int, seeds: set[int]) -> None:
    """contract: sizes, ladder and length of the page's numbers, and seeds that no other study of ours has."""
    spec = load_spec(Path(__file__).parents[2] / "examples" / f"{name}.yaml")
    planned = expand(spec)
    assert len(planned) == runs
    assert {p.ref.seed for p in planned} == seeds
    assert all(p.config.model.kind == "decoder" and p.config.model.qk_norm == "off" for p in planned)
    usual = dataclasses.replace(tiny_run(steps=200), measure_every=4)
    assert spec.base == usual
