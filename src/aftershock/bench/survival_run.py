"""One run of the fault injection study: a specimen of the zoo in a plain loop, with a guard and one policy, or without.

Batches are numbered 0, 1, 2 ... for ever; a step that is skipped or taken back costs batches, and the run ends after as
many accepted steps as the specimen has. Imports torch in functions; must not judge a run: see `survival`.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from aftershock.guard.policy import Policy
    from aftershock.lab.zoo.specimen import Specimen, Trial
    from aftershock.workload import Workload

UNGUARDED, FAULT_FREE = "unguarded", "fault_free"
"""The two runs without a guard: with the fault, and the twin from which it is left out."""
SHIFTED, SHIFT = "fault_free_shifted", 3
"""A fault-free twin that leaves out so many batches at the onset, as a guard that skips them does. What it differs by
from the twin is the noise of the data's order, and no harm of the fault."""
NUDGED = "unguarded_nudged"
"""An unguarded run whose weights begin one unit in the last place off: how far chaos alone moves the end of a run that
spikes by itself. It is the sham of every remedy."""
REFERENCES = (UNGUARDED, FAULT_FREE, SHIFTED, NUDGED)
REFERENCES_OF = {"planted": REFERENCES[:3], "spontaneous": (UNGUARDED, NUDGED), "healthy": (UNGUARDED,)}
"""The runs that a guarded one is compared with, by kind of specimen."""
SETTINGS: Mapping[str, Mapping[str, Any]] = {"beta_switch": {"beta2": 0.9}, "eps_switch": {"eps": 1e-6}}
"""Of the policies that say nothing of how much; each other has its own defaults."""
INTERVENTIONS = ("skip", "scale_lr", "rewind", "stop", "policy")
"""Events by which the guard changed the run."""
TAIL = 20
"""Last accepted steps whose median training loss stands for the end of a run."""
READINGS, READ_EVERY = 16, 5
"""The held-out loss at the end of a run is the median of so many readings, so many accepted steps apart: from step to
step it moves by several percent, and one reading would tell the step it fell on rather than the run."""
PATIENCE = 3
"""A run that used so many times its steps in batches without getting to its end is given up."""
MOST_EVENTS = 40


class Happened(NamedTuple):
    """One thing that the guard did or saw. `step`: accepted steps before it; `batch_id`: of the batch it was about."""

    kind: str
    step: int
    batch_id: int
    reason: str


class Ended(NamedTuple):
    """How one run ended. A loss that is not finite, or that was never read, is None.

    - `steps`: accepted ones at the end; `batches`: forward and backward passes, so `batches - steps` were for nothing
    - `held_out`: median of the last readings; `tail`: median of the last training losses
    - `finite`: weights and last loss; `stopped`: why the guard ended the run, if it did
    - `counts`: events by kind, `events` the first of them; `early`: interventions before the onset of a planted fault
    """

    specimen: str
    policy: str
    seed: int
    steps: int
    batches: int
    has_held_out: bool
    held_out: float | None
    tail: float | None
    finite: bool
    stopped: str | None
    counts: dict[str, int]
    early: int
    events: list[Happened]
    seconds: float


def train(
    specimen: Specimen,
    *,
    policy: str | Policy,
    seed: int,
    settings: Mapping[str, Any] | None = None,
    steps: int | None = None,
) -> Ended:
    """Train a specimen under `policy` (a name of `POLICIES` with `settings` of it, one of `REFERENCES`, or a policy).

    Random numbers are torch's, started at `seed` and put back. Raises ValueError for an unknown policy or setting.

    Example:
        train(specimen("flipped_bit"), policy="ladder", seed=0).held_out
    """
    import torch

    began = time.monotonic()
    length = specimen.steps if steps is None else steps
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        trial = specimen.build(seed, faulty=policy not in (FAULT_FREE, SHIFTED))
        if policy == NUDGED:
            _nudge(trial.workload)
        end = _End(trial.workload, length, specimen.onset)
        if policy in REFERENCES:
            shift = SHIFT if policy == SHIFTED else 0
            _plain(trial, end, lambda step: step + shift * (specimen.onset is not None and step >= specimen.onset))
        else:
            from aftershock.guard.policies import policy as policy_of

            _guarded(trial, end, policy_of(policy, **settings or {}) if isinstance(policy, str) else policy)
    name = policy if isinstance(policy, str) else type(policy).__name__
    return end.result(specimen.name, name, seed, time.monotonic() - began)


