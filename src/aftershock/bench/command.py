"""`aftershock bench`: detectors, precursors, verdicts and the fault injection study, from the record or anew.

The pages are the report's, which this room may not import: whoever runs the command hands their writers in.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from tyro.conf import Positional, arg

if TYPE_CHECKING:
    from aftershock.bench.diagnosis_record import Diagnoses
    from aftershock.bench.precursors_record import Precursors
    from aftershock.bench.records import Record
    from aftershock.bench.survival_record import Study

RecordT = TypeVar("RecordT")
WritePage = Callable[["Record", Path], Path]
"""Writes the page of a record into a folder; returns its path. `report.detectors.write_detectors_page` is one."""
WriteStudyPage = Callable[["Study", Path], Path]
"""The same of the fault injection study: `report.survival.write_survival_page`."""


@dataclass(frozen=True)
class Bench:
    """What detectors or policies are worth on runs whose trouble is known: the record, or all of it again."""

    what: Positional[Literal["detectors", "guard", "replay", "precursors"]]
    """The benchmark of detectors, the fault injection study of the guard's policies, the benchmark of verdicts, or that
    of leading indicators and the live forecast."""
    out: Path = Path("out/bench")
    """Folder for the page, and with --rerun for runs and record; an interrupted run goes on from there."""
    rerun: bool = False
    """Train and judge everything again (half an hour to two hours on two cores), and write the record."""
    specimens: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = ()
    """Only these specimens of the zoo; such a record stays in --out."""
    policies: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = ()
    """Guard only: these policies; such a record stays in --out."""
    seeds: int | None = None
    """So many seeds of each specimen: 10 for detectors and precursors, half of them for tuning; 5 for the guard; 3 for
    replays."""
    processes: int = 2
    """Worker processes of one thread each."""
    json: bool = False
    """Print the record as JSON."""

    def run(self, write_page: WritePage, write_study_page: WriteStudyPage | None = None) -> int:
        """Exit status. Without `write_study_page` the study is printed only."""
        if self.what == "guard":
            return self._guard(write_study_page)
        if self.policies:
            raise ValueError("--policies is for the guard: aftershock bench guard")
        if self.what == "replay":
            return self._replay()
        if self.what == "precursors":
            return self._precursors()
        from aftershock.bench.records import read_record
        from aftershock.bench.table import print_record, record_json

        record = self._again() if self.rerun else read_record(self.out)
        page = write_page(record, self.out)
        if self.json:
            sys.stdout.write(record_json(record) + "\n")
        else:
            print_record(record)
            sys.stdout.write(f"\npage: {page}\n")
        return 0

    def _guard(self, write_page: WriteStudyPage | None) -> int:
        from aftershock.bench.survival_record import read_study, study_json
        from aftershock.bench.survival_table import print_study

        study = self._study_again() if self.rerun else read_study(self.out)
        page = None if write_page is None else write_page(study, self.out)
        if self.json:
            sys.stdout.write(study_json(study) + "\n")
            return 0
        print_study(study)
        if page is not None:
            sys.stdout.write(f"\npage: {page}\n")
        return 0

    def _replay(self) -> int:
        from aftershock.bench.diagnosis_record import read_diagnoses
        from aftershock.bench.diagnosis_table import diagnoses_json, print_diagnoses

        record = self._diagnoses_again() if self.rerun else read_diagnoses(self.out)
        if self.json:
            sys.stdout.write(diagnoses_json(record) + "\n")
        else:
            print_diagnoses(record)
        return 0

    def _diagnoses_again(self) -> Diagnoses:
        from aftershock.bench.diagnosis import JUDGED, diagnose_zoo
        from aftershock.bench.diagnosis_record import make_record, write_diagnoses
        from aftershock.lab.zoo.registry import UNSEEN

        count = len(JUDGED) if self.seeds is None else self.seeds
        most = 10 - JUDGED[0]
        if not 1 <= count <= most:
            raise ValueError(
                f"seeds must be 1 to {most}, got {count}: the first {JUDGED[0]} built the signature matrix"
            )
        found = diagnose_zoo(
            self.out,
            specimens=self.specimens,
            seeds=range(JUDGED[0], JUDGED[0] + count),
            processes=self.processes,
            on_progress=_Lines("incidents judged"),
        )
        command = f"aftershock bench replay --rerun{'' if self.seeds is None else f' --seeds {self.seeds}'}"
        record = make_record(found, unseen=tuple(UNSEEN), command=command)
        self._keep(write_diagnoses, record, whole=not self.specimens)
        return record

    def _precursors(self) -> int:
        from aftershock.bench.precursors_record import read_precursors
        from aftershock.bench.precursors_table import precursors_json, print_precursors

        record = self._precursors_again() if self.rerun else read_precursors(self.out)
        if self.json:
            sys.stdout.write(precursors_json(record) + "\n")
        else:
            print_precursors(record)
        return 0

    def _precursors_again(self) -> Precursors:
        """Record and models of the live forecast; those of the whole zoo become the package's own in a checkout."""
        from aftershock.bench.detectors import halves
        from aftershock.bench.precursors_record import write_precursors
        from aftershock.bench.precursors_run import Phases, run_precursors
        from aftershock.forecast import hazard

        tuning, scoring = halves(self.seeds)
        found = run_precursors(
            self.out,
            specimens=self.specimens,
            tuning_seeds=tuning,
            scoring_seeds=scoring,
            processes=self.processes,
            on_progress=Phases(*map(_Lines, ("runs trained", "runs read", "forecasts fitted", "indicators judged"))),
        )
        made = {name: getattr(found.record, name) for name in ("command", "date", "tuning_seeds")}
        self._keep(write_precursors, found.record, whole=not self.specimens)
        hazard.write_hazards(self.out, found.hazards, made=made)
        own = hazard.checkout_folder()
        if own is not None and not self.specimens:
            hazard.write_hazards(own, found.hazards, made=made)
        return found.record

    def _study_again(self) -> Study:
        from aftershock.bench.survival_record import write_study
        from aftershock.bench.survival_study import run_study

        study = run_study(
            self.out,
            specimens=self.specimens,
            policies=self.policies,
            seeds=self.seeds,
            processes=self.processes,
            on_progress=_Lines("runs trained"),
        )
        self._keep(write_study, study, whole=not (self.specimens or self.policies))
        return study

    def _again(self) -> Record:
        from aftershock.bench.detectors import Phases, halves, run_benchmark
        from aftershock.bench.records import write_record

        tuning, scoring = halves(self.seeds)
        record = run_benchmark(
            self.out,
            specimens=self.specimens,
            tuning_seeds=tuning,
            scoring_seeds=scoring,
            processes=self.processes,
            on_progress=Phases(_Lines("runs trained"), _Lines("runs judged")),
        )
        self._keep(write_record, record, whole=not self.specimens)
        return record

    def _keep(self, write: Callable[[Path, RecordT], object], record: RecordT, *, whole: bool) -> None:
        """In --out; that of the whole zoo becomes the package's own too, in a checkout."""
        from aftershock.bench.records import checkout_folder

        write(self.out, record)
        own = checkout_folder()
        if own is not None and whole:
            write(own, record)


class _Lines:
    """Progress on the error stream: a line each tenth of the way."""

    def __init__(self, what: str) -> None:
        self._what, self._next = what, 0.0

    def __call__(self, done: int, total: int) -> None:
        if done >= self._next * total:
            sys.stderr.write(f"{done}/{total} {self._what}\n")
            self._next = (10 * done // total + 1) / 10
