"""What the fault injection study counts, on runs whose ends are made up, and one real run of each sort."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from aftershock.bench import survival_study
from aftershock.bench.command import Bench
from aftershock.bench.survival import Job, Judged, full_grid, judge, summary
from aftershock.bench.survival_record import NAME, Study, read_study, rows_of, study_json, write_study
from aftershock.bench.survival_run import FAULT_FREE, NUDGED, REFERENCES, SHIFTED, UNGUARDED, Ended, Happened, train
from aftershock.bench.survival_table import headline, markdown, print_study
from aftershock.lab.zoo.disturbances import Strike
from aftershock.lab.zoo.specimen import Specimen, Trial
from aftershock.report.survival import write_survival_page
from aftershock.workload import Workload

KINDS = {"bad": "planted", "wild": "spontaneous", "calm": "healthy"}
ONSETS = {"bad": 50, "wild": None, "calm": None}


def _ended(specimen: str, policy: str, end: float | None, *, seed: int = 1, early: int = 0, **given: object) -> Ended:
    fields = {
        "steps": 100, "batches": 104, "has_held_out": True, "held_out": end, "tail": 1.0, "finite": end is not None,
        "stopped": None, "counts": {}, "early": early, "events": [], "seconds": 1.0,
    }  # fmt: skip
    return Ended(specimen=specimen, policy=policy, seed=seed, **fields | given)  # pyright: ignore[reportArgumentType]


def _references(seed: int = 1, *, shifted: float = 1.01, nudged: float = 1.01) -> list[Ended]:
    return [
        _ended("bad", UNGUARDED, None, seed=seed),
        _ended("bad", FAULT_FREE, 1.0, seed=seed),
        _ended("bad", SHIFTED, shifted, seed=seed),
        _ended("wild", UNGUARDED, 1.0, seed=seed),
        _ended("wild", NUDGED, nudged, seed=seed),
        _ended("calm", UNGUARDED, 1.0, seed=seed),
    ]


def _judged(*runs: Ended, shifted: float = 1.01, nudged: float = 1.01) -> list[Judged]:
    """The runs themselves, without the controls that stand before them."""
    found = judge([*_references(shifted=shifted, nudged=nudged), *runs], kinds=KINDS, onsets=ONSETS)
    return [run for run in found if run.policy not in REFERENCES]


@pytest.mark.parametrize(
    ("specimen", "end", "survived"),
    [
        ("bad", 1.02, True), ("bad", 1.021, False), ("bad", 0.5, True), ("bad", None, False),
        ("wild", 1.02, True), ("wild", 1.021, False), ("wild", None, False),
        ("calm", 1.005, True), ("calm", 1.0051, False),
    ],
)  # fmt: skip
def test_the_limit_of_each_kind(specimen: str, end: float | None, survived: bool) -> None:
    """oracle: the three definitions at their edges."""
    (found,) = _judged(_ended(specimen, "ladder", end))
    assert found.survived == found.but_for_noise == survived
    assert bool(found.reason) == (not survived)
    assert found.lost == 4


def test_noise_widens_one_limit_only() -> None:
    """planted: shams that end 8 % apart, either way, excuse 7 % and not 9 %, and never count as survived."""
    for name, noise in (("bad", 1.08), ("bad", 1 / 1.08), ("wild", 1.08), ("wild", 1 / 1.08)):
        near, far = (_judged(_ended(name, "ladder", end), shifted=noise, nudged=noise)[0] for end in (1.07, 1.09))
        assert (near.survived, near.but_for_noise) == (False, True)
        assert (far.survived, far.but_for_noise) == (False, False)


def test_a_stopped_run_is_lost() -> None:
    (found,) = _judged(_ended("wild", "ladder", 0.5, stopped="enough"))
    assert not found.survived
    assert found.reason == "stopped at step 100: enough"


def test_a_refused_run_was_not_tried() -> None:
    """oracle: it counts as refused, and neither as lost nor as stopped."""
    refused = _judged(_ended("wild", "ladder", None, stopped="refused: SGD has no eps"))
    both = summary([*refused, *_judged(_ended("wild", "ladder", 1.0))])
    assert (both.runs, both.refused, both.survived, both.stopped) == (1, 1, 1, 0)
    rows = rows_of(refused, scoring=(1,))
    assert all(row.figures.runs == 0 and not row.reasons for row in rows)


def test_an_unguarded_run_that_ends_nowhere_is_beaten_by_any_end() -> None:
    runs = [_ended("wild", UNGUARDED, None), _ended("wild", NUDGED, None), _ended("wild", "ladder", 99.0)]
    sham, found = judge(runs, kinds=KINDS, onsets=ONSETS)
    assert found.survived
    assert not sham.survived
    with pytest.raises(ValueError, match="wild, seed 1: the run unguarded is missing"):
        judge(runs[1:], kinds=KINDS, onsets=ONSETS)


def test_false_interventions_are_those_without_a_fault() -> None:
    """oracle: 3 + 1 on 104 batches of a healthy run and 50 before an onset; a spontaneous run has none."""
    runs = _judged(
        _ended("calm", "ladder", 1.0, counts={"skip": 2, "rewind": 1, "alarm": 9}),
        _ended("bad", "ladder", 1.0, counts={"skip": 3}, early=1),
        _ended("wild", "ladder", 1.0, counts={"skip": 5}),
    )
    total = summary(runs)
    assert (total.false, total.quiet_batches, total.interventions) == (4, 154, 11 / 3)
    assert total.false_rate == pytest.approx(1e4 * 4 / 154)


def test_the_grid_is_whole_seed_by_seed() -> None:
    """contract: no run twice, every guarded run has its references, and a study cut short has whole seeds."""
    full = full_grid(KINDS, ("ladder", "zclip"), (1, 3))
    assert len(set(full)) == len(full) == 2 * (3 + 2 + 1) + 2 * 3 * 2
    assert [job.seed for job in full] == sorted(job.seed for job in full)
    assert {Job("bad", SHIFTED, 3), Job("wild", NUDGED, 3), Job("calm", "zclip", 3)} <= set(full)


def test_what_nothing_guards_is_judged_beside() -> None:
    """oracle: an unguarded fault, and shams that end 1 % off and 5 % off."""
    found = {(run.specimen, run.policy): run for run in judge(_references(nudged=1.05), kinds=KINDS, onsets=ONSETS)}
    assert {key: run.survived for key, run in found.items()} == {
        ("bad", UNGUARDED): False, ("bad", SHIFTED): True, ("wild", NUDGED): False
    }  # fmt: skip
    assert all(run.but_for_noise for (_, policy), run in found.items() if policy != UNGUARDED)


def test_known_policies() -> None:
    """contract: the default first, none that needs a part of the user's, a wrong name named before anything is done."""
    every = survival_study.known_policies(())
    assert every[0] == "ladder"
    assert {"zclip", "beta_switch"} < set(every)
    assert not set(every) & set(survival_study.NEEDY)
    assert survival_study.known_policies(("zclip", "ladder", "zclip")) == ("ladder", "zclip")
    with pytest.raises(ValueError, match="did you mean 'zclip'"):
        survival_study.known_policies(("zclp",))
    with pytest.raises(ValueError, match="qk_clip needs the attention layers"):
        survival_study.known_policies(("qk_clip",))


