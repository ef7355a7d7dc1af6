"""From a claim to its record: do what is missing of its study, read what it found, apply the criterion, write it down.

A study is a sweep, whose runs a criterion reads, or makes JSON lines. Must not import torch: jobs do.
"""

from __future__ import annotations

import contextlib
import datetime
import fnmatch
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, Protocol

from aftershock._version import __version__
from aftershock.claims.arms_study import run_arms_study
from aftershock.claims.catalog import choose_claims
from aftershock.claims.claim import Claim, Judgement, Line, LineTrial, Record, RunResult, Signal, Trial
from aftershock.claims.counted import run_counted
from aftershock.claims.incidents import run_incidents
from aftershock.claims.lines import OnLine
from aftershock.claims.records import checkout_folder, write_record
from aftershock.config import run_id
from aftershock.lab.launch import LocalLauncher
from aftershock.lab.sweep import OnProgress, SweepProgress, run_sweep
from aftershock.store.environment import describe_environment
from aftershock.store.study import Study

POOL = "../runs"
"""Every study's runs lie in one folder beside the studies, so that claims share them."""

Progress = Callable[[str], AbstractContextManager[OnProgress]]
"""Called with a title; gives what `run_sweep` reports to. `report.progress.progress_bar` is one."""


class LineStudy(Protocol):
    """A study that makes lines: all of them, those that are in `folder` already or made now."""

    def __call__(self, folder: Path, *, processes: int, on_progress: OnLine | None) -> Sequence[Line]: ...


STUDIES: Mapping[str, LineStudy] = {"incidents": run_incidents, "counted": run_counted, "arms": run_arms_study}
"""By the name that a `LineTrial` has for it, which is its folder's too."""


class Evidence(NamedTuple):
    """What a judgement rests on, for the record."""

    run_ids: list[str]
    num_seeds: int
    config_digest: str
    core_s: float


def judge_all(
    ids: str | Sequence[str],
    out: str | Path,
    *,
    processes: int = 0,
    on_progress: Progress | None = None,
    records: str | Path | None = None,
) -> list[Record]:
    """Judge these claims (`all`: every one that has a study) and write their records; returns them in that order.

    Study `P1` lies in `out/P1`, and the runs of all sweeps in `out/runs`; studies of lines in `out/incidents` and the
    like. What is there is not done again. A record goes to the folder `records`: by default the package's own in a
    source checkout, else `out/records`.
    `processes` as in `LocalLauncher`, 0 takes one a core.

    Raises ValueError for an unknown id or a claim without a study, before anything is trained. A claim that cannot be
    judged does not stop the others: its ValueError comes at the end, with all reasons in one sentence.
    """
    chosen = choose_claims(ids)
    out = Path(out)
    folder = Path(records) if records is not None else checkout_folder() or out / "records"
    done: list[Record] = []
    problems: list[str] = []
    for claim in chosen:
        try:
            record = judge(claim, out, processes=processes, on_progress=on_progress)
            write_record(folder, record)
            done.append(record)
        except ValueError as error:
            problems.append(f"{claim.id} could not be judged: {error}")
    if problems:
        raise ValueError("; ".join(problems))
    return done


def judge(claim: Claim, out: Path, *, processes: int = 0, on_progress: Progress | None = None) -> Record:
    """Do what is missing of one claim's study in `out`, and judge it. Writes no record.

    Raises ValueError when the claim has no study, a run failed to train, or the criterion has nothing to compare.
    """
    if claim.trial is None:
        raise ValueError(f"claim {claim.id} has no study yet")
    launcher = LocalLauncher(num_processes=processes)
    with _reporting(claim, on_progress) as report:
        if isinstance(claim.trial, LineTrial):
            found = _judge_lines(claim.trial, out, launcher.max_parallel, report)
        else:
            found = _judge_sweep(claim, claim.trial, out, launcher, report)
    return _record(claim, *found)


