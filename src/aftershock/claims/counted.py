"""The study of counted spikes: whole runs of families that differ in one setting, and the zoo's own runs clipped at 1.

One line a run, see `claims.incident.Counted`; what the claims make of them is in `claims.counted_criteria`.
Must not import torch at the top: reading lines does not need it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from aftershock.claims.claim import Line
from aftershock.claims.incident import Counted, Level
from aftershock.claims.incidents import SEEDS, num_inner, sample, seeded_thread
from aftershock.claims.lines import OnLine, code_digest, work_through

if TYPE_CHECKING:
    from aftershock.workload import Workload

Family = Literal["clipped", "curve", "language"]
SPONTANEOUS = (
    *("lag_99", "lag_999", "memorising", "edge_of_stability", "logit_growth"),
    *("embedding_decay", "slingshot", "bf16_loss", "norm_against_decay"),
)
"""What is clipped: the specimens whose spike is nobody's fault."""
CLIP = 1.0
LEVELS = (0.3, 0.1, 0.03, 0.01, 0.003)
"""Losses at which the sharpness is measured: mean squared error of the curve, nats a token of the text."""
ITERATIONS = 20
"""Of the power iteration; it starts cold at each level."""
CURVE_RATE, CURVE_STEPS, POINTS = 1e-2, 2000, 200
TEXT_RATE, TEXT_STEPS, SEQUENCES, CONTEXT = 2e-2, 1500, 8, 32
BETA1, BETA2 = 0.9, 0.99
MARGIN = 40
"""Steps before the onset in which clipping may have done something about the spike."""
HOPELESS = 50
"""Steps trained on after the loss is first not finite."""
LOOK_EVERY = 100
"""Steps between two looks for a spike that ends the run."""
DEPENDS = ("replay", "lab/zoo", "signals/curvature.py", "claims/counted.py", "claims/incidents.py", "workload.py")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to train a family: `name` says how it differs from "base"; `share` of the full batch is drawn anew for
    each step, and steps are so many more that the samples stay the same."""

    family: Family
    name: str
    size: int = 0
    depth: int = 1
    share: float = 1.0
    beta2: float = BETA2
    seeds: tuple[int, ...] = SEEDS


def _kept(share: float) -> float:
    """The beta2 whose half-life, in samples, is that of `BETA2` at the full batch."""
    return BETA2**share


SETTINGS: tuple[Setting, ...] = (
    *(Setting(family="clipped", name=name) for name in SPONTANEOUS),
    Setting(family="curve", name="base", size=100),
    Setting(family="curve", name="width=30", size=30),
    Setting(family="curve", name="width=300", size=300),
    Setting(family="curve", name="batch=100", size=100, share=0.5),
    Setting(family="curve", name="batch=50", size=100, share=0.25),
    Setting(family="curve", name="batch=50, half-life kept", size=100, share=0.25, beta2=_kept(0.25)),
    Setting(family="curve", name="beta2=0.9", size=100, beta2=0.9),
    Setting(family="curve", name="beta2=0.999", size=100, beta2=0.999),
    Setting(family="language", name="base", size=32, depth=2),
    Setting(family="language", name="width=16", size=16, depth=2),
    Setting(family="language", name="width=64", size=64, depth=2),
    Setting(family="language", name="depth=1", size=32, depth=1),
    Setting(family="language", name="depth=4", size=32, depth=4),
    Setting(family="language", name="batch=4", size=32, depth=2, share=0.5),
    Setting(family="language", name="batch=4, half-life kept", size=32, depth=2, share=0.5, beta2=_kept(0.5)),
    Setting(family="language", name="beta2=0.9", size=32, depth=2, beta2=0.9),
    Setting(family="language", name="beta2=0.999", size=32, depth=2, beta2=0.999),
)
"""`curve`: the tanh net of the zoo, 200 points of two sines; `language`: its byte LM learns 8 windows of 32 bytes by
heart. Adam at a constant rate, no clipping, no decay; in each family the same number of samples a run."""


class Trained(NamedTuple):
    """A run step by step, gradient norms before clipping, and the levels it reached."""

    losses: list[float]
    grad_norms: list[float]
    levels: dict[str, Level]


def run_counted(folder: Path, *, processes: int = 1, on_progress: OnLine | None = None) -> list[Line]:
    """The lines of all settings and seeds, those on file in `folder` or made now, see `claims.lines.work_through`."""
    jobs = {run_name(setting, seed): (setting, seed) for setting in SETTINGS for seed in setting.seeds}
    return work_through(folder, jobs, _work, code=code_digest(*DEPENDS), processes=processes, on_progress=on_progress)


def run_name(setting: Setting, seed: int) -> str:
    """The id of a run."""
    return f"{setting.family} {setting.name}-{seed}"


def counted(setting: Setting, seed: int, *, steps: int | None = None) -> Counted:
    """Train one run and count its spikes by `lab.zoo.labels.label`, in this process, on one thread.

    A clipped run ends with its first spike; the others go on to the end. `steps`: by default the setting's own.
    """
    from aftershock.lab.zoo.labels import label

    began = time.process_time()
    with seeded_thread(seed):
        made = _clipped(setting.name, seed) if setting.family == "clipped" else _trained(setting, seed)
        workload = made.workload
        batch = _samples(workload.batch(0))
        num_params = num_inner(workload)
        levels = LEVELS if setting.family != "clipped" and setting.share == 1 else ()
        found = train(workload, made.steps if steps is None else steps, ends=made.ends, levels=levels)
    spikes = label(found.losses)
    clip = workload.clip_norm
    bound = [clip is not None and norm > clip for norm in found.grad_norms]
    return Counted(
        id=run_name(setting, seed),
        family=setting.family,
        setting=setting.name,
        cause=made.cause,
        seed=seed,
        num_params=num_params,
        depth=setting.depth,
        batch=batch,
        half_life=batch * half_life(workload),
        clip=clip,
        steps=len(found.losses),
        samples=batch * len(found.losses),
        finite=math.isfinite(found.losses[-1]),
        seconds=time.process_time() - began,
        spikes=tuple((s.onset, s.peak, s.end) for s in spikes),
        clipped=tuple(any(bound[max(0, s.onset - MARGIN) : s.peak + 1]) for s in spikes),
        levels=found.levels,
    )


def train(workload: Workload, steps: int, *, ends: bool, levels: Sequence[float] = ()) -> Trained:
    """Train in the loop of a replay; with `ends` no further than to the end of the first spike, which is looked for
    every 100 steps. The sharpness of a level is measured right after the first step whose loss was as low."""
    from aftershock.guard.state import Training
    from aftershock.lab.zoo.labels import label
    from aftershock.replay.loop import take_steps
    from aftershock.replay.run import Run, Window

    training = Training(workload.model, workload.optimizer, scheduler=workload.scheduler)
    found, waiting = Trained([], [], {}), sorted(levels)
    for taken in take_steps(Run(workload, training, Window(0, 0, 0, 1)), 0, steps):
        found.losses.append(taken.loss)
        found.grad_norms.append(taken.grad_norm)
        while waiting and taken.loss <= waiting[-1]:
            found.levels[f"{waiting.pop():g}"] = Level(taken.step, _sharpness(workload, taken.step))
        if not any(map(math.isfinite, found.losses[-HOPELESS:])) and len(found.losses) >= HOPELESS:
            break
        if ends and len(found.losses) % LOOK_EVERY == 0:
            spikes = label(found.losses)
            if spikes and spikes[0].end < len(found.losses):
                break
    return found


def half_life(workload: Workload) -> float:
    """Steps in which the optimizer's second moment forgets half of what it knew, ln 2 / -ln beta2; inf without one."""
    betas = workload.optimizer.param_groups[0].get("betas")
    return math.inf if betas is None else math.log(2) / -math.log(betas[1])