def _plain(trial: Trial, end: _End, batch_of: Callable[[int], int]) -> None:
    import torch

    workload = trial.workload
    for index in range(end.length):
        loss = _backward(trial, batch_of(index))
        if workload.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(workload.model.parameters(), workload.clip_norm)
        workload.optimizer.step()
        if workload.scheduler is not None:
            workload.scheduler.step()
        workload.optimizer.zero_grad()
        end.after(index + 1, loss, taken=True)


def _nudge(workload: Workload) -> None:
    import torch

    with torch.no_grad():
        for parameter in workload.model.parameters():
            parameter.copy_(torch.nextafter(parameter, torch.full_like(parameter, math.inf)))


def _guarded(trial: Trial, end: _End, policy: Policy) -> None:
    from aftershock.guard.guard import Guard

    workload = trial.workload
    with (
        _Silence(),
        Guard(
            workload.model,
            workload.optimizer,
            scheduler=workload.scheduler,
            clip_norm=workload.clip_norm,
            policy=policy,
            mirror=end.happened,
        ) as guard,
    ):
        for index in guard.batches(range(PATIENCE * end.length)):
            loss = _backward(trial, index)
            try:
                outcome = guard.step(loss)
            except ValueError as error:  # a policy that this model or optimizer is nothing for
                end.stopped = f"refused: {error}"
                return
            kept = outcome.taken and guard.step_count == outcome.step + 1  # not taken back at once
            end.after(guard.step_count, outcome.loss, taken=kept)
            if guard.step_count >= end.length:
                break
        end.stopped = None if guard.stopped is None else guard.stopped.reason


def _backward(trial: Trial, index: int) -> Any:
    """Gradients of one batch, and what happens to the process around it; the mean loss."""
    workload, disturbance = trial
    if disturbance is not None:
        disturbance.before_forward(index)
    loss = workload.backward(index)
    if disturbance is not None:
        disturbance.after_backward(index)
    return loss


class _End:
    """Follows a run: what its end will be judged by."""

    def __init__(self, workload: Workload, length: int, onset: int | None) -> None:
        self.length, self._onset = length, onset
        self.stopped: str | None = None
        self._workload = workload
        self._losses: dict[int, float] = {}
        self._readings: dict[int, float] = {}
        self._steps = self._batches = self._early = 0
        self._events: list[Happened] = []
        self._counts: dict[str, int] = {}

    def after(self, step: int, loss: Any, *, taken: bool) -> None:
        """`step` accepted ones after this batch."""
        self._batches += 1
        self._steps = step
        if not taken:
            return
        # a step that was taken back is overwritten when it comes again
        self._losses[step] = float(loss)
        read, left = self._workload.held_out, self.length - step
        if read is not None and left < READINGS * READ_EVERY and left % READ_EVERY == 0:
            self._readings[step] = read(self._workload.model)

    def happened(self, event: Mapping[str, Any]) -> None:
        """What the guard tells its tracker."""
        kind = str(event["kind"])
        if kind == "attached":
            return
        self._counts[kind] = self._counts.get(kind, 0) + 1
        self._early += kind in INTERVENTIONS and self._onset is not None and event["batch_id"] < self._onset
        if len(self._events) < MOST_EVENTS:
            reason = str(event.get("reason") or _verdicts(event))
            self._events.append(Happened(kind, event["step"], event["batch_id"], reason))

    def result(self, specimen: str, policy: str, seed: int, seconds: float) -> Ended:
        import torch

        tail = [loss for step, loss in sorted(self._losses.items()) if self._steps - TAIL < step <= self._steps]
        whole = all(bool(torch.isfinite(weight).all()) for weight in self._workload.model.parameters())
        readings = [value for step, value in self._readings.items() if step <= self._steps]
        return Ended(
            specimen=specimen,
            policy=policy,
            seed=seed,
            steps=self._steps,
            batches=self._batches,
            has_held_out=self._workload.held_out is not None,
            held_out=_median(readings) if self._steps >= self.length else None,
            tail=_median(tail),
            finite=whole and bool(tail) and math.isfinite(tail[-1]),
            stopped=self.stopped,
            counts=self._counts,
            early=self._early,
            events=self._events,
            seconds=round(seconds, 2),
        )


def _median(values: list[float]) -> float | None:
    """None where one of them is not finite: the end of that run is not one."""
    return statistics.median(values) if values and all(map(math.isfinite, values)) else None


def _verdicts(event: Mapping[str, Any]) -> str:
    return " ".join(f"{signal} {verdict}" for signal, verdict in dict(event.get("verdicts") or {}).items())


class _Silence:
    """The guard's console lines are in the record; hundreds of runs would print thousands."""

    def __enter__(self) -> None:
        self._log = logging.getLogger("aftershock.guard")
        self._was = self._log.disabled
        self._log.disabled = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._log.disabled = self._was
