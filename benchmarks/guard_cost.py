"""`python -m benchmarks.guard_cost`: what guarding a run costs, ours and rivals', as shares of the bare step.

All in one run. Nobody here touches forward or backward, so what is set against the bare loop is what comes after
backward. A step of the large model takes seconds: there a snapshot, a rewind and a checkpoint are timed on their own,
and their share of a step is their time over the 50 steps between two of them. Small models run whole cycles as well,
which checks that sum.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import guards, results
from benchmarks.guard_times import Kept, Once, Timed, build, count_waits, on_its_own, timed, whole_steps
from benchmarks.guards import EVERY, SAFETIES, Side
from benchmarks.tap_cost import SHAPES, STEPS, Training
from benchmarks.watchers import Missing

OURS, BY_HAND = "Aftershock Guard, default", "checkpoint and restart by hand"
CYCLES = {
    "tiny": (SHAPES["tiny"], tuple(SAFETIES)),
    "10M": (
        {"width": 256, "depth": 12, "heads": 4, "vocab_size": 4_096, "context": 128},
        ("bare", OURS, BY_HAND),
    ),
}
"""Shapes small enough for whole cycles, and who runs them."""
CYCLE = 2 * EVERY
WARM_UP = 10
"""Steps before the first timed one of a cycle: detectors are armed, moments are there."""
READING = f"""\
## Cost of guarding