class _Made(NamedTuple):
    """A workload to train, for how many steps, whether its first spike `ends` it, and the class of its cause."""

    workload: Workload
    steps: int
    ends: bool
    cause: str


def _work(job: tuple[Setting, int]) -> Line:
    """In a worker: one line."""
    return counted(*job).to_line()


def _clipped(name: str, seed: int) -> _Made:
    from aftershock.lab.zoo.registry import specimen

    chosen = specimen(name)
    workload = chosen.build(seed).workload
    workload.clip_norm = CLIP
    return _Made(workload, chosen.steps, ends=True, cause=chosen.cause)


def _trained(setting: Setting, seed: int) -> _Made:
    """A run of the families `curve` and `language`."""
    from torch.optim import Adam

    from aftershock.lab.zoo.nets import ByteLM, TanhNet, Text, curve_loss, seeded, token_loss, two_sines
    from aftershock.workload import Workload

    if setting.family == "curve":
        whole, loss, steps, lr = two_sines(POINTS), curve_loss, CURVE_STEPS, CURVE_RATE
        model = seeded(seed, lambda: TanhNet(setting.size))
    else:
        whole, loss, steps, lr = _text(Text, seed), token_loss, TEXT_STEPS, TEXT_RATE
        model = seeded(seed, lambda: ByteLM(width=setting.size, depth=setting.depth, context=CONTEXT))
    optimizer = Adam(model.parameters(), lr=lr, betas=(BETA1, setting.beta2), fused=True)
    workload = Workload(model=model, optimizer=optimizer, batch=lambda index: whole, loss=loss)
    if setting.share < 1:
        sample(workload, setting.share, seed=seed)
    return _Made(workload, round(steps / setting.share), ends=False, cause="C1")


def _text(text: Callable[..., Any], seed: int) -> Any:
    return text(seed=seed, batch_size=SEQUENCES, context=CONTEXT).batch(0)


def _samples(batch: Any) -> int:
    """Tokens of a batch of text, else its examples."""
    first = batch[0]
    return first.numel() if first.ndim > 1 and not first.is_floating_point() else first.shape[0]


def _sharpness(workload: Workload, index: int) -> float:
    from aftershock.signals.curvature import sharpness

    batch = workload.batch(index)
    measured = sharpness(
        workload.model,
        lambda: workload.loss(workload.model, batch),
        lr=workload.optimizer.param_groups[0]["lr"],
        optimizer=workload.optimizer,
        iterations=ITERATIONS,
    )
    return measured.edge_share
