"""`python -m benchmarks.replay_grid`: the default grid of about 40 cells on incidents of the zoo, ours against one cell
after another from the recorded snapshot, each at full length in one process. In one run, in turns.

Ours stops a cell whose answer is clear, runs a shared prefix once, and works on two cores. The answers must agree: a
spike that the full replay has, the stopped one must have too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import NamedTuple

import torch

from aftershock.bench.diagnosis import capture
from aftershock.lab.zoo.registry import specimen
from aftershock.replay.cells import default_grid
from aftershock.replay.controls import control_cells
from aftershock.replay.runner import CellResult, run_cell, run_grid
from aftershock.replay.subject import Subject
from benchmarks import machine, results

SPECIMENS = ("lag_99", "slingshot", "repeated_ngrams")
READING = """\
## Replaying a grid of cells

The default grid and three controls on one incident each. `one after another`: every cell at full length, ten spike
lengths past the spike, in one process from the recorded snapshot. Targets: at most 300 s, at most 0.25 of that time.
`steps run`: of the steps of all cells at full length, those that ours takes; with two processes the ratio cannot be
below half of that, whatever a step costs. `other answer`: cells that were stopped early and whose full replay answers
otherwise whether the spike is there: it goes on for ten spike lengths and may meet the run's next spike.
"""


class Timed(NamedTuple):
    """Seconds of both ways, the share of the steps that ours takes, and how many answers differ."""

    name: str
    cells: int
    ours_s: float
    slow_s: float
    steps: float
    differ: int


def measure(name: str, *, seed: int, processes: int) -> Timed:
    """One incident, ours first."""
    subject = capture(specimen(name), seed)
    if subject is None:
        raise SystemExit(f"{name} did not spike with seed {seed}")
    cells = [*control_cells(), *default_grid(subject)[1:]]
    begun = time.perf_counter()
    ours = {result.name: result for result in run_grid(subject, cells, processes=processes)}
    ours_s = time.perf_counter() - begun
    begun = time.perf_counter()
    slow = {cell.name: run_cell(subject, cell, stop_early=False) for cell in cells}
    slow_s = time.perf_counter() - begun
    taken = sum(len(one.losses) - max(0, one.since - one.first) for one in ours.values())
    steps = taken / sum(len(one.losses) for one in slow.values())
    differ = sum(_present(subject, ours[one]) != _present(subject, slow[one]) for one in slow)
    return Timed(name, len(cells), ours_s, slow_s, steps, differ)


def _present(subject: Subject, result: CellResult) -> bool | None:
    response = result.response(subject.baseline)
    return None if response is None else response.present


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--specimens", nargs="*", default=list(SPECIMENS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    done = [measure(name, seed=arguments.seed, processes=arguments.processes) for name in arguments.specimens]
    lines = [
        READING,
        machine.line(),
        "",
        "| incident | cells | ours, s | one after another, s | ratio | steps run | other answer |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {one.name} | {one.cells} | {one.ours_s:.1f} | {one.slow_s:.1f} | {one.ours_s / one.slow_s:.2f} | "
            f"{one.steps:.2f} | {one.differ} |"
            for one in done
        ),
        "",
        f"Median ratio {statistics.median(one.ours_s / one.slow_s for one in done):.2f}.",
        "",
    ]
    print("\n".join(lines))
    if arguments.specimens == list(SPECIMENS):
        results.write(lines, mark="replay grid")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
