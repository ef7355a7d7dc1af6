"""From a claim to its record: do what is missing of its study, read what it found, apply the criterion, write it down.

A study is a sweep, whose runs a criterion reads, or makes JSON lines; tables of scores are the user's, and need none.
Must not import torch: jobs do.
"""

from __future__ import annotations

import contextlib
import datetime
import fnmatch
import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, Protocol

from aftershock._version import __version__
from aftershock.claims.arms_study import run_arms_study
from aftershock.claims.catalog import choose_claims
from aftershock.claims.claim import Claim, Judgement, Line, LineTrial, Record, RunResult, ScoreTrial, Signal, Trial
from aftershock.claims.counted import run_counted
from aftershock.claims.emergence_criteria import load_scores
from aftershock.claims.foretold import COMMITTED, commit_forecast, refuse_late_forecast
from aftershock.claims.incidents import run_incidents
from aftershock.claims.lines import OnLine
from aftershock.claims.records import checkout_folder, keep_beside, write_record
from aftershock.config import run_id
from aftershock.lab.launch import LocalLauncher
from aftershock.lab.sweep import OnProgress, SweepProgress, SweepSpec, run_sweep
from aftershock.store.environment import describe_environment
from aftershock.store.study import Study

RUNS = "runs"
"""Every study's runs lie in one folder beside the studies, so that claims share them."""
TINY, PUBLIC = "tiny", "public"
"""Scales: runs of our own, and models that others published."""

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
    scale: str = TINY


def judge_all(
    ids: str | Sequence[str],
    out: str | Path,
    *,
    processes: int = 0,
    on_progress: Progress | None = None,
    records: str | Path | None = None,
    scores: str | Path | None = None,
) -> list[Record]:
    """Judge these claims (`all`: every one that has a study) and write their records; returns them in that order.

    `scores` is the folder of the tables that some claims are judged on (`ScoreTrial`); without it, `all` leaves these
    claims out.

    Study `P1` lies in `out/P1`, and the runs of all sweeps in `out/runs`; studies of lines in `out/incidents` and the
    like. What is there is not done again. A record goes to the folder `records`: by default the package's own in a
    source checkout, else `out/records`; a forecast that a study committed is copied to a folder beside its record.
    `processes` as in `LocalLauncher`, 0 takes one a core.

    Raises ValueError for an unknown id, a claim without a study, missing tables or a folder of tables that no claim
    asks for, before anything is trained. A claim that cannot be judged does not stop the others: its ValueError comes
    at the end, with all reasons in one sentence.
    """
    scores = None if scores is None else Path(scores)
    chosen = choose_claims(ids, with_scores=scores is not None)
    _check_scores(chosen, scores)
    if scores is not None and not any(isinstance(claim.trial, ScoreTrial) for claim in chosen):
        names = ", ".join(claim.id for claim in chosen)
        raise ValueError(f"--scores {scores} has no use here: of {names} none is judged on benchmark scores")
    out = Path(out)
    folder = Path(records) if records is not None else checkout_folder() or out / "records"
    done: list[Record] = []
    problems: list[str] = []
    for claim in chosen:
        try:
            record = judge(claim, out, processes=processes, on_progress=on_progress, scores=scores)
            path = write_record(folder, record)
            if isinstance(claim.trial, Trial) and claim.trial.forecast is not None:
                keep_beside(path, out / claim.id / COMMITTED)
            done.append(record)
        except ValueError as error:
            problems.append(f"{claim.id} could not be judged: {error}")
    if problems:
        raise ValueError("; ".join(problems))
    return done


