"""One fleet from its first step to its last, into one run folder a replica.

The loop reads top to bottom in the order things happen. It prints nothing and knows neither sweeps nor processes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from aftershock.lab.fleet import Fleet, FleetState, StepRecord
from aftershock.lab.optim import OptimState, schedule
from aftershock.store.reader import RunReader
from aftershock.store.writer import RunWriter

OnStep = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""


def train_fleet(fleet: Fleet, writers: Sequence[RunWriter], *, on_step: OnStep | None = None) -> list[dict[str, Any]]:
    """Train every replica to the end or to its divergence; close its folder; return the summaries, in order.

    Starts from the newest snapshot that all folders have in common, else from step 0.
    """
    shared = fleet.configs[0]
    started = time.perf_counter()
    state = _restore(fleet, writers)
    first_step = state.step
    initial = fleet.evaluate(fleet.init())
    recorded_dead = _recorded_dead(state, writers)
    record = None
    for step in range(first_step, shared.steps):
        measure = shared.measure_every > 0 and step % shared.measure_every == 0
        if shared.eval_every > 0 and step % shared.eval_every == 0:
            _write_eval(writers, step, fleet.evaluate(state), recorded_dead)
        state, record = fleet.step(state, measure=measure)
        if step % shared.log_every == 0 or measure or step == shared.steps - 1:
            recorded_dead = _write_step(fleet, writers, step, state, record, recorded_dead)
            if all(recorded_dead):
                break
        if shared.snapshot_every > 0 and state.step % shared.snapshot_every == 0:
            for k, writer in enumerate(writers):
                writer.snapshot(state.step, snapshot(state, k))
        if on_step is not None:
            on_step(state.step, shared.steps)
    final = fleet.evaluate(state)
    state, recorded_dead = _retire_last(state, writers, final, recorded_dead)
    _write_eval(writers, state.step, final, recorded_dead)
    seconds = time.perf_counter() - started
    last_K = torch.full((fleet.size,), math.nan) if record is None else record.ce_K
    summaries = [
        _summary(fleet, k, state, initial, final, last_K, seconds, state.step - first_step) for k in range(fleet.size)
    ]
    for writer, summary in zip(writers, summaries, strict=True):
        writer.close("finished" if summary["diverged_step"] is None else "diverged", summary)
    return summaries


def snapshot(state: FleetState, k: int) -> dict[str, torch.Tensor]:
    """Replica k's row of the state. The batches are a pure function of the step, so this is all a replay needs."""
    tensors = {name: row[k].detach().cpu().clone() for name, row in state.optim._asdict().items()}
    return tensors | {"retired_at": state.retired_at_K[k].cpu().clone(), "step": torch.tensor(state.step)}


def from_snapshots(fleet: Fleet, rows: Sequence[Mapping[str, torch.Tensor]]) -> FleetState:
    """The fleet's state from one `snapshot` a replica. Raises ValueError if they are of different steps or sizes."""
    steps = {int(row["step"]) for row in rows}
    if len(steps) != 1:
        raise ValueError(f"the snapshots of a fleet must be of one step, these are of {sorted(steps)}")
    if {row["params_KP"].numel() for row in rows} != {fleet.layout.size}:
        raise ValueError("a snapshot has another number of parameters than its config gives; was the config edited?")
    stacked = OptimState(*(torch.stack([row[name] for row in rows]).to(fleet.device) for name in OptimState._fields))
    retired_at_K = torch.stack([row["retired_at"] for row in rows]).to(fleet.device)
    return FleetState(stacked, retired_at_K, steps.pop())


def _restore(fleet: Fleet, writers: Sequence[RunWriter]) -> FleetState:
    common = set.intersection(*(set(RunReader(writer.folder).snapshots()) for writer in writers))
    if not common:
        return fleet.init()
    state = from_snapshots(fleet, [RunReader(writer.folder).load_snapshot(max(common)) for writer in writers])
    for writer in writers:
        writer.event("resumed", state.step)
    return state


