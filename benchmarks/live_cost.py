"""`python -m benchmarks.live_cost`: what the live forecast costs beside a training step, in one run.

Steps and thousands of updates of the forecast in turns, on one core; the forecast is of a run that is long under way,
so that its windows are full, and now and then a value is far out, so that reasons are made too. All updates are set
against the shortest of the steps, which is the hardest for them.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys

import torch

from aftershock.forecast.hazard import SHIPPED, Slot
from aftershock.forecast.live import LiveForecast
from benchmarks import machine, results
from benchmarks.tap_cost import SHAPES, Training
from benchmarks.watchers import WATCHERS

UPDATES = 1000
ODD_EVERY = 100
"""Every so many values one is 20 times the usual."""
TARGET = 0.001
READING = """\
## Cost of the live forecast

One update a step, set against the shortest step of the rounds: median, with the smallest and the largest update.
Target: 0.1 % of a step. Reading loss and norms off the device is the trainer's own business and not in it.
"""


class Updates:
    """A forecast under way from some of the signals, and the rows that it is given over and over."""

    def __init__(self, signals: tuple[Slot, ...]) -> None:
        rng = random.Random(0)
        self._live, self._step = LiveForecast(), 0
        self._rows: list[dict[str, float]] = [
            {slot: rng.lognormvariate(0, 0.1) * (20 if step % ODD_EVERY == ODD_EVERY - 1 else 1) for slot in signals}
            for step in range(UPDATES)
        ]
        self.seconds()

    def seconds(self) -> float:
        """Of one update, the mean of a thousand."""
        started = machine.host_s()
        for row in self._rows:
            self._live.update(self._step, row)
            self._step += 1
        return (machine.host_s() - started) / UPDATES


def measure(shape: str, *, rounds: int) -> list[str]:
    """One table: the sets of signals in turns beside a bare step, `rounds` times."""
    training = Training(SHAPES[shape], autocast=False, device="cpu")
    forecasts = {signals: Updates(signals) for signals in SHIPPED}
    step_s: list[float] = []
    update_s: dict[tuple[Slot, ...], list[float]] = {signals: [] for signals in SHIPPED}
    with WATCHERS["bare"](training.model, training.optimizer, training.clock) as hooks:
        training.step(hooks, 0)
        for turn in range(rounds):
            started = machine.host_s()
            training.step(hooks, turn)
            step_s.append(machine.host_s() - started)
            for signals, updates in forecasts.items():
                update_s[signals].append(updates.seconds())
            print(f"round {turn}: {step_s[-1]}, {[several[-1] for several in update_s.values()]}", file=sys.stderr)
    title = f"{training.num_parameters / 1e6:.1f}M parameters, shortest step {min(step_s) * 1e3:,.0f} ms"
    lines = [f"| {title} | microseconds an update | share of the step | target 0.1 % |", "|---|---|---|---|"]
    for signals, several in update_s.items():
        low, middle, high = (x / min(step_s) for x in (min(several), statistics.median(several), max(several)))
        micro, told = statistics.median(several) * 1e6, "met" if middle < TARGET else "missed"
        lines.append(f"| {', '.join(signals)} | {micro:.1f} | {middle:.5%} ({low:.5%} to {high:.5%}) | {told} |")
    return [*lines, ""]


def main() -> None:
    """Measure, print, and write the section of RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="turns every set of signals is measured in")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="fewer: nothing is written")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = [READING, *(line for shape in args.shapes for line in measure(shape, rounds=args.rounds))]
    print("\n".join(lines))
    if set(args.shapes) == set(SHAPES):
        results.write(lines, mark="live cost")


if __name__ == "__main__":
    main()