def judge(
    claim: Claim,
    out: Path,
    *,
    processes: int = 0,
    on_progress: Progress | None = None,
    scores: Path | None = None,
) -> Record:
    """Do what is missing of one claim's study in `out`, and judge it. Writes no record.

    Raises ValueError when the claim has no study, a run failed to train, a forecast comes too late, a table of
    `scores` is missing or damaged, or the criterion has nothing to compare.
    """
    if claim.trial is None:
        raise ValueError(f"claim {claim.id} has no study yet")
    _check_scores([claim], scores)
    launcher = LocalLauncher(num_processes=processes)
    with _reporting(claim, on_progress) as report:
        if isinstance(claim.trial, LineTrial):
            found = _judge_lines(claim.trial, out, launcher.max_parallel, report)
        elif isinstance(claim.trial, ScoreTrial):
            assert scores is not None  # checked above
            found = _judge_scores(claim.trial, scores)
        else:
            found = _judge_sweep(claim, claim.trial, out, launcher, report)
    return _record(claim, *found)


def _judge_sweep(
    claim: Claim, trial: Trial, out: Path, launcher: LocalLauncher, report: OnProgress | None
) -> tuple[Judgement, Evidence]:
    folder = out / claim.id
    if trial.forecast is not None:
        refuse_late_forecast(trial, folder, runs=out / RUNS)
        _train(trial.forecast.sweep, folder, launcher, report)
        commit_forecast(trial.forecast, read_results(Study(folder), trial), folder)
    _train(trial.sweep, folder, launcher, report)
    study = Study(folder)
    judgement = trial.criterion(read_results(study, trial))
    rows = study.rows()
    return judgement, Evidence(
        run_ids=[row.ref.run_id for row in rows],
        num_seeds=len(trial.sweep.seeds),
        config_digest=run_id(trial.sweep),
        core_s=sum(row.summary["seconds"] for row in rows),
    )


def _train(sweep: SweepSpec, folder: Path, launcher: LocalLauncher, report: OnProgress | None) -> None:
    swept = run_sweep(sweep, folder, launcher=launcher, on_progress=report, runs_dir=f"../{RUNS}")
    if swept.failures:
        raise ValueError(f"{len(swept.failures)} jobs failed, first: {swept.failures[0]}")


def _check_scores(claims: Sequence[Claim], scores: Path | None) -> None:
    """Raises ValueError where a table that one of these claims is judged on is not there."""
    asking = {claim.id: claim.trial.files for claim in claims if isinstance(claim.trial, ScoreTrial)}
    wanted = list(dict.fromkeys(name for files in asking.values() for name in files))
    missing = [name for name in wanted if scores is None or not (scores / name).is_file()]
    if missing:
        given = "" if scores is None else f"; {scores} has no {' and no '.join(missing)}"
        raise ValueError(
            f"{', '.join(asking)} {'is' if len(asking) == 1 else 'are'} judged on benchmark scores, which do not come "
            f"with the package: give the folder that holds {' and '.join(wanted)} as --scores FOLDER{given}"
        )


def _judge_scores(trial: ScoreTrial, scores: Path) -> tuple[Judgement, Evidence]:
    """The digest is sha256 of the files one after another: `cat FILE ... | sha256sum`. Nothing was trained."""
    began = time.process_time()
    judgement = trial.criterion(load_scores(scores, trial.files))
    digest = hashlib.sha256(b"".join((scores / name).read_bytes() for name in trial.files)).hexdigest()
    return judgement, Evidence(
        run_ids=[], num_seeds=0, config_digest=digest, core_s=time.process_time() - began, scale=PUBLIC
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
        scale=evidence.scale,
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
    """The command that judges the claim again; FOLDER is where the user's tables of scores lie."""
    return f"aftershock claims --run {claim.id}" + (" --scores FOLDER" if isinstance(claim.trial, ScoreTrial) else "")


def _reporting(claim: Claim, on_progress: Progress | None) -> AbstractContextManager[OnProgress | None]:
    return contextlib.nullcontext() if on_progress is None else on_progress(claim.id)


def _number(value: float) -> float | None:
    return _round(value) if math.isfinite(value) else None


def _round(value: float) -> float:
    """Six digits: more than any interval here deserves, and short enough to read."""
    return float(f"{value:.6g}")