def _recorded_dead(state: FleetState, writers: Sequence[RunWriter]) -> list[bool]:
    """Who died and has the event to show for it: a process may end between a death and the next logged step."""
    return [
        at >= 0 and any(e.kind == "diverged" and e.step == at for e in RunReader(writer.folder).events())
        for at, writer in zip(state.retired_at_K.tolist(), writers, strict=True)
    ]


def _retire_last(
    state: FleetState, writers: Sequence[RunWriter], final: Mapping[str, torch.Tensor], recorded_dead: list[bool]
) -> tuple[FleetState, list[bool]]:
    """Retire those whose last update broke them: no later step notices it, the evaluation does."""
    loss_K = final["loss/eval/ce"]
    dies_K = (state.retired_at_K < 0) & ~torch.isfinite(loss_K)
    for k in dies_K.nonzero().flatten().tolist():
        writers[k].event("diverged", state.step, loss=float(loss_K[k]))
    retired_at_K = torch.where(dies_K, state.step, state.retired_at_K)
    dead = [a or b for a, b in zip(recorded_dead, dies_K.tolist(), strict=True)]
    return state._replace(retired_at_K=retired_at_K), dead


def _write_step(
    fleet: Fleet,
    writers: Sequence[RunWriter],
    step: int,
    state: FleetState,
    record: StepRecord,
    recorded_dead: list[bool],
) -> list[bool]:
    """Scalars and signals of every living replica; a `diverged` event for each that died. Returns who is dead now."""
    columns = torch.stack([record.ce_K, record.total_K, record.grad_norm_K.to(record.ce_K.dtype)]).cpu().tolist()
    retired_at = state.retired_at_K.tolist()
    names = list(record.signals)
    values_SK = torch.stack([v.double() for v in record.signals.values()]).cpu().numpy() if names else np.empty((0, 0))
    for k, writer in enumerate(writers):
        if recorded_dead[k]:
            continue
        ce, total, grad_norm = (column[k] for column in columns)
        lr = schedule(fleet.configs[k].optim, step, fleet.configs[k].steps)
        writer.scalars(
            step, {"loss/train/ce": ce, "loss/train/total": total, "grad/all/norm": grad_norm, "optim/all/lr": lr}
        )
        if names:
            writer.stats(step, names, values_SK[:, k])
        if retired_at[k] >= 0:
            writer.event("diverged", retired_at[k], loss=ce, grad_norm=grad_norm)
    return [at >= 0 for at in retired_at]


def _write_eval(
    writers: Sequence[RunWriter], step: int, values: Mapping[str, torch.Tensor], recorded_dead: Sequence[bool]
) -> None:
    columns = {name: value_K.tolist() for name, value_K in values.items()}
    for k, writer in enumerate(writers):
        if not recorded_dead[k]:
            writer.scalars(step, {name: column[k] for name, column in columns.items()})


def _summary(
    fleet: Fleet,
    k: int,
    state: FleetState,
    initial: Mapping[str, torch.Tensor],
    final: Mapping[str, torch.Tensor],
    last_K: torch.Tensor,
    seconds: float,
    steps_here: int,
) -> dict[str, Any]:
    retired_at = int(state.retired_at_K[k])
    diverged = retired_at >= 0
    steps = retired_at if diverged else state.step
    outside = ("embed", "embed.a", "embed.b", "head")
    return {
        "initial_loss": float(initial["loss/eval/ce"][k]),
        "final_loss": None if diverged else _finite(float(final["loss/eval/ce"][k])),
        "final_train_loss": None if diverged else _finite(float(last_K[k])),
        "final_accuracy": None if diverged else float(final["accuracy/eval/mean"][k]),
        "diverged_step": retired_at if diverged else None,
        "steps": steps,
        "tokens": steps * fleet.tokens_a_step,
        "num_params": fleet.layout.size,
        "num_block_params": sum(
            p.spec.size for p in fleet.layout.places if p.spec.name not in outside and len(p.spec.shape) > 1
        ),
        "seconds": seconds / fleet.size,
        "steps_since_resume": steps_here,
        "fleet_size": fleet.size,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