@pytest.fixture
def study() -> Study:
    runs = _judged(
        _ended("bad", "ladder", 1.3),
        _ended("wild", "ladder", 0.9),
        _ended("calm", "ladder", 1.0),
        _ended("bad", "zclip", None),
    )
    machine = {"platform": "p", "cpu": "c", "cores": 2, "python": "3"}
    return Study(rows_of(runs, scoring=(1,)), [1], [], 60, "abc", {"torch": "2"}, machine, "2026-01-01", "again")


def test_a_study_comes_back(study: Study, tmp_path: Path) -> None:
    """round trip: through the file; and a damaged one is named."""
    write_study(tmp_path, study)
    assert read_study(tmp_path) == study
    (tmp_path / NAME).write_text('{"schema": 7}')
    with pytest.raises(ValueError, match="schema 7, this version reads 2"):
        read_study(tmp_path)


def test_words_tables_and_page_say_what_was_lost(study: Study, tmp_path: Path) -> None:
    """contract: headline and reasons in print, docs and page; the page is ASCII and opens offline."""
    assert headline(study).startswith("The default policy survives 1 of 2 faulty runs (50 %)")
    shown = io.StringIO()
    print_study(study, console=Console(width=220, file=shown))
    html = write_survival_page(study, tmp_path).read_text("ascii")
    for text in (shown.getvalue(), html):
        assert "seed 1: ends 30.0 % above the fault-free run" in text
    assert "http" not in html
    assert "| zclip | planted | 0/1 |" in markdown(study)
    assert markdown(study).count("\n| ") == 2 + 4 + 2 + 3 + 3 * 2 + 2 + 1 + 1
    assert "| planted: survived | bad |\n| --- | ---: |\n| ladder | 0/1 |\n| zclip | 0/1 |\n" in markdown(study)
    assert 'data-testid="matrix-healthy"' in html


