"""The guard: one object beside any training loop that judges each step, and skips, rewinds, scales or stops.

    guard = Guard(model, optimizer, scheduler=scheduler)
    for batch in guard.batches(loader):
        loss = model(batch).loss
        loss.backward()
        guard.step(loss)

Order of a step: gather loss and gradient norm -> agree over ranks -> detectors -> policy -> clip -> optimizer -> update
norm -> policy -> scheduler -> zero_grad. Everything printed is an event; nothing is printed per step.
Must not import the lab or a trainer.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from aftershock.guard import checks
from aftershock.guard.actions import Actions, Clock
from aftershock.guard.agree import Ranks
from aftershock.guard.batches import Mode, Stream
from aftershock.guard.batchfile import Decoder
from aftershock.guard.between import Around, Between
from aftershock.guard.cases import Cases, Kept
from aftershock.guard.durable import EVERY, Durable
from aftershock.guard.events import EventLog
from aftershock.guard.incident import IncidentFile
from aftershock.guard.parts import Outcome, Parts
from aftershock.guard.policies.ladder import Ladder
from aftershock.guard.policy import Policy, Stop
from aftershock.guard.rates import Scale
from aftershock.guard.recorder import FlightRecorder
from aftershock.guard.skiplist import SkipList
from aftershock.guard.state import Stateful, Training
from aftershock.guard.steps import Steps
from aftershock.guard.watch import SIGNALS, Watch

if TYPE_CHECKING:
    from torch.amp.grad_scaler import GradScaler
    from torch.distributed import ProcessGroup

    from aftershock.guard.hooks import Hooked

_log = logging.getLogger("aftershock.guard")
SKIPS = "skip.yaml"


class Guard:
    """Guards one training run.

    - `scheduler`, `scaler`: stepped, unscaled and updated by the guard. `extra`: more parts that a rewind takes back,
      by name; `ema` is one of them. Update an EMA yourself, after steps whose outcome was `taken`
    - `policy`: what to do, `Ladder()` by default. `clip_norm`: then clip the global norm to this
    - `accumulate`: micro-batches a step. Call `step` after each with the loss that went into `backward()` (divided by
      `accumulate`); the step's loss is their sum, its batch id that of the first
    - `snapshot_every`, `slots`: accepted steps between snapshots in host memory, and how many are held
    - `folder`: events.jsonl, skip.yaml and incidents/ go there; None: the console is told, nothing is kept
    - `resume`: go on from the newest snapshot in `folder`, where there is one: the same bits as if the run had never
      died. A run that the guard itself had stopped stays stopped; "past_stop" lets it go on
    - `save_every`: accepted steps between snapshots on disk (1000 with `resume`, else none), of which the last `keep`
      stay; one more is written behind each rewind. A resumed run can rewind as far as these reach
    - `audit`: your loss of a batch, `lambda batch: model(batch).loss`: a resumed run first takes recorded steps again
      with it. Without it the same comparison is made with the run's own next steps
    - `mode`: "in_place" or "restart", see `batches.Mode`. `dry_run`: decide and report, change nothing
    - `group`: the processes that train this model; by default all. `mirror`: hears of each event, as `wandb.log`
    - `late`: read the numbers one step late, so that the host never waits for a GPU within a step. A non-finite step is
      then held on the device; spikes are judged one step late, when the step can no longer be skipped, only rewound.
      Needs an optimizer with `fused=True` and a policy that edits nothing. By default on a GPU where both hold
    - `threshold`: sigmas from which a value is a spike (default 7). `update`: see `measure.Updates`
    - `driven`: False where somebody else steps the optimizer (see `hooks`)
    - `decoder`: a tokenizer, so that incidents hold their batches as text; `code`: what `fingerprint` gave, so that a
      replay knows whether code or config have changed; `incident_state`: which incidents keep a snapshot to replay from

    Cost on a CPU: one read of the gradients (0.3 ns a parameter, which `clip_grad_norm_` pays too), 2 ms, and a
    snapshot each `snapshot_every` steps. Raises ValueError for what cannot be guarded, with what to do (see `checks`).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        scheduler: Any = None,
        scaler: GradScaler | None = None,
        ema: Stateful | None = None,
        extra: Mapping[str, Stateful] | None = None,
        policy: Policy | None = None,
        clip_norm: float | None = None,
        accumulate: int = 1,
        snapshot_every: int = 50,
        slots: int = 4,
        folder: str | Path | None = None,
        resume: bool | Literal["past_stop"] = False,
        save_every: int | None = None,
        keep: int = 4,
        audit: Callable[[Any], Tensor] | None = None,
        mode: Mode = "in_place",
        dry_run: bool = False,
        group: ProcessGroup | None = None,
        mirror: Callable[[Mapping[str, Any]], object] | None = None,
        late: bool | None = None,
        threshold: float | None = None,
        update: Literal["sample", "all"] = "sample",
        driven: bool = True,
        decoder: Decoder | None = None,
        code: Mapping[str, Any] | None = None,
        incident_state: Kept = "rewinds",
    ) -> None:
        checks.check_optimizer(model, optimizer)
        checks.check_scheduler(scheduler, optimizer)
        checks.check_settings(clip_norm=clip_norm, accumulate=accumulate, mode=mode)
        every = EVERY if save_every is None and resume else save_every
        checks.check_durable(every, folder=folder, resume=resume, driven=driven, group=group)
        scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.policy = Ladder() if policy is None else policy
        self.ranks = Ranks(group)
        self._optimizer, self._accumulate, self._mode, self._driven = optimizer, accumulate, mode, driven
        own = dict(extra or {}) | ({} if ema is None else {"ema": ema})
        training = Training(model, optimizer, scheduler=scheduler, scaler=scaler, extra=own)
        self.recorder = FlightRecorder(training, slots=slots, every=snapshot_every)
        home, primary = None if folder is None else Path(folder), self.ranks.rank == 0
        skip_file = None if home is None else home / SKIPS
        durable = None if home is None or not every else Durable(home, self.recorder, every=every, keep=keep)
        self.log = EventLog(home, mirror=mirror, primary=primary)
        self._watch, self._clock = Watch(threshold=threshold), Clock()
        self._stream = Stream(
            mode=mode,
            skips=SkipList.read(skip_file) if skip_file is not None and skip_file.exists() else SkipList(),
            num_ranks=self.ranks.size,
            before=self._boundary if driven else lambda: None,
            fetched=self._fetched,
            skipped=lambda start, stop: self._actions.say("skip_list", f"batches [{start}, {stop})"),
            ended=lambda: self._between.ended(),
        )
        self._cases = None
        if home is not None and not dry_run:
            files = IncidentFile(
                home, self.recorder, tensors=training.params.values(), primary=primary, decoder=decoder, code=code
            )
            self._cases = Cases(files, signals=SIGNALS, state=incident_state)
        self._actions = Actions(
            clock=self._clock,
            optimizer=optimizer,
            recorder=self.recorder,
            watch=self._watch,
            policy=self.policy,
            log=self.log,
            stream=self._stream,
            cases=self._cases,
            # With snapshots on disk it is written after the one behind the rewind: a restart finds both or neither.
            skip_file=skip_file if primary and durable is None else None,
            mode=mode,
            dry_run=dry_run,
        )
        self.steps = Steps(
            Parts(
                model=model,
                optimizer=optimizer,
                scheduler=scheduler,
                scaler=scaler if driven else None,
                policy=self.policy,
                ranks=self.ranks,
                recorder=self.recorder,
                watch=self._watch,
                clock=self._clock,
                actions=self._actions,
                clip_norm=clip_norm,
                update=update,
                dry_run=dry_run,
                driven=driven,
                late=late,
                judged=lambda outcome: self._between.judged(outcome),
            )
        )
        self._durable = durable
        self._between = Between(
            Around(
                recorder=self.recorder,
                ranks=self.ranks,
                clock=self._clock,
                actions=self._actions,
                stream=self._stream,
                steps=self.steps,
                durable=durable,
                skip_file=skip_file if primary and durable is not None else None,
                own=self.state_dict,
                load=self._load,
                batch_id=lambda: self.batch_id,
                num_events=lambda: self.log.count,
                audit=audit,
                accumulate=accumulate,
            )
        )
        self._ids: list[int] = []
        self._losses: list[Tensor] = []
        self._own_id = 0
        self._streamed = self._closed = False
        self._actions.say("attached", f"{type(self.policy).__name__}, {mode}{', dry run' if dry_run else ''}")
        self._between.start(resume)

    # ---- the loop

    def batches(
        self, loader: Any, *, epochs: int | None = 1, start: int | None = None, samples_per_batch: int | None = None
    ) -> Iterator[Any]:
        """The batches of `loader`, without those of the skip list; goes on where the run stands.

        - `epochs`: passes over the loader, None for no end. After `load_state_dict` the call that was under way goes
          on: it ends where it would have
        - `start`: for a bare iterator on a resumed run: the id of its first batch, which must be `guard.batch_id`
        - `samples_per_batch`: over all ranks; by default the loader's batch size times the ranks. Ids and the skip list
          are read in it when a run goes on with another batch size or number of ranks

        A list, a map-style DataLoader and a loader with state_dict can be positioned; anything else is read past.
        Raises ValueError when `mode="restart"` and the loader cannot be positioned.
        """
        self._streamed = True
        return self._stream.run(loader, epochs=epochs, start=start, samples=samples_per_batch)

    def step(self, loss: Tensor | float, *, batch_id: int | None = None) -> Outcome:
        """Judge the step and take it or not; clips, schedules and clears the gradients. Call it after `backward()`.

        `batch_id`: only without `batches`; by default the calls are counted. Raises ValueError for a loss that is no
        single number, without gradients, and when the run was stopped.
        """
        if not self._driven:
            raise ValueError("this guard sits in the optimizer's hooks; call optimizer.step(), not guard.step()")
        if not self._collect(checks.check_loss(loss, self._accumulate), batch_id):
            return Outcome(None, False, self._clock.step, self._ids[0], math.nan, math.nan)
        outcome = self.run_step(self.steps.optimize)
        self._optimizer.zero_grad(set_to_none=True)
        if not self._stream.running or self._clock.stopped is not None:
            self._boundary()
        return outcome

    def run_step(self, optimize: Callable[[], None]) -> Outcome:
        """One step whose losses are collected, with `optimize` as the optimizer's own."""
        total = torch.stack([one.to(self._losses[0]) for one in self._losses]).sum() if len(self._losses) > 1 else None
        taken = self.begin(self._losses[0] if total is None else total)
        if taken:
            optimize()
            return self.end()
        return self.steps.outcome

    def begin(self, loss: Tensor | None) -> bool:
        """For those who step the optimizer themselves: whether it is to step. `end` afterwards, if so."""
        if self._mode == "restart" and not self._streamed:
            raise ValueError("mode='restart' takes the data back; fetch it through guard.batches(loader)")
        self._between.first()
        ids = self._ids or [self._count_id()]
        self._ids, self._losses = [], []
        return self.steps.begin(loss, ids)

    def end(self) -> Outcome:
        """After the optimizer stepped."""
        return self.steps.end()

    def boundary(self) -> None:
        """Between two steps, gradients cleared: a snapshot if one is due. `step` and `batches` call it themselves."""
        self._boundary()

    @staticmethod
    def hooked(model: nn.Module, optimizer: Optimizer, **settings: Any) -> Hooked:
        """A guard in the hooks of `optimizer`, for loops that cannot be changed; see `hooks.Hooked`.

        Example:
            with Guard.hooked(model, optimizer, folder="runs/a/guard"):
                train(model, optimizer)
        """
        from aftershock.guard.hooks import Hooked

        return Hooked(model, optimizer, **settings)

    # ---- what can be asked

    @property
    def step_count(self) -> int:
        """Accepted optimizer steps so far; goes back on a rewind."""
        return self._clock.step

    @property
    def batch_id(self) -> int:
        """Id of the next batch."""
        return self._stream.next_id if self._streamed else self._own_id

    @property
    def epoch(self) -> int:
        """The data's epoch, from 0."""
        return self._stream.epoch

    @property
    def skips(self) -> SkipList:
        """The batches that are left out."""
        return self._stream.skips

    @property
    def stopped(self) -> Stop | None:
        """Why the run was stopped, None while it goes on."""
        return self._clock.stopped

    def report(self) -> str:
        """One line: steps, and what was seen and done."""
        return self._clock.report()

    # ---- coming and going

    def save(self) -> Path | None:
        """Write a snapshot now, between two steps; None when the state is not finite or the disk is full."""
        if self._durable is None:
            raise ValueError("save needs a place: Guard(..., folder=..., save_every=...)")
        if self._losses:
            raise ValueError("save in the middle of a step; call it after guard.step")
        self.steps.settle()
        return self._between.save(held=False)

    def state_dict(self) -> dict[str, Any]:
        """All that the guard itself needs, as JSON types and tensors; model, optimizer and random numbers are yours."""
        self.steps.settle()
        return {
            "step": self._clock.step,
            "scale": list(self._clock.scale),
            "counts": dict(self._clock.counts),
            "overflows": self.steps.overflows,
            "own_id": self._own_id,
            "watch": self._watch.state_dict(),
            "policy": self.policy.state_dict(),
            "stream": self._stream.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, after model, optimizer and scheduler were loaded; on every rank."""
        self._load(state)
        self.recorder.distrust(0)
        self._actions.say("resumed", f"at batch {self.batch_id}")

    def _load(self, state: Mapping[str, Any]) -> None:
        self._clock.step, self._clock.scale = state["step"], Scale(*state["scale"])
        self._clock.counts.clear()
        self._clock.counts.update(state["counts"])
        self._own_id = state["own_id"]
        self._watch.load_state_dict(state["watch"])
        self.policy.load_state_dict(state["policy"])
        self._stream.load_state_dict(state["stream"])
        self.steps.loaded(state["overflows"])

    def close(self) -> None:
        """End: judge what is under way, close an open incident, write the skip list, log the report."""
        if self._closed:
            return
        self._closed = True
        self.steps.settle()
        self._between.close()
        if self._cases is not None:
            self._cases.end("interrupted")
        loud = self._clock.done and self.ranks.rank == 0
        _log.log(logging.WARNING if loud else logging.INFO, "%s", self.report())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- between steps

    def _collect(self, loss: Tensor, batch_id: int | None) -> bool:
        """Whether this was the step's last micro-batch."""
        if len(self._ids) <= len(self._losses):
            self._ids.append(self._count_id() if batch_id is None else batch_id)
        self._losses.append(loss)
        return len(self._losses) >= self._accumulate

    def _count_id(self) -> int:
        if self._streamed:
            return max(0, self._stream.next_id - 1)  # a second step on the same batch
        self._own_id += 1
        return self._own_id - 1

    def _fetched(self, batch_id: int, batch: Any) -> None:
        if not self._ids:
            self._between.fetched(batch_id, batch)
        self._ids.append(batch_id)
        self.recorder.keep_batch(batch_id, batch)

    def _boundary(self) -> None:
        if self._losses:
            return  # in the middle of a step
        self._ids = []  # batches that were fetched and not stepped on
        self._between.here()
