"""The studies that make lines: one small incident, one counted run, lines there and back, interruption, the record."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn
from torch.optim import SGD

from aftershock.claims import incidents, lines, study
from aftershock.claims.catalog import CLAIMS, find_claim
from aftershock.claims.claim import Line, LineTrial
from aftershock.claims.counted import SETTINGS, Setting, counted, run_name, train
from aftershock.claims.incident import Answer, Belief, Counted, FirstPlace, Incident, Level, Mind
from aftershock.claims.incidents import PLANS, Plan, incident, incident_id, sample
from aftershock.claims.records import read_records
from aftershock.lab.sweep import OnProgress, SweepProgress
from aftershock.lab.zoo.registry import ZOO, specimen
from aftershock.store.folder import to_json
from aftershock.workload import Workload

DOCS = Path(__file__).parents[2] / "docs" / "claims.md"
EDGE = Plan(name="edge", specimen="edge_of_stability", share=0.75)
FEW = ("control#2", "control#3", "sham:skip#1", "skip", "wd*0")


def written(line: Line) -> Line:
    """As it comes back from a file."""
    return json.loads(to_json(line))


# ------------------------------------------------------------------------------------------------------- one line


def test_round_trip_of_an_incident() -> None:
    """round trip: with numbers that are not finite, with nothing, and with everything."""
    mind = Mind(entropy=1.5, from_unigram=math.inf, from_bigram=0.5, agreement=0.25, by_frequency={"0 to 0": math.inf})
    least = Incident(
        id="a-0#0", name="a", cause="C1", kind="spontaneous", seed=0, share=1.0, clip=None, num_params=7, steps=9,
        seconds=0.5,
    )  # fmt: skip
    whole = dataclasses.replace(
        least,
        window=(60, 100, 103, 120),
        height=math.inf,
        band=0.1,
        threshold=2.4,
        recovery=3,
        answers={"skip": Answer("data", True, math.inf, 103, 9, "spike")},
        left_out={"wd*0": "the weight decay is 0 already"},
        first={"layer": FirstPlace(None, 2, 0, 4, False)},
        belief=Belief("not finite", {"peak": mind}),
    )
    assert Incident.from_line(written(whole.to_line())) == whole
    again = Incident.from_line(written(least.to_line()))
    assert math.isnan(again.height)
    assert dataclasses.replace(again, height=0.0, band=0.0, threshold=0.0) == dataclasses.replace(
        least, height=0.0, band=0.0, threshold=0.0
    )


def test_round_trip_of_a_counted_run() -> None:
    """round trip."""
    made = Counted(
        id="curve base-0", family="curve", setting="base", cause="C3", seed=0, num_params=7, depth=1, batch=200,
        half_life=math.inf, clip=1.0, steps=10, samples=2000, finite=False, seconds=0.5,
        spikes=((1, 2, 3),), clipped=(True,), levels={"0.1": Level(5, math.nan)},
    )  # fmt: skip
    again = Counted.from_line(written(made.to_line()))
    assert math.isnan(again.levels["0.1"].edge_share)
    assert dataclasses.replace(again, levels={}) == dataclasses.replace(made, levels={})
    assert again.rate == 500.0


def test_a_line_of_another_format_is_named() -> None:
    """planted: a field too many, and one too few."""
    line = dict(Incident(
        id="a-0#0", name="a", cause="C1", kind="spontaneous", seed=0, share=1.0, clip=None, num_params=7, steps=9,
        seconds=0.5,
    ).to_line())  # fmt: skip
    with pytest.raises(ValueError, match="the line a-0#0 has other fields than it should: more"):
        Incident.from_line(line | {"more": 1, "code": "abc"})
    del line["seed"]
    with pytest.raises(ValueError, match="seed"):
        Incident.from_line(line)


# --------------------------------------------------------------------------------------------------- the two drivers


def test_contract_of_the_plans() -> None:
    """contract: specimens that there are, every spontaneous one, each in its own place; ids are unique."""
    jobs = [incident_id(plan, seed) for plan in PLANS for seed in plan.seeds]
    jobs += [run_name(setting, seed) for setting in SETTINGS for seed in setting.seeds]
    assert len(set(jobs)) == len(jobs)
    used = {plan.specimen for plan in PLANS}
    assert {name for name, one in ZOO.items() if one.kind == "spontaneous"} <= used
    assert {specimen(name).cause for name in used if specimen(name).kind == "planted"} == {"C7"}
    clipped = {setting.name for setting in SETTINGS if setting.family == "clipped"}
    assert clipped == {name for name, one in ZOO.items() if one.kind == "spontaneous"}


def test_the_documents_have_the_studies() -> None:
    """contract: docs/claims.md has a row a study, with its claims and how many lines it makes."""
    numbers = {"incidents": sum(len(p.seeds) for p in PLANS), "counted": sum(len(s.seeds) for s in SETTINGS)}
    rows = re.findall(r"^\| `(\w+)` \| ([SH\d, ]+) \|.*\| (.+) \| [\d,]+ \|$", DOCS.read_text("utf-8"), re.MULTILINE)
    assert {name: lines for name, _, lines in rows if name in numbers} == {k: str(n) for k, n in numbers.items()}
    trials = [(claim.id, claim.trial.study) for claim in CLAIMS if isinstance(claim.trial, LineTrial)]
    for name, claims, _ in rows:
        assert claims.split(", ") == [claim_id for claim_id, of in trials if of == name]
    assert {name for name, *_ in rows} == {*study.STUDIES}


def test_one_incident(monkeypatch: pytest.MonkeyPatch) -> None:
    """contract: a real spike and few replays of it; every cell answers or says why not."""
    monkeypatch.setattr(incidents, "CELLS", FEW)
    monkeypatch.setattr(incidents, "SHAMS", 1)
    found = incident(EDGE, 0)
    assert (found.id, found.cause, found.clip, found.num_params) == ("edge-0#0", "C3", None, 301)
    assert found.window is not None
    start, onset, peak, end = found.window
    assert start + 40 <= onset <= peak < end <= found.steps
    assert found.controls == "deterministic"
    assert found.reproducible
    assert {*found.answers} == {"control", "control#2", "control#3", "sham:skip#1", "skip"}
    assert found.answers["control"].peak_excess == found.height
    assert {*found.left_out} == {"wd*0", "thinking"}
    assert found.first["layer"].num_places == 2
    assert found.first["layer"].replays == 2
    assert Incident.from_line(written(found.to_line())) == found


def test_no_spike_is_a_line_too() -> None:
    """planted: the run ends before its spike."""
    found = incident(dataclasses.replace(EDGE, steps=60), 0)
    assert (found.window, found.reproducible, found.answers) == (None, False, {})


def test_sampled_batches() -> None:
    """contract: as many rows as asked for, of the full batch, others at each step, the same for the same step."""
    workload = specimen("edge_of_stability").build(0).workload
    whole = {*workload.batch(0).x_N1.flatten().tolist()}
    sample(workload, 0.75, seed=3)
    drawn = [{*workload.batch(index).x_N1.flatten().tolist()} for index in (4, 5, 4)]
    assert len(drawn[0]) == 150
    assert drawn[0] < whole
    assert drawn[0] == drawn[2] != drawn[1]


def test_counted_runs() -> None:
    """contract: the loss's first level with a sharpness; half-lives; a clipped run is clipped at 1."""
    base = next(one for one in SETTINGS if (one.family, one.name) == ("curve", "base"))
    found = counted(base, 0, steps=110)
    assert (found.steps, found.batch, found.samples, found.num_params) == (110, 200, 22_000, 301)
    assert found.half_life == pytest.approx(200 * math.log(0.5) / math.log(0.99))
    assert found.levels.keys() == {"0.3"}
    assert found.levels["0.3"].edge_share > 0
    kept = Setting(family="curve", name="batch=50, half-life kept", size=100, share=0.25, beta2=0.99**0.25)
    smaller = counted(kept, 0, steps=20)
    assert (smaller.batch, smaller.levels) == (50, {})
    assert smaller.half_life == pytest.approx(found.half_life)  # in samples, though not in steps
    clipped = counted(Setting(family="clipped", name="lag_99"), 0, steps=20)
    assert (clipped.clip, clipped.cause, clipped.spikes) == (1.0, "C1", ())


