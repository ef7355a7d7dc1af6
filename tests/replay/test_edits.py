"""Every edit on workloads of every kind: it applies, the replay stays finite, and nothing of it is left afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aftershock.guard.state import Training
from aftershock.replay.candidates import candidates
from aftershock.replay.cells import cell, grid
from aftershock.replay.edits.architecture import QKNorm
from aftershock.replay.edits.clips import Treated
from aftershock.replay.edits.decay import Decay
from aftershock.replay.edits.freeze import Withheld
from aftershock.replay.edits.precision import Everything, WideParts
from aftershock.replay.edits.rates import ScaledRate
from aftershock.replay.loop import take_steps
from aftershock.replay.run import CONTROL, Run, Window
from aftershock.replay.runner import run_cell
from aftershock.replay.subject import Subject, copied
from aftershock.workload import Workload

VOCABULARY, CONTEXT = 17, 8
START, STEPS = 10, 3
WINDOW = Window(START, START + 4, START + 5, START + 6)


class Tokens(NamedTuple):
    inputs_BT: Tensor
    targets_BT: Tensor


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q, k, v = (m(x_BTD).unflatten(-1, (2, -1)).transpose(1, 2) for m in (self.q_proj, self.k_proj, self.v_proj))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    """One block; `never` is a parameter that no loss reaches, `fixed` one that is not trained."""

    def __init__(self, dropout: float, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.norm, self.attention, self.drop = nn.LayerNorm(width), Attention(width), nn.Dropout(dropout)
        self.head = nn.Linear(width, VOCABULARY)
        self.never = nn.Parameter(torch.ones(3))
        self.fixed = nn.Parameter(torch.ones(width), requires_grad=False)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.embed(tokens_BT) * self.fixed
        return self.head(x_BTD + self.drop(self.attention(self.norm(x_BTD))))


class Normalised(nn.Module):
    """A regression with batch norm, whose buffers move with every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)

    def forward(self, x_B4: Tensor) -> Tensor:
        return self.outer(torch.relu(self.norm(self.inner(x_B4))))


def token_loss(model: nn.Module, batch: Tokens) -> Tensor:
    return F.cross_entropy(model(batch.inputs_BT).flatten(0, 1), batch.targets_BT.flatten())


def autocast_loss(model: nn.Module, batch: Tokens) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return F.cross_entropy(model(batch.inputs_BT).flatten(0, 1), batch.targets_BT.flatten())


def narrow_loss(model: nn.Module, batch: Tokens) -> Tensor:
    """The loss alone is narrow, gradient of the logits included."""
    logits = model(batch.inputs_BT).flatten(0, 1)
    if logits.requires_grad:
        logits.register_hook(lambda gradient: gradient.half().to(gradient.dtype))
    return F.cross_entropy(logits.bfloat16(), batch.targets_BT.flatten()).float()


def squared_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return F.mse_loss(model(batch["x"]), batch["y"])


def tokens(index: int) -> Tokens:
    rows = torch.randint(VOCABULARY, (4, CONTEXT + 1), generator=torch.Generator().manual_seed(index))
    return Tokens(rows[:, :-1], rows[:, 1:])


def points(index: int) -> dict[str, Tensor]:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(index))
    return {"x": x, "y": x.sum(1, keepdim=True)}


def decoder(make: Callable[..., torch.optim.Optimizer], *, dropout: float = 0.1, **other: Any) -> Workload:
    torch.manual_seed(0)
    model = Decoder(dropout)
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 + 0.1 * step)
    return Workload(
        **{"batch": tokens, "loss": token_loss}
        | {"model": model, "optimizer": optimizer, "scheduler": scheduler, "clip_norm": 1.0}
        | other
    )


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1, fused=True)


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-2, weight_decay=0.1, foreach=True, amsgrad=True)


def sgd() -> Workload:
    torch.manual_seed(0)
    model = Normalised()
    return Workload(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.01),
        batch=points,
        loss=squared_loss,
    )


def halves(index: int) -> list[Tokens]:
    return [Tokens(*(side[rows] for side in tokens(index))) for rows in (slice(2), slice(2, 4))]


BUILDS: dict[str, Callable[[], Workload]] = {
    "adamw, fused, dropout": lambda: decoder(adamw),
    "adam, foreach, amsgrad, accumulation": lambda: decoder(adam, batch=halves, accumulate=2),
    "sgd, momentum, batch norm": sgd,
    "adamw, autocast": lambda: decoder(adamw, loss=autocast_loss, dropout=0.0),
    "adamw, narrow loss": lambda: decoder(adamw, loss=narrow_loss, dropout=0.0),
}

RISKY = (Everything, WideParts, QKNorm, Treated, ScaledRate, Decay, Withheld)
"""Edits that have something on while the loss is computed or the optimizer steps."""