def _judge_sweep(
    claim: Claim, trial: Trial, out: Path, launcher: LocalLauncher, report: OnProgress | None
) -> tuple[Judgement, Evidence]:
    folder = out / claim.id
    swept = run_sweep(trial.sweep, folder, launcher=launcher, on_progress=report, runs_dir=POOL)
    if swept.failures:
        raise ValueError(f"{len(swept.failures)} jobs failed, first: {swept.failures[0]}")
    study = Study(folder)
    judgement = trial.criterion(read_results(study, trial))
    rows = study.rows()
    return judgement, Evidence(
        run_ids=[row.ref.run_id for row in rows],
        num_seeds=len(trial.sweep.seeds),
        config_digest=run_id(trial.sweep),
        core_s=sum(row.summary["seconds"] for row in rows),
    )


def _judge_lines(trial: LineTrial, out: Path, processes: int, report: OnProgress | None) -> tuple[Judgement, Evidence]:
    on_line = None if report is None else _line_progress(report)
    lines = STUDIES[trial.study](out / trial.study, processes=processes, on_progress=on_line)
    return trial.criterion(lines), Evidence(
        run_ids=[line["id"] for line in lines],
        num_seeds=len({line["seed"] for line in lines}),
        config_digest=lines[0]["code"],
        core_s=sum(line["seconds"] for line in lines),
    )


def _line_progress(report: OnProgress) -> OnLine:
    """Lines done and in all as a sweep's progress; the time left supposes that lines cost alike."""
    began, first = time.monotonic(), -1

    def tell(done: int, total: int) -> None:
        nonlocal first
        first = done if first < 0 else first
        elapsed, fresh = time.monotonic() - began, done - first
        left = 0.0 if done == total else elapsed * (total - done) / fresh if fresh else None
        report(SweepProgress(done, total, done / total, elapsed, left, "complete" if done == total else ""))

    return tell


def read_results(study: Study, trial: Trial) -> list[RunResult]:
    """The study's runs as the criterion sees them. Raises ValueError when one has not come to its end."""
    results = []
    for row in study.rows():
        if row.status not in ("finished", "diverged"):
            raise ValueError(f"run {row.ref.run_id} is {row.status}; judge when all runs are done")
        signals: dict[str, Signal] = {}
        if trial.signals:
            reader = study.reader(row.ref.run_id)
            names = reader.stat_names()
            for pattern in trial.signals:
                if fnmatch.filter(names, pattern):  # a criterion that needs it says so, naming the run
                    signals |= {
                        n: Signal(s.steps.tolist(), s.values.tolist()) for n, s in reader.stats(pattern).items()
                    }
        results.append(
            RunResult(
                size=row.ref.size,
                arm=row.ref.arm,
                lr=row.ref.lr,
                seed=row.ref.seed,
                num_params=row.summary["num_block_params"],
                initial_loss=row.summary["initial_loss"],
                final_loss=row.summary["final_loss"],
                signals=signals,
            )
        )
    return results


def _record(claim: Claim, judgement: Judgement, evidence: Evidence) -> Record:
    here = describe_environment()
    low, high = judgement.interval
    known = math.isfinite(low) and math.isfinite(high)
    return Record(
        id=claim.id,
        version=claim.version,
        scale="tiny",
        verdict=judgement.verdict,
        effect=_number(judgement.effect),
        interval=(_round(low), _round(high)) if known else None,
        meaning=judgement.meaning,
        detail={title: {key: _number(v) for key, v in table.items()} for title, table in judgement.detail.items()},
        statement=claim.statement,
        criterion=claim.criterion,
        num_seeds=evidence.num_seeds,
        run_ids=evidence.run_ids,
        config_digest=evidence.config_digest,
        core_s=_round(evidence.core_s),
        aftershock=__version__,
        torch=here["versions"]["torch"],
        machine={key: here[key] for key in ("platform", "cpu", "cores", "python")},
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        command=rerun_command(claim),
    )


def rerun_command(claim: Claim) -> str:
    """The command that judges the claim again."""
    return f"aftershock claims --run {claim.id}"


def _reporting(claim: Claim, on_progress: Progress | None) -> AbstractContextManager[OnProgress | None]:
    return contextlib.nullcontext() if on_progress is None else on_progress(claim.id)


def _number(value: float) -> float | None:
    return _round(value) if math.isfinite(value) else None


def _round(value: float) -> float:
    """Six digits: more than any interval here deserves, and short enough to read."""
    return float(f"{value:.6g}")
