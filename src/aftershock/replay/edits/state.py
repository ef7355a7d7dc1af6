"""The optimizer's state: moments reset, the second moment held or measured anew, or all of an earlier healthy state.

Must not import other edits than those of the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from aftershock.guard.policies.moments import FIRST, SECOND, betas_of, groups, zero
from aftershock.guard.state import all_finite
from aftershock.replay.edits.checked import Checked, clear_gradients, kind
from aftershock.replay.edits.data import Replaced, suspects
from aftershock.replay.loop import backward, trained
from aftershock.replay.run import Run
from aftershock.signals.ranks import is_sharded, local

if TYPE_CHECKING:
    from aftershock.replay.subject import Subject

MOST_BATCHES = 32


@dataclass(frozen=True, kw_only=True)
class Reset(Checked):
    """Zeroes the optimizer's memory.

    - "m": the first moment, or SGD's momentum buffer; counters go on
    - "v": the second moment, and with AMSGrad its maximum; counters go on, so the first update is sqrt(1 / (1 - beta2))
      rates where m is as large as the gradient, and longer where it is larger: this is a v lost on the way, as in a
      faulty resume, not a v started well (see `RefreshedSecond`)
    - "both": and the counters too, as in a new optimizer, whose bias correction starts again
    """

    what: Literal["m", "v", "both"]

    def __post_init__(self) -> None:
        if self.what not in ("m", "v", "both"):
            raise ValueError(f"reset m, v or both, got {self.what!r}")

    def check(self, run: Run) -> None:
        keys = self._keys()
        states = run.workload.optimizer.state.values()
        if not any(isinstance(state.get(key), Tensor) for state in states for key in keys):
            raise ValueError(
                f"{kind(run.workload.optimizer)} holds none of {', '.join(keys)} at the snapshot: nothing to reset"
            )

    def change(self, run: Run) -> None:
        optimizer = run.workload.optimizer
        if self.what == "both":
            zero(optimizer, list(run.training.params.values()), restart=True)
            return
        for state in optimizer.state.values():
            for key in self._keys():
                if isinstance(state.get(key), Tensor):
                    state[key].zero_()

    def _keys(self) -> tuple[str, ...]:
        return {"m": FIRST, "v": SECOND, "both": (*FIRST, *SECOND)}[self.what]


@dataclass(frozen=True, kw_only=True)
class HeldSecond(Checked):
    """Adam's v does not fall any more: v_t = max(v_t, v_(t-1)) after each step, from the snapshot on.

    What AMSGrad (Reddi et al. 2018, arXiv 1904.09237) does, begun late. A spike that it removes came of a v that
    decayed faster than the gradients it divides. In a step itself v falls once, by beta2. Memory: one copy of v.
    """

    def check(self, run: Run) -> None:
        if not any(isinstance(s.get("exp_avg_sq"), Tensor) for s in run.workload.optimizer.state.values()):
            raise ValueError(f"{kind(run.workload.optimizer)} holds no exp_avg_sq at the snapshot: no v to hold")

    def change(self, run: Run) -> None:
        states = run.workload.optimizer.state.values()
        second = [local(s["exp_avg_sq"]) for s in states if isinstance(s.get("exp_avg_sq"), Tensor)]
        highest = [v.clone() for v in second]

        def hold(step: int) -> None:
            torch._foreach_maximum_(second, highest)
            torch._foreach_copy_(highest, second)

        run.after_step.append(hold)


@dataclass(frozen=True, kw_only=True)
class RefreshedSecond(Checked):
    """Adam's v measured at the snapshot: v_hat = sum_k w_k g_k^2, w_k = beta2^k / sum_k beta2^k.

    g_k are the gradients (clipped as the run clips) of the batches of the coming steps k = 0, 1, .. before the first
    suspect, 32 at most, all at the snapshot's weights; v = (1 - beta2^t) v_hat, and counter, m and random numbers stay.
    With a v that lags behind the gradients this is the one it should have been. Cost: as many backward passes.
    """

    def check(self, run: Run) -> None:
        states = [s for s in run.workload.optimizer.state.values() if isinstance(s.get("exp_avg_sq"), Tensor)]
        if not states:
            raise ValueError(f"{kind(run.workload.optimizer)} holds no exp_avg_sq at the snapshot: no v to refresh")
        if any(is_sharded(p) for p in run.training.params.values()):
            raise ValueError("a v of sharded parameters is not measured anew: its norms would need every rank")

    def change(self, run: Run) -> None:
        optimizer, window = run.workload.optimizer, run.window
        group_of = groups(optimizer)
        last = max(window.start + 1, min(suspects(window).start, window.start + MOST_BATCHES))
        sums = self._sums(run, range(window.start, last), group_of)
        new: list[tuple[Tensor, Tensor]] = []
        for p, (total, weight) in sums.items():
            state = optimizer.state.get(p, {})
            if not isinstance(state.get("exp_avg_sq"), Tensor) or not weight:
                continue
            share = (1 - betas_of(group_of[p])[1] ** float(state["step"])) / weight
            new += [(state[key], total * share) for key in SECOND if isinstance(state.get(key), Tensor)]
        if not all_finite([value for _, value in new]):
            raise ValueError("a gradient of the batches before the suspects is not finite: no v can be measured")
        for old, value in new:
            old.copy_(value)

    def _sums(self, run: Run, steps: range, group_of: dict[Tensor, dict]) -> dict[Tensor, tuple[Tensor, float]]:
        """By parameter, sum_k beta2^k g_k^2 and sum_k beta2^k; the run is as it was afterwards."""
        kept = run.training.read()
        kept = kept._replace(tensors={name: tensor.detach().clone() for name, tensor in kept.tensors.items()})
        found: dict[Tensor, tuple[Tensor, float]] = {}
        step = run.step
        try:
            for age, run.step in enumerate(steps):
                backward(run, run.step)
                if run.clip_norm is not None:
                    torch.nn.utils.clip_grad_norm_(trained(run), run.clip_norm)
                for p in trained(run):
                    if p.grad is not None and p in group_of and "betas" in group_of[p]:
                        weight = betas_of(group_of[p])[1] ** age if age else 1.0
                        total, weights = found.get(p, (torch.zeros_like(p, requires_grad=False), 0.0))
                        found[p] = total + weight * p.grad.detach().square(), weights + weight
                clear_gradients(run)
        finally:
            run.step = step
            clear_gradients(run)
            run.training.restore(kept, rng=True)
        return found


@dataclass(frozen=True, kw_only=True)
class Earlier(Checked):
    """The recorded steps from an earlier healthy state: weights, moments and schedule of then, batches of now.

    With `others`, the suspect batches are replaced too: the fourth corner of "same batches or others, same state or
    another" (Chowdhery et al. 2022, section 5.1, arXiv 2204.02311). Random numbers stay those of the recorded steps.
    """

    subject: Subject
    others: Replaced | None = None

    def check(self, run: Run) -> None:
        if self.subject.earlier is None:
            raise ValueError("no earlier healthy state was kept; record with a longer margin, or more snapshots")
        if self.others is not None:
            self.others.check(run)

    def change(self, run: Run) -> None:
        earlier = self.subject.earlier
        assert earlier is not None
        if self.others is not None:
            self.others.change(run)
        run.training.restore(self.subject.states[earlier], rng=False)
        clear_gradients(run)