BESIDES = (
    *("lr=0.001", "clip=0.1", "clip=off", "beta2=0.9:refresh", "beta1=0.5:recompute", "eps=1e-5", "wd=0.3"),
    *("policy:zclip", "policy:tensor-clip", "policy:rms-clip", "policy:adagc", "qk-clip=0.01"),
    *("qk-norm:attention.q_proj,attention.k_proj", "z-loss=0.1", "withhold:*", "freeze:*", "momentum=0.1"),
    *("dropout=0.5", "replace:before", "control#2"),
)
"""Forms that the default grid does not try."""


def subject_of(workload: Workload) -> Subject:
    """After 10 steps; that these hold a spike is only said."""
    training = Training(workload.model, workload.optimizer, scheduler=workload.scheduler)
    run = Run(workload, training, Window(0, 0, 0, 1))
    states, recorded = {}, dict[int, float]()
    for taken in take_steps(run, 0, START + STEPS):
        recorded[taken.step] = taken.loss
        if taken.step + 1 in (START // 2, START):
            states[taken.step + 1] = copied(training.read())
    return Subject(workload, states=states, recorded=recorded, window=WINDOW, earlier=START // 2)


def first_step(subject: Subject) -> tuple[Any, ...]:
    """Loss, gradient norm and update of one unchanged step: whatever an edit has left behind shows in them."""
    return run_cell(subject, CONTROL, steps=1, stop_early=False)[4:7]


@pytest.fixture(scope="module", params=BUILDS)
def case(request: pytest.FixtureRequest) -> Subject:
    return subject_of(BUILDS[request.param]())


def test_every_cell_applies_and_leaves_nothing_behind(case: Subject) -> None:
    """contract: whatever a grid offers, and the other forms: finite losses, and the next replay has the old bits."""
    offered = grid(case)
    also = grid(case, BESIDES)
    control = first_step(case)
    assert control[0] == (case.recorded[START],)
    assert len(offered.cells) > 20
    for one in (*offered.cells, *also.cells[1:]):
        result = run_cell(case, one, steps=STEPS, stop_early=False)
        assert result.error == "", one.name
        assert len(result.losses) == STEPS, one.name
        assert all(map(math.isfinite, result.losses)), one.name
        assert first_step(case) == control, f"after {one.name}"


def test_an_edit_that_fails_on_the_way_leaves_nothing_behind(case: Subject) -> None:
    """contract: the loss fails in the second step, with the edit's modes and hooks on."""
    control = first_step(case)
    for one in grid(case).cells:
        if not isinstance(one.edit, RISKY):
            continue
        run = case.run()
        case.restore()
        one.edit.apply(run)
        loss = run.loss

        def failing(model: nn.Module, batch: Any, loss: Any = loss, run: Run = run) -> Tensor:
            value = loss(model, batch)
            if run.step > START:
                raise ZeroDivisionError
            return value

        run.loss = failing
        with pytest.raises(ZeroDivisionError):
            list(take_steps(run, START, START + STEPS))
        for undo in reversed(run.undo):
            undo()
        assert first_step(case) == control, f"after {one.name}"


def test_what_does_not_apply_says_why(case: Subject) -> None:
    """contract: each name is in the grid or left out with a sentence, and applying it says the same."""
    offered = grid(case)
    named = [one.name for one in offered.cells] + list(offered.left_out)
    assert sorted(named) == sorted(["control", *candidates(case)])
    for name, why in offered.left_out.items():
        assert len(why.split()) >= 4, name
        one = cell(name, case)
        reached = 1 if one.edit.first_step is None else one.edit.first_step - START + 1
        result = run_cell(case, one, steps=reached)
        assert why in result.error, name


def test_cells_do_what_they_say() -> None:
    """contract: all but the control, and what acts later than these steps, change what is measured in them."""
    case = subject_of(BUILDS["adamw, fused, dropout"]())
    control = run_cell(case, CONTROL, steps=STEPS, stop_early=False)
    late = {"control", "clip*2", "clip*1.05"}
    for one in grid(case).cells:
        result = run_cell(case, one, steps=STEPS, stop_early=False)
        same = (result.losses, result.grad_norms, result.updates) == control[4:7]
        assert same == (one.name in late), one.name


@pytest.mark.parametrize(
    ("build", "offered", "absent"),
    [
        ("adamw, fused, dropout", {"qk-clip", "qk-norm", "z-loss=1e-4", "dropout=0", "float64"}, {"float32"}),
        ("adamw, autocast", {"float32", "float32:attention", "float32:loss"}, {"dropout=0", "sham:seed#1"}),
        ("adamw, narrow loss", {"float32", "float32:loss", "float64:attention"}, {"float32:attention"}),
        ("sgd, momentum, batch norm", {"momentum=0", "reset:m"}, {"reset:v", "eps*1e3", "refresh:v", "qk-clip"}),
    ],
)
def test_the_grid_fits_the_workload(build: str, offered: set[str], absent: set[str]) -> None:
    """planted: what each workload has and has not."""
    found = grid(subject_of(BUILDS[build]()))
    assert offered <= {one.name for one in found.cells}
    assert absent.isdisjoint(one.name for one in found.cells)
