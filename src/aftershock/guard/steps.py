"""One step of the guard, around the optimizer's own: `begin` measures, agrees and decides, `end` looks at the update.

"now": the host knows loss and norm before the step. "late": it learns them one step later, so it never waits for the
device; a non-finite step is then held on the device (`veto.FoundInf`).
Must not import the guard.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aftershock.guard import checks, veto
from aftershock.guard.gauge import Gauge
from aftershock.guard.parts import Outcome, Parts
from aftershock.guard.policy import CONTINUE, Action, Continue, Rewind, ScaleLR, Seen, SkipStep, Stop
from aftershock.guard.rates import put_on, take_off
from aftershock.guard.state import StepRow
from aftershock.guard.undo import Undo, stamp
from aftershock.signals.reader import LateReader

OVERFLOWS = 24
"""Overflows in a row that are a GradScaler's own business: from its first scale, 2^16, so many bring it below 1."""


class _Sent(NamedTuple):
    """What the host knows of a step whose numbers are under way."""

    step: int
    ids: list[int]
    lr: float
    with_loss: bool


class Steps:
    """Judges steps one after another; see the head of this file."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._schedule = checks.SchedulerWatch(parts.scheduler if parts.driven else None)
        self._hold = veto.FoundInf(parts.optimizer)
        self._reader = LateReader()
        self._sent: _Sent | None = None
        self._row = torch.zeros(0)
        self._seen: Seen | None = None
        self._action: Action = CONTINUE
        self._own_rates: list[Any] | None = None
        self._overflows = 0
        self._gauge = Gauge(parts.recorder.training, parts.ranks, how=parts.update, driven=parts.driven)
        self.late = self._reads_late()
        self.outcome = Outcome(None, False, 0, 0, math.nan, math.nan)

    # ---- the step

    def begin(self, loss: Tensor | None, ids: list[int]) -> bool:
        """Whether the optimizer is to step. Raises ValueError, on all ranks, for a mistake of one of them."""
        p = self._parts
        if p.clock.stopped is not None:
            raise ValueError(
                f"the guard has stopped this run: {p.clock.stopped.reason}; leave the loop when guard.stopped"
            )
        self._schedule.check()
        faults = self._faults()
        self.outcome = Outcome(None, False, p.clock.step, ids[0], math.nan, math.nan)
        if self.late and self._sent is not None and self._judge_late() is not None:
            return False  # weights went back: these gradients are of others
        if p.scaler is not None and not faults.code:
            p.scaler.unscale_(p.optimizer)
        norm = self._gauge.gradients.norm()
        row = self._gauge.agree(loss, norm, step=p.clock.step, batch_id=ids[0], faults=faults)
        if self.late:
            return self._begin_late(row, norm, ids, with_loss=loss is not None)
        mean, size, step, batch_id, code = row.tolist()
        self._same(step, batch_id, ids[0])
        checks.raise_fault(code, here=faults)
        seen = self._see(p.clock.step, ids[0], mean if loss is not None else 0.0, size, with_loss=loss is not None)
        self._seen, self._ids = seen, ids
        if self._overflowed(seen):
            self._action = SkipStep("the GradScaler's scale overflowed and is lowered")
            p.actions.tell("skip", seen, reason=self._action.reason)
            return self._not_taken(update_scale=True)
        before = stamp(self._gauge.params)
        self._action = self._decide(seen)
        if not p.dry_run and not isinstance(self._action, (Continue, ScaleLR)):
            self._release(finite=math.isfinite(size))
            p.actions.carry_out(self._action, seen, last_id=ids[-1])
            self._schedule.accept()
            return self._not_taken()
        p.actions.carry_out(self._action, seen, last_id=ids[-1])
        if p.clip_norm is not None:
            self._gauge.clip(p.clip_norm, norm if stamp(self._gauge.params) == before else None)
        self._gauge.updates.before()
        return True

    def end(self) -> Outcome:
        """After the optimizer stepped: the update is judged."""
        p = self._parts
        if self.late:
            return self._end_late()
        update = self._gauge.update_norm().item()
        seen = self._seen
        assert seen is not None
        p.clock.step += 1
        p.clock.scale = p.clock.scale.after_step()
        p.recorder.note(StepRow(seen.step, seen.batch_id, seen.loss, seen.grad_norm, seen.lr, update))
        self._step_schedule()
        after = self._judge_update(seen, update, last_id=self._ids[-1])
        if isinstance(after, (Rewind, Stop)) or self._action == CONTINUE:
            self._action = after
        self._schedule.accept()
        return self._outcome(taken=True)

    def optimize(self) -> None:
        """The optimizer's own step, at the rates of the moment."""
        p = self._parts
        self.scale_rates()
        try:
            if p.scaler is not None:
                p.scaler.step(p.optimizer)
                p.scaler.update()
            else:
                p.optimizer.step()
        finally:
            self.unscale_rates()

    def scale_rates(self) -> None:
        """Put the run's factor on the rates for the time of one optimizer step."""
        factor = self._parts.clock.scale.now()
        if factor != 1.0 and not self._parts.dry_run:
            self._own_rates = put_on(self._parts.optimizer, factor)

    def unscale_rates(self) -> None:
        """The schedule's own rates again."""
        if self._own_rates is not None:
            take_off(self._parts.optimizer, self._own_rates)
        self._own_rates = None

    def settle(self) -> None:
        """Late reading: wait for the step under way and judge it. Nothing otherwise."""
        if self._sent is not None:
            self._judge_late()

    def loaded(self, overflows: int) -> None:
        """The run's state was loaded from outside, with so many overflows in a row."""
        self.put_back()
        self._overflows = overflows

    def put_back(self) -> None:
        """The run is where it was at another time: what the scheduler counts now is right."""
        self._schedule.accept()

    @property
    def overflows(self) -> int:
        """Overflows of the GradScaler in a row."""
        return self._overflows

    @property
    def edits(self) -> bool:
        """Whether a step may be more than the optimizer's own."""
        return self._parts.policy.edits

    def backward(self, loss: Tensor) -> None:
        """As the loop's own, by way of its scaler."""
        (loss if self._parts.scaler is None else self._parts.scaler.scale(loss)).backward()

    def rehearse(self, loss: Tensor) -> float:
        """A step without a judge, gradients in place: clip, optimizer, schedule; the loss as all ranks see it."""
        p = self._parts
        if p.scaler is not None:
            p.scaler.unscale_(p.optimizer)
        norm = self._gauge.gradients.norm()
        mean = self._gauge.agree(loss, norm, step=0, batch_id=0, faults=checks.Faults())[0].item()
        if p.clip_norm is not None:
            self._gauge.clip(p.clip_norm, norm)
        self.optimize()
        self._step_schedule()
        p.optimizer.zero_grad(set_to_none=True)
        self._schedule.accept()
        return mean

    def unchanged(self) -> bool:
        """Whether the model still holds the parameters that the optimizer does. Walks the model: for snapshots."""
        return self._gauge.unchanged()

    # ---- deciding

    def _decide(self, seen: Seen) -> Action:
        p = self._parts
        undo = None
        if p.dry_run and p.policy.edits:
            undo = Undo(self._gauge.params, p.optimizer)
        action = p.policy.before_step(seen, self._gauge.live)
        if undo is not None:
            undo.back()
        if isinstance(action, (Continue, ScaleLR)) and not math.isfinite(seen.grad_norm):
            action = SkipStep(f"the gradient is not finite ({type(p.policy).__name__} would have taken the step)")
        return action

    def _see(self, step: int, batch_id: int, loss: float, norm: float, *, with_loss: bool) -> Seen:
        p = self._parts
        values = ({"loss": loss} if with_loss else {}) | {"grad_norm": norm}
        judged = p.watch.judge(step, values)
        healthy = p.recorder.healthy
        seen = Seen(step, batch_id, loss, norm, math.nan, self._lr(), judged.verdicts, judged.cause, healthy)
        if "nonfinite" in judged.verdicts.values():
            p.actions.tell("nonfinite", seen)
        return seen

    def _judge_update(self, seen: Seen, update: float, *, last_id: int, too_late: bool = False) -> Action:
        p = self._parts
        judged = p.watch.judge(seen.step, {"update_norm": update})
        verdicts = {**seen.verdicts, **judged.verdicts}
        after = seen._replace(update_norm=update, verdicts=verdicts, cause=judged.cause or seen.cause)
        undo = None
        if p.dry_run and p.policy.edits:
            undo = Undo(self._gauge.params, p.optimizer)
        action = p.policy.after_step(after, self._gauge.live)
        if undo is not None:
            undo.back()
        if action == CONTINUE and not judged.verdicts:
            p.actions.quiet(after)
            return action
        p.actions.carry_out(action, after, too_late=True, last_id=last_id)
        return action

    def _overflowed(self, seen: Seen) -> bool:
        if not self._scaled() or not math.isfinite(seen.loss) or math.isfinite(seen.grad_norm):
            self._overflows = 0 if math.isfinite(seen.grad_norm) else self._overflows
            return False
        self._overflows += 1
        return self._overflows <= OVERFLOWS and not self._parts.dry_run

    def _scaled(self) -> bool:
        """Whether a GradScaler is at work, ours or the one of whoever steps the optimizer."""
        p = self._parts
        return p.scaler is not None or (not p.driven and veto.grad_scale(p.optimizer) is not None)

    def _faults(self) -> checks.Faults:
        if self._gauge.refresh():
            self._parts.actions.say("attached", "the optimizer holds other parameters than before")
        return checks.Faults(no_gradient=not self._gauge.gradients.present())

    def _same(self, step: float, batch_id: float, here: int) -> None:
        if math.isnan(step) or math.isnan(batch_id):
            p = self._parts
            reason = (
                f"the ranks do not agree on where the run is (here: step {p.clock.step}, batch {here}); give each the "
                "same number of batches, and load the guard's state on all of them"
            )
            p.actions.say("disagreement", reason)
            raise ValueError(reason)

    def _lr(self) -> float:
        lr = self._parts.optimizer.param_groups[0]["lr"]
        if isinstance(lr, Tensor) and lr.device.type != "cpu":
            return math.nan  # capturable: reading it would wait for the device
        return float(lr) * self._parts.clock.scale.now()

    # ---- after the decision

    def _step_schedule(self) -> None:
        p = self._parts
        if p.driven and p.scheduler is not None:
            p.scheduler.step()

    def _release(self, *, finite: bool) -> None:
        """A scaler that has unscaled wants `update` before it unscales again; a good step must not teach it."""
        scaler = self._parts.scaler
        if scaler is None:
            return
        state = scaler.state_dict()
        scaler.update()
        if finite:
            scaler.load_state_dict(state)

    def _not_taken(self, *, update_scale: bool = False) -> bool:
        if update_scale:
            self._release(finite=False)
        seen = self._seen
        if seen is not None and not self.late:
            row = StepRow(seen.step, seen.batch_id, seen.loss, seen.grad_norm, seen.lr, taken=False)
            self._parts.recorder.note(row)
            self._outcome(taken=False)
        return False

    def _outcome(self, *, taken: bool) -> Outcome:
        seen = self._seen
        assert seen is not None
        self.outcome = Outcome(self._action, taken, seen.step, seen.batch_id, seen.loss, seen.grad_norm)
        self._parts.judged(self.outcome)
        return self.outcome

    # ---- one step late

    def _reads_late(self) -> bool:
        p = self._parts
        able = not p.policy.edits and veto.way_of(p.optimizer) == "found_inf" and not p.dry_run
        if p.late and not able:
            raise ValueError(
                "late=True needs an optimizer with fused=True (its kernel holds a non-finite step on the device), a "
                "policy that edits nothing (Ladder), and no dry run; leave late out to read each step's numbers at once"
            )
        return able and self._gauge.device.type == "cuda" if p.late is None else p.late

    def _begin_late(self, row: Tensor, norm: Tensor, ids: list[int], *, with_loss: bool) -> bool:
        p = self._parts
        bad = ~(torch.isfinite(row[0]) & torch.isfinite(row[1]))
        if p.clip_norm is not None:
            self._gauge.clip(p.clip_norm, norm)
        if p.scaler is None:  # a scaler's own flag does the same
            self._hold.hold(bad)
        self._gauge.updates.before()
        self._row = torch.cat([row, bad.to(row.dtype).reshape(1)])
        self._sent = _Sent(p.clock.step, ids, self._lr(), with_loss)
        return True

    def _end_late(self) -> Outcome:
        self._hold.clear()
        update = self._gauge.update_norm()
        self._reader.push(0, torch.cat([self._row, update.to(self._row.dtype).reshape(1)]))
        return self.outcome

    def _judge_late(self) -> Action | None:
        """Judge the step under way, as `begin` and `end` would have; an action that took weights back, or None."""
        p, sent = self._parts, self._sent
        assert sent is not None
        arrival = self._reader.drain()[-1]
        self._sent = None
        mean, size, step, batch_id, code, held, update = arrival.values.tolist()
        self._same(step, batch_id, sent.ids[0])
        checks.raise_fault(code, here=checks.Faults())
        seen = self._see(sent.step, sent.ids[0], mean if sent.with_loss else 0.0, size, with_loss=sent.with_loss)
        seen = seen._replace(lr=sent.lr)
        self._seen, self._ids = seen, sent.ids
        moved = math.nan if held else update
        p.recorder.note(StepRow(seen.step, seen.batch_id, seen.loss, seen.grad_norm, seen.lr, moved, taken=not held))
        if held and self._overflowed(seen):
            self._action = SkipStep("the GradScaler's scale overflowed and was lowered")
            p.actions.tell("skip", seen, reason=self._action.reason)
            self._outcome(taken=False)
            return None
        self._action = p.policy.before_step(seen, self._gauge.live)
        if held and isinstance(self._action, (Continue, ScaleLR)):
            self._action = SkipStep("not finite: held on the device")
        p.actions.carry_out(self._action, seen, too_late=not held, last_id=sent.ids[-1])
        went_back = isinstance(self._action, (Rewind, Stop))
        if not held and not went_back:
            p.clock.step += 1
            p.clock.scale = p.clock.scale.after_step()
            self._step_schedule()
            after = self._judge_update(seen, update, last_id=sent.ids[-1])
            went_back = isinstance(after, (Rewind, Stop))
            self._action = after if went_back or self._action == CONTINUE else self._action
        self._schedule.accept()
        self._outcome(taken=not held)
        return self._action if went_back else None