Everybody has clipping to norm 1 and AdamW (fused, but for the skip-step rule, which needs an optimizer of its own).
`alone`: what comes after backward, on the same gradients, in turns, less what the bare loop takes for that; median,
with quartiles. `every {EVERY} steps`: one snapshot or checkpoint over {EVERY} bare steps. `whole step`: steps with
forward and backward, paired with the bare ones of the same round, which blurs what is added by how much such steps
differ for no reason. With one thread, times are processor time, which other programs on the machine blur least; those
of `torch.save`, `torch.load` and planted failures, which may wait for a disk, are wall time.
What the rows do is not the same: Lightning's rule finds a spike and stops the run, skip-step and ZClip treat one step,
a checkpoint by hand finds nothing. Targets of the guard: 2 % of the step at 100M parameters on a CPU, 1 % on a GPU; a
rewind within 3 steps' time.
"""


@contextlib.contextmanager
def attached(training: Training, names: tuple[str, ...]) -> Iterator[tuple[dict[str, Side], dict[str, str]]]:
    """All of `names` on one model, and those whose package is missing."""
    missing: dict[str, str] = {}
    sides: dict[str, Side] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name in names:
            try:
                sides[name] = stack.enter_context(SAFETIES[name](training, folder))
            except Missing as package:
                missing[name] = str(package)
        yield sides, missing


# ---- the large model


def large(shape: dict[str, int], *, rounds: int, autocast: bool, device: str) -> list[str]:
    """One model, everybody in turns; then snapshot, rewind and checkpoint on their own."""
    training = build(shape, autocast=autocast, device=device)
    kept = Kept(training)
    with attached(training, tuple(SAFETIES)) as (sides, missing):
        for side in sides.values():
            kept.finish(side)  # moments are made, the ring gets its first snapshot
        guard = sides[OURS].guard
        assert guard is not None
        shares = guards.Shares(guard)
        turns = 2 * rounds + 5
        alone = _in_turns(kept, sides, rounds=turns)
        parts = {name: seconds / turns for name, seconds in shares.seconds.items()}
        waits = {name: count_waits(kept, side) for name, side in sides.items()} if device == "cuda" else {}
        whole: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(rounds):
            for name, side in sides.items():
                whole[name].append(whole_steps(training, side).step_s)
                print(f"round {turn}: {name}: {whole[name][-1]:.4f} s a step", file=sys.stderr, flush=True)
    gc.collect()
    once = on_its_own(training, kept)
    step_s = statistics.median(whole["bare"])
    head = f"{_title(training)}: bare step {_seconds(step_s)}"
    lines = [f"| {head} | alone | every {EVERY} steps | sum | whole step |", "|---|---|---|---|---|"]
    for name in SAFETIES:
        if name in missing:
            lines.append(f"| {name} | not installed ({missing[name]}) | | | |")
        elif name != "bare":
            due_s = {OURS: once.take_s, BY_HAND: once.save_s}.get(name, 0.0) / EVERY
            lines.append(_row(name, alone, whole, step_s=step_s, due_s=due_s))
    lines += ["", *_of_the_guard(training, once, parts, step_s=step_s, bare_s=statistics.median(alone["bare"]))]
    if waits:
        lines += ["Waits of the host for the GPU a step: " + ", ".join(f"{n} {k}" for k, n in waits.items()) + "."]
    return [*lines, ""]


def _in_turns(kept: Kept, sides: dict[str, Side], *, rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            found[name].append(kept.finish(side))
    return found


# ---- whole cycles


def cycles(name: str, *, rounds: int, autocast: bool, device: str) -> list[str]:
    """Cycles of 100 steps, everybody on a model of their own, step by step in turns."""
    shape, names = CYCLES[name]
    found: dict[str, list[Timed]] = {}
    with contextlib.ExitStack() as stack:
        runs: dict[str, tuple[Training, Side]] = {}
        missing: dict[str, str] = {}
        for one in names:
            training = build(shape, autocast=autocast, device=device)
            sides, lacking = stack.enter_context(attached(training, (one,)))
            missing |= lacking
            if sides:
                runs[one] = training, sides[one]
        for training, side in runs.values():
            for _ in range(WARM_UP):
                whole_steps(training, side)
        take_s = _fill(runs[OURS])
        found = {one: [] for one in runs}
        for _ in range(rounds * CYCLE // STEPS[device]):
            for one, (training, side) in runs.items():
                found[one].append(whole_steps(training, side))
        training, side = runs[OURS]
        assert side.guard is not None
        report = side.guard.report()
    return [*_cycle_table(_title(training), found, missing, take_s=take_s), f"Its own report: {report}.", ""]


def _fill(run: tuple[Training, Side]) -> float:
    """All slots of the ring hold memory, as they do for all but the first steps of a run; seconds of a snapshot."""
    training, side = run
    guard = side.guard
    assert guard is not None
    took = []
    for back in reversed(range(2 * guard.recorder.slots)):
        step = guard.step_count - EVERY * back
        took.append(timed(training, lambda step=step: guard.recorder.take(step, 0)))
    return statistics.median(took[guard.recorder.slots :])


def _cycle_table(title: str, found: dict[str, list[Timed]], missing: dict[str, str], *, take_s: float) -> list[str]:
    bare = found["bare"]
    step_s, own_s = statistics.median(one.step_s for one in bare), [one.own_s for one in bare]
    lines = [
        f"| {title}: bare step {_seconds(step_s)} | usual step, alone | mean of whole cycles, alone | whole step |",
        "|---|---|---|---|",
    ]
    check = ""
    for name, steps in found.items():
        if name == "bare":
            continue
        extra = [one.own_s - own for one, own in zip(steps, own_s, strict=True)]
        usual, mean = statistics.median(extra), statistics.fmean(extra)
        whole = statistics.fmean(one.step_s for one in steps) / statistics.fmean(one.step_s for one in bare) - 1
        lines.append(f"| {name} | {_share(usual, step_s)} | {_share(mean, step_s)} | {whole:+.1%} |")
        if name == OURS:
            total = usual + take_s / EVERY
            check = (
                f"Check of the sum: a usual step and 1/{EVERY} of a snapshot ({_seconds(take_s)}) make "
                f"{_seconds(total)} a step; whole cycles took {_seconds(mean)}, {mean / total:.2f} times as much."
            )
    lines += [f"| {name} | not installed ({package}) | | |" for name, package in missing.items()]
    return [*lines, "", check, ""]


# ---- words


def lines(*, rounds: int, shape: str, device: str) -> list[str]:
    """Both precisions: float32 as a plain loop runs, and bf16 autocast, whose step is shorter."""
    told = [READING]
    for autocast in (False, True):
        told += large(SHAPES[shape], rounds=rounds, autocast=autocast, device=device)
        gc.collect()
    for name in CYCLES if shape != "tiny" else ("tiny",):
        for autocast in (False, True):
            told += cycles(name, rounds=3 if name == "tiny" else 1, autocast=autocast, device=device)
            gc.collect()
    if device == "cpu":
        told.append(
            "No GPU here: `--device cuda` times the same and counts how often the host waits for the device; never run."
        )
    return told


def _title(training: Training) -> str:
    tokens = training.ids_BT[:, 1:].numel()
    mode = "bf16 autocast" if training.autocast else "float32"
    return f"{training.num_parameters / 1e6:.3g}M parameters, {tokens:,} tokens, {mode}, {training.device}"


def _seconds(value: float) -> str:
    if abs(value) >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.3g} ms" if abs(value) >= 1e-3 else f"{value * 1e6:.0f} us"


def _share(value: float, step_s: float) -> str:
    return f"{value / step_s:+.2%} ({_seconds(value)})"


def _row(
    name: str, alone: dict[str, list[float]], whole: dict[str, list[float]], *, step_s: float, due_s: float
) -> str:
    extra = [own - bare for own, bare in zip(alone[name], alone["bare"], strict=True)]
    low, usual, high = statistics.quantiles(extra, n=4)
    ratios = [one / bare - 1 for one, bare in zip(whole[name], whole["bare"], strict=True)]
    spread = f"{statistics.median(ratios):+.1%} ({min(ratios):+.1%} to {max(ratios):+.1%})"
    due = _share(due_s, step_s) if due_s else "none"
    quartiles = f"{low / step_s:+.2%} to {high / step_s:+.2%}"
    return f"| {name} | {_share(usual, step_s)}; {quartiles} | {due} | {(usual + due_s) / step_s:+.2%} | {spread} |"


def _of_the_guard(
    training: Training, once: Once, parts: dict[str, float], *, step_s: float, bare_s: float
) -> list[str]:
    state = once.ring_bytes / 4 / training.num_parameters
    rows = {
        "before the optimizer: gradient norm, agreement, detectors, policy, clipping, sample": parts["begin"],
        "the optimizer itself": parts["optimize"],
        "after it: update norm, detector, policy": parts["end"],
        "the bare loop: clipping, the optimizer, clearing": bare_s,
        "a snapshot, memory at hand": once.take_s,
        "a snapshot into new memory (the first of a run)": once.first_s,
        "going back to a snapshot": once.restore_s,
        "the step that rewinds (default policy, third NaN loss in a row)": once.rewind_s,
        "the same with `folder=`": once.kept_s,
        "with `folder=`: the step that opens an incident and writes its snapshot to disk": once.incident_s,
        "by hand: `torch.save`": once.save_s,
        "by hand: `torch.load` and both `load_state_dict`": once.restart_s,
    }
    lines = ["| of that | seconds | bare steps |", "|---|---|---|"]
    lines += [f"| {what} | {_seconds(value)} | {value / step_s:.4f} |" for what, value in rows.items()]
    lines += [
        "",
        f"The ring holds {once.ring_bytes / 1e6:,.0f} MB in host memory: 4 slots of {state:.1f} bytes a parameter. A "
        f"checkpoint by hand is {once.checkpoint_bytes / 1e6:,.0f} MB on disk. A loop that does not clip has no norm "
        f"that the guard could share: all of its work, clipping included, and 1/{EVERY} of a snapshot are "
        f"{(parts['begin'] + parts['end'] + once.take_s / EVERY) / step_s:.2%} of the bare step.",
        "",
    ]
    return lines


def main() -> None:
    """Measure, print, and write the section of RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="whole steps of the large model that everybody takes")
    parser.add_argument("--shape", choices=SHAPES, default="100M", help="tiny: to try the command; nothing is written")
    parser.add_argument("--device", choices=STEPS, default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger("aftershock.guard").setLevel(logging.ERROR)  # the planted failures are told in the table
    found = lines(rounds=args.rounds, shape=args.shape, device=args.device)
    print("\n".join(found))
    if args.shape == "100M":
        results.write(found, mark=f"guard cost {args.device}")


if __name__ == "__main__":
    main()
