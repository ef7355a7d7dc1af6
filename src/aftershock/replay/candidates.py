"""Names of the cells that a grid tries, the most informative first. What does not apply is left out by `cells.grid`.

Must not import edits but for the parts of a model, nor the runner or the lab.
"""

from __future__ import annotations

from aftershock.guard.policies.moments import betas_of
from aftershock.replay.edits.places import coarse_parts
from aftershock.replay.subject import Subject
from aftershock.signals.places import parameter_places

MOST_PARTS = 6
"""Modules that a grid freezes, and tensors that it withholds the updates of: half as many."""


def candidates(subject: Subject) -> list[str]:
    """Names of what might be tried, most informative first; `grid` leaves out what does not apply."""
    replace = "replace" if subject.stop is None else "replace:before"
    decay = any(group.get("weight_decay") for group in subject.workload.optimizer.param_groups)
    chosen = [*_FIRST, *_of_betas(subject), *_SECOND, *_of_parts(subject), *_LAST]
    unfit = {"replace", "replace:before", *(_WITHOUT_DECAY if decay else _WITH_DECAY)} - {replace}
    return [name for name in chosen if name not in unfit]


_FIRST = (
    "sham:ulp#1",
    "sham:skip#1",
    "skip",
    "lr*0.5",
    "eps*1e3",
    "clip*2",
    "float64",
    "sham:permute#1",
    "lr=before",
    "qk-clip",
    "replace",
    "replace:before",
    "replace:content",
    "earlier",
    "wd*0",
    "wd=0.1",
    "float32:loss",
    "float64:loss",
    "hold:v",
    "refresh:v",
    "sham:ulp#2",
    "sham:skip#2",
    "lr*0.1",
    "reset:both",
)
_SECOND = (
    "z-loss=1e-4",
    "wd*0:embeddings",
    "qk-norm",
    "reorder",
    "policy:stable-adamw",
    "clip*1.05",
    "float32",
    "float32:attention",
    "float64:attention",
    "sham:seed#1",
    "dropout=0",
    "reset:m",
    "wd*10",
    "wd*0.25",
    "eps*1e-3",
)
_LAST = (
    "earlier:replace",
    "sham:ulp#3",
    "sham:skip#3",
    "sham:permute#2",
    "float32:norms",
    "float64:norms",
    "dropout*2",
    "reset:v",
    "lr*0.9",
    "wd*0:norms",
    "wd=1",
    "wd*0.1",
    "wd*0.5",
    "sham:seed#2",
)


_WITH_DECAY = {"wd*0", "wd*10", "wd*0.1", "wd*0.25", "wd*0.5", "wd*0:embeddings", "wd*0:norms"}
_WITHOUT_DECAY = {"wd=0.1", "wd=1"}


def _of_betas(subject: Subject) -> list[str]:
    """A lower and a higher beta2 than there is, and no first moment; momentum for SGD."""
    group = subject.workload.optimizer.param_groups[0]
    if "betas" not in group:
        return ["momentum=0", "momentum=0.5"] if group.get("momentum") else []
    beta2 = betas_of(group)[1]
    lower = [b for b in (0.999, 0.99, 0.95, 0.9) if b < beta2][:1]
    higher = [b for b in (0.95, 0.99, 0.999) if b > beta2][-1:]
    return [*(f"beta2={b:g}:recompute" for b in lower + higher), "beta1=0.5"]


def _of_parts(subject: Subject) -> list[str]:
    """Modules to freeze, then the largest tensors that are not such a module themselves."""
    model = subject.workload.model
    parts = coarse_parts(model, most=MOST_PARTS)
    names = {name: p.numel() for name, p in parameter_places(model).items() if p.requires_grad}
    inner = [name for name in names if name.rpartition(".")[0] not in parts]
    largest = sorted(inner, key=lambda name: -names[name])[: MOST_PARTS // 2]
    return [*(f"freeze:{part}" for part in parts), *(f"withhold:{name}" for name in largest)]