def test_planted_spike_ends_a_run() -> None:
    """planted: a loss of 1 that is 5 for three steps; looked for every 100 steps, the spike is seen at 200."""

    def loss(model: nn.Module, batch: float) -> Tensor:
        return batch + 0 * model.get_parameter("weight").sum()

    def workload() -> Workload:
        model = nn.Linear(1, 1)
        optimizer = SGD(model.parameters(), lr=0.1)
        return Workload(model=model, optimizer=optimizer, batch=lambda i: 5.0 if 120 <= i < 123 else 1.0, loss=loss)

    assert len(train(workload(), 400, ends=True).losses) == 200
    assert len(train(workload(), 400, ends=False).losses) == 400


# ----------------------------------------------------------------------------------------------------- interruption

JOBS: dict[str, Line] = {name: {"id": name, "seed": i, "seconds": 0.5} for i, name in enumerate("abc")}


def test_an_interrupted_study_goes_on(tmp_path: Path) -> None:
    """round trip: two jobs are done, the third fails; what was done is not done again, and a torn line is."""
    worked: list[str] = []
    broken = {"c"}

    def work(job: Line) -> Line:
        worked.append(job["id"])
        if job["id"] in broken:
            raise ValueError("no room")
        return job

    seen: list[tuple[int, int]] = []
    with pytest.raises(ValueError, match="no room"):
        lines.work_through(tmp_path, JOBS, work, code="x", on_progress=lambda *done: seen.append(done))
    assert seen == [(0, 3), (1, 3), (2, 3)]
    path = tmp_path / lines.LINES
    path.write_bytes(path.read_bytes() + b'{"id": "c", "se')
    broken.clear()
    found = lines.work_through(tmp_path, JOBS, work, code="x")
    assert worked == ["a", "b", "c", "c"]
    assert [line["id"] for line in found] == ["a", "b", "c"]
    assert lines.work_through(tmp_path, {"b": JOBS["b"]}, work, code="x") == [dict(JOBS["b"]) | {"code": "x"}]
    assert len(worked) == 4


