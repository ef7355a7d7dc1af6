"""`aftershock bench`: the benchmark of detectors, from the record or run again.

The page is the report's, which this room may not import: whoever runs the command hands its writer in.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

if TYPE_CHECKING:
    from aftershock.bench.records import Record

WritePage = Callable[["Record", Path], Path]
"""Writes the page of a record into a folder; returns its path. `report.detectors.write_detectors_page` is one."""


@dataclass(frozen=True)
class Bench:
    """What detectors are worth on runs whose trouble is known: the record, or the whole benchmark again."""

    what: Positional[Literal["detectors"]]
    """The benchmark: detectors."""
    out: Path = Path("out/bench")
    """Folder for the page, and with --rerun for runs and record; an interrupted run goes on from there."""
    rerun: bool = False
    """Train the corpus and judge every detector again (about half an hour on two cores), and write the record."""
    specimens: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = ()
    """Only these specimens of the zoo; such a record stays in --out."""
    processes: int = 2
    """Worker processes of one thread each."""
    json: bool = False
    """Print the record as JSON."""

    def run(self, write_page: WritePage) -> int:
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

    def _again(self) -> Record:
        from aftershock.bench.detectors import Phases, run_benchmark
        from aftershock.bench.records import checkout_folder, write_record

        record = run_benchmark(
            self.out,
            specimens=self.specimens,
            processes=self.processes,
            on_progress=Phases(_Lines("runs trained"), _Lines("runs judged")),
        )
        write_record(self.out, record)
        own = checkout_folder()
        if own is not None and not self.specimens:
            write_record(own, record)
        return record


class _Lines:
    """Progress on the error stream: a line each tenth of the way."""

    def __init__(self, what: str) -> None:
        self._what, self._next = what, 0.0

    def __call__(self, done: int, total: int) -> None:
        if done >= self._next * total:
            sys.stderr.write(f"{done}/{total} {self._what}\n")
            self._next = (10 * done // total + 1) / 10
