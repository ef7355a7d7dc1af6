"""A contract suite for training loops with a guard: plants faults in *your* loop and reports what came of each.

    from aftershock.testing import check_guard

    def train(Guard):
        model, optimizer, loader = ...
        guard = Guard(model, optimizer, clip_norm=1.0)
        for batch in guard.batches(loader):
            loss = model(batch).loss
            loss.backward()
            guard.step(loss)

    check_guard(train, strict=True)

Must not import the lab: what is tested is your loop, not ours.
"""

from __future__ import annotations

import contextlib
import math
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from aftershock.testing.faults import FAULTS, Fault, Parts, Planter
from aftershock.testing.stands import Guarded, Plain, Stand
from aftershock.workload import Workload

Train = Callable[[Any], object]
"""Your training from beginning to end, with the class `Guard` as its argument."""

Response = Literal["skipped", "rewound", "scaled", "stopped", "reported", "missed", "-"]
"""The strongest thing that the guard did; "reported": said, not acted on; "-": the fault does not apply."""

LEAST_STEPS = 60
"""A detector needs steps to know what is normal, and a run steps to recover."""
TAIL = 10
"""Last accepted steps whose median training loss is the score of a run."""
_STRENGTH: dict[str, Response] = {
    "stop": "stopped",
    "rewind": "rewound",
    "skip": "skipped",
    "scale_lr": "scaled",
    "policy": "scaled",
    "alarm": "reported",
    "nonfinite": "reported",
}
_ACTS = ("stop", "rewind", "skip", "scale_lr", "policy")


class Check(NamedTuple):
    """One fault in your loop. Scores are medians of the last ten training losses; None: not finite.

    - `lost`: batches that became no step; `finite`: every weight at the end
    - `clean`: the score of the clean run after as many accepted steps; `recovered`: `score` is no worse, within the
      tolerance; `unguarded`: the score of the same run without a guard
    """

    fault: str
    response: Response
    finite: bool
    recovered: bool
    score: float | None
    clean: float | None
    unguarded: float | None
    lost: int

    @property
    def passed(self) -> bool:
        return self.response == "-" or (self.finite and self.recovered and self.response != "stopped")