def test_lines_of_other_code_are_made_again(tmp_path: Path) -> None:
    """planted: the code changes between two calls."""
    for code in ("old", "new"):
        lines.work_through(tmp_path, JOBS, dict, code=code)
    assert {line["code"] for line in lines.lines_on_file(tmp_path, code="new").values()} == {"new"}
    assert len((tmp_path / lines.LINES).read_bytes().splitlines()) == 6
    assert lines.code_digest("replay") != lines.code_digest("replay", "workload.py")


def test_workers_make_the_same_lines(tmp_path: Path) -> None:
    """equivalence: two fresh interpreters, and this one."""
    apart = lines.work_through(tmp_path / "apart", JOBS, dict, code="x", processes=2)
    assert apart == lines.work_through(tmp_path / "here", JOBS, dict, code="x", processes=1)
    with pytest.raises(ValueError, match="number of processes must be at least 1, got 0"):
        lines.work_through(tmp_path, JOBS, dict, code="x", processes=0)


# -------------------------------------------------------------------------------------------------------- the record


def test_claims_share_a_study_s_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """round trip: S1 and S3 are judged from planted lines, and their records hold what they rest on."""
    asked: list[str] = []

    def made(folder: Path, *, processes: int, on_progress: Any) -> list[Line]:
        asked.append(folder.name)
        calm = [dataclasses.replace(_calm(seed), seconds=2.0).to_line() for seed in (0, 1)]
        jobs = {line["id"]: line for line in calm}
        return lines.work_through(folder, jobs, dict, code="abc", processes=processes, on_progress=on_progress)

    monkeypatch.setattr(study, "STUDIES", {"incidents": made})
    seen: list[tuple[str, SweepProgress]] = []

    @contextlib.contextmanager
    def progress(title: str) -> Iterator[OnProgress]:
        yield lambda state: seen.append((title, state))

    s1, h4 = study.judge_all(
        ["S1", "H4"], tmp_path / "out", processes=1, on_progress=progress, records=tmp_path / "records"
    )
    assert asked == ["incidents", "incidents"]
    assert [(title, state.num_done, state.note) for title, state in seen] == [
        ("S1", 0, ""), ("S1", 1, ""), ("S1", 2, "complete"), ("H4", 2, "complete"),
    ]  # fmt: skip
    assert (s1.run_ids, s1.num_seeds, s1.config_digest, s1.core_s) == (["calm-0#0", "calm-1#0"], 2, "abc", 4.0)
    assert (s1.verdict, s1.effect, h4.verdict) == ("inconclusive", None, "inconclusive")
    assert s1.command == "aftershock claims --run S1"
    assert read_records(tmp_path / "records")["S1"][-1] == s1
    assert find_claim("S1").criterion == s1.criterion


def _calm(seed: int) -> Incident:
    return Incident(
        id=f"calm-{seed}#0", name="calm", cause="C1", kind="spontaneous", seed=seed, share=1.0, clip=None,
        num_params=7, steps=9, seconds=0.5,
    )  # fmt: skip