def test_the_command_shows_the_record_of_its_folder(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_study(tmp_path, study)

    def unasked(record: object, folder: Path) -> Path:
        raise AssertionError("the detectors were not asked for")

    assert Bench(what="guard", out=tmp_path, json=True).run(unasked, write_survival_page) == 0
    assert capsys.readouterr().out == study_json(study) + "\n"
    assert (tmp_path / "guard.html").is_file()
    with pytest.raises(ValueError, match="for the guard"):
        Bench(what="detectors", out=tmp_path, policies=("zclip",)).run(unasked)


# ------------------------------------------------------------------------------------------------------- real runs


def _build(seed: int, *, faulty: bool = True) -> Trial:
    """A line learnt by Adam; at batch 60 a weight becomes NaN."""
    torch.manual_seed(seed)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def batch(index: int) -> torch.Tensor:
        return torch.randn(16, 4, generator=torch.Generator().manual_seed(index))

    def loss(model: nn.Module, x_ND: torch.Tensor) -> torch.Tensor:
        return (model(x_ND) - x_ND.sum(1, keepdim=True)).square().mean()

    @torch.no_grad()
    def act(index: int) -> None:
        model.weight[0, 0] = torch.nan

    def held_out(model: nn.Module) -> float:
        with torch.no_grad():
            return float(loss(model, batch(10**6)))

    work = Workload(model=model, optimizer=optimizer, batch=batch, loss=loss, held_out=held_out)
    return Trial(work, Strike(steps=[60], when="before_forward", act=act) if faulty else None)


BROKEN = Specimen(
    name="broken", kind="planted", cause="C10", about="a NaN", source="here", steps=120, onset=60, build=_build
)


def test_a_weight_that_breaks_is_survived_only_with_the_guard() -> None:
    """planted: the unguarded run ends nowhere; the guard rewinds, says so, and ends where the fault-free run does."""
    bare, twin, kept = (train(BROKEN, policy=name, seed=0) for name in (UNGUARDED, FAULT_FREE, "ladder"))
    assert (bare.held_out, bare.finite) == (None, False)
    assert kept.counts["rewind"] == 1
    assert kept.steps == twin.steps == twin.batches == 120
    assert kept.batches == 120 + 3 + 10, "three batches on broken weights, ten steps since the snapshot"
    assert kept.held_out is not None
    assert twin.held_out is not None
    assert kept.held_out <= 1.05 * twin.held_out  # 13 other batches: the limit of the test is that it is no multiple
    assert kept.early == 0


def test_an_unneeded_guard_changes_no_bit() -> None:
    """equivalence: without the fault the guarded run ends on the unguarded one's numbers, exactly."""

    def healthy(seed: int, *, faulty: bool = True) -> Trial:
        return _build(seed, faulty=False)

    calm = Specimen(name="calm", kind="healthy", cause="none", about="-", source="-", steps=120, build=healthy)
    bare, kept = (train(calm, policy=name, seed=0) for name in (UNGUARDED, "ladder"))
    assert kept[3:8] == bare[3:8]
    assert kept.counts == {}


def test_a_study_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """contract: a finished run is read and not trained again; a torn line and one of older code do not count."""
    jobs = [Job("bad", UNGUARDED, seed) for seed in (1, 3, 5)]
    runs = [_ended(*job[:2], 1.0, seed=job.seed, events=[Happened("skip", 1, 2, "x")]) for job in jobs]
    code = survival_study.code_digest(UNGUARDED)
    line = json.dumps(survival_study._plain(runs[0]) | {"code": code})
    old = json.dumps(survival_study._plain(runs[1]) | {"code": "older"})
    (tmp_path / survival_study.RUNS).write_text(f"{line}\n{old}\n{line[:40]}")
    assert survival_study.read_runs(tmp_path) == runs[:1]
    assert survival_study.train_missing(tmp_path, jobs[:1]) == runs[:1]


def test_a_run_depends_on_its_own_policy() -> None:
    """contract: of the policies a digest holds its own module and what that imports, and a bare run's none."""
    digests = [survival_study.code_digest(name) for name in ("ladder", "zclip", "skip", UNGUARDED)]
    assert len(set(digests)) == 4
    assert survival_study.code_digest(UNGUARDED) == survival_study.code_digest(NUDGED)
    assert {path.stem for path in survival_study._modules("back_off")} == {"backoff", "editor", "incident", "saved"}