class Checks(NamedTuple):
    """What `check_guard` found. `untouched`: the guarded clean run has the bits of the plain one."""

    faults: tuple[Check, ...]
    untouched: bool
    false: tuple[str, ...]
    """What the guard did on the clean run, in its words."""
    clean: float | None
    steps: int

    @property
    def failures(self) -> list[str]:
        """What is wrong, in sentences; empty when all is well."""
        found = [] if self.untouched else ["a clean run does not end with the same bits as without the guard"]
        found += [f"on the clean run: {what}" for what in self.false]
        return found + [
            f"{one.fault}: {one.response}, weights {'' if one.finite else 'not '}finite, score {_figure(one.score)} "
            f"(clean {_figure(one.clean)})"
            for one in self.faults
            if not one.passed
        ]

    def table(self) -> str:
        """A line for each fault."""
        clean = "untouched, bit for bit" if self.untouched else "CHANGED"
        rows = [("fault", "guard", "weights", "score", "clean", "unguarded", "lost", "")]
        own = _figure(self.clean)
        rows += [("none", clean if not self.false else self.false[0], "finite", own, own, own, "0", "")]
        rows += [
            (one.fault, "does not apply", "", "", "", "", "", "")
            if one.response == "-"
            else (
                one.fault,
                one.response,
                "finite" if one.finite else "NOT FINITE",
                _figure(one.score),
                _figure(one.clean),
                _figure(one.unguarded),
                str(one.lost),
                "" if one.passed else "FAILED",
            )
            for one in self.faults
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join(
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )


def check_guard(
    train: Train,
    *,
    faults: Sequence[str] = (),
    folder: str | Path | None = None,
    tolerance: float = 0.1,
    seed: int = 0,
    strict: bool = False,
    show: bool = True,
) -> Checks:
    """Run `train` clean and with each fault, guarded and not, and print what the guard did.

    `train(Guard)` builds everything anew, makes one guard by calling its argument as it would `aftershock.Guard`, and
    trains to the end. At least 60 steps; it is run twice for each fault and three times more, so make it short. Random
    numbers of python, numpy and torch start at `seed` each time. Faults come at half of the steps:

    - `nan_loss`, `nan_gradient` (one element), `inf_gradient` (one tensor), `gradient_spike` (all x 1,000): one step
    - `garbage_batches`: three batches of noise, of shuffled numbers where they are integers; needs `guard.batches`
    - `rate_jump`: rates x 30, until your scheduler sets them; `lost_second_moment`: Adam's squares become zeros
    - `flipped_bit`: one weight x 2^64; `nonfinite_weight`: one weight becomes NaN

    - `faults`: only these; `folder`: each run's events and incidents go to a folder of its own in it, else nowhere
    - `tolerance`: share by which the score, the median of the last ten training losses, may be worse than that of the
      clean run after as many accepted steps
    - `strict`: raise AssertionError when something is wrong

    Raises ValueError for a loop that is too short, makes no guard or several, or is not reproducible.

    Example:
        check_guard(loop_of(build, steps=200), strict=True)
    """
    for name in faults:
        if name not in FAULTS:
            raise ValueError(f"no fault {name!r}; there are {', '.join(FAULTS)}")
    place = None if folder is None else Path(folder)
    plain = _run(train, seed, None, at=-1, guarded=False, folder=None)
    if plain.steps < LEAST_STEPS:
        raise ValueError(f"the loop takes {plain.steps} steps; make it at least {LEAST_STEPS}, and half to recover in")
    if not _same(plain.end, _run(train, seed, None, at=-1, guarded=False, folder=None).end):
        raise ValueError(
            "two plain runs of the loop do not end with the same bits, so nothing can be said of a third; build model "
            "and data inside of train, and seed generators of your own"
        )
    clean = _run(train, seed, None, at=-1, guarded=True, folder=place and place / "clean")
    at = plain.steps // 2
    found = []
    for name in faults or tuple(FAULTS):
        guarded = _run(train, seed, FAULTS[name], at=at, guarded=True, folder=place and place / name)
        if not guarded.planted:
            found.append(Check(name, "-", True, True, None, None, None, 0))
            continue
        bare = _run(train, seed, FAULTS[name], at=at, guarded=False, folder=None)
        found.append(_check(name, guarded, bare, plain, tolerance))
    checks = Checks(tuple(found), _same(plain.end, clean.end), tuple(clean.done), plain.score(), plain.steps)
    if show:
        sys.stdout.write(checks.table() + "\n")
    if strict and checks.failures:
        raise AssertionError("the guarded loop fails:\n" + "\n".join(checks.failures))
    return checks


def loop_of(build: Callable[[], Workload], *, steps: int) -> Train:
    """The plain loop over a `Workload`, for `check_guard`: `build()` makes it anew, `steps` is how many batches."""

    def train(guard_class: Any) -> None:
        work = build()
        guard = guard_class(work.model, work.optimizer, scheduler=work.scheduler, clip_norm=work.clip_norm)
        for index in guard.batches([work.batch(i) for i in range(steps)]):
            loss = _backward(work, index)
            guard.step(loss)

    return train


def _backward(work: Workload, batch: Any) -> Tensor:
    total = torch.zeros(())
    for part in batch if work.accumulate > 1 else [batch]:
        loss = work.loss(work.model, part) / work.accumulate
        loss.backward()
        total = total + loss.detach()
    return total


# ------------------------------------------------------------------------------------------------------------- a run


class _Trained(NamedTuple):
    """One run of the user's loop. `end`: its weights and optimizer state; `done`: what the guard did, in words."""

    end: list[Tensor]
    losses: dict[int, float]
    steps: int
    batches: int
    finite: bool
    stopped: bool
    response: Response
    done: list[str]
    planted: bool

    def score(self, steps: int | None = None) -> float | None:
        """At the end, or after so many accepted steps."""
        until = self.steps if steps is None else steps
        tail = [self.losses[step] for step in range(max(0, until - TAIL), until) if step in self.losses]
        whole = bool(tail) and (self.finite or steps is not None) and all(map(math.isfinite, tail))
        return statistics.median(tail) if whole else None


def _run(train: Train, seed: int, fault: Fault | None, *, at: int, guarded: bool, folder: Path | None) -> _Trained:
    made: list[Stand] = []

    def attach(model: nn.Module, optimizer: Optimizer, **settings: Any) -> Stand:
        if made:
            raise ValueError("the loop makes several guards; check_guard follows one")
        kind = Guarded if guarded else Plain
        made.append(kind(Planter(Parts(model, optimizer), fault, at), settings | {"folder": folder}))
        return made[0]

    with _seeded(seed):
        train(attach)
    if not made:
        raise ValueError("the loop makes no guard; call train's argument where you would call aftershock.Guard")
    stand = made[0]
    stand.close()
    model, optimizer = stand.planter.parts
    finite = all(bool(torch.isfinite(p).all()) for p in model.parameters())
    state = [v for one in optimizer.state.values() for v in one.values() if isinstance(v, Tensor)]
    kinds = [event["kind"] for event in stand.events]
    strongest: list[Response] = [word for kind, word in _STRENGTH.items() if kind in kinds]
    return _Trained(
        end=[value.detach().clone() for value in (*model.parameters(), *model.buffers(), *state)],
        losses=stand.losses,
        steps=stand.step_count,
        batches=stand.calls,
        finite=finite,
        stopped=stand.stopped is not None,
        response=strongest[0] if strongest else "missed",
        done=[f"{e['kind']} at step {e['step']}: {e.get('reason', '')}" for e in stand.events if e["kind"] in _ACTS],
        planted=stand.planter.planted,
    )


def _check(name: str, guarded: _Trained, bare: _Trained, clean: _Trained, tolerance: float) -> Check:
    score, usual = guarded.score(), clean.score(guarded.steps)
    recovered = score is not None and usual is not None and score <= usual + tolerance * abs(usual)
    lost = guarded.batches - guarded.steps
    return Check(name, guarded.response, guarded.finite, recovered, score, usual, bare.score(), lost)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Python's, numpy's and torch's random numbers start at `seed`, and are put back."""
    own, theirs = random.getstate(), np.random.get_state()  # noqa: NPY002 (the user's loop may use the global one)
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(own)
            np.random.set_state(theirs)  # noqa: NPY002


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _figure(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"
