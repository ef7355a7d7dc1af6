"""What edits do, against the slow way or by hand: decay, moments, rates, clips, shams, precision, losses, attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aftershock.guard.state import Training
from aftershock.replay.cells import cell
from aftershock.replay.edits.architecture import QKClipped
from aftershock.replay.edits.data import Row, take_rows
from aftershock.replay.edits.wide import Wide
from aftershock.replay.loop import take_steps
from aftershock.replay.run import Run, Window
from aftershock.replay.runner import run_cell
from aftershock.replay.subject import Subject, copied
from aftershock.workload import Workload

START, STOP = 8, 12
VOCABULARY = 13


class Net(nn.Module):
    """Embedding, one head of attention, norm, linear; every weight has a name of its own kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(VOCABULARY, 6), nn.LayerNorm(6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, VOCABULARY)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.norm(self.embed(tokens_BT))
        return self.head(x_BTD + self.attention(x_BTD, x_BTD, x_BTD)[0])


def batch(index: int) -> Tensor:
    return torch.randint(VOCABULARY, (5, 7), generator=torch.Generator().manual_seed(index))


def loss(model: nn.Module, tokens_BT: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens_BT[:, :-1]).flatten(0, 1), tokens_BT[:, 1:].flatten())


def workload(make: Callable[[nn.Module], torch.optim.Optimizer], **other: Any) -> Workload:
    torch.manual_seed(1)
    model = Net()
    return Workload(**{"model": model, "optimizer": make(model), "batch": batch, "loss": loss} | other)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.3)


def subject_of(work: Workload) -> Subject:
    training = Training(work.model, work.optimizer, scheduler=work.scheduler)
    run = Run(work, training, Window(0, 0, 0, 1))
    losses = [taken.loss for taken in take_steps(run, 0, START)]
    states = {START: copied(training.read())}
    return Subject(work, states=states, recorded=dict(enumerate(losses)), window=Window(START, START + 3, STOP, 13))


def trained(subject: Subject, name: str, steps: int = STOP - START) -> dict[str, Tensor]:
    """The weights after a cell."""
    subject.restore()
    run = subject.run()
    cell(name, subject).edit.apply(run)
    for _ in take_steps(run, START, START + steps):
        pass
    found = {name: p.detach().clone() for name, p in subject.workload.model.named_parameters()}
    for undo in reversed(run.undo):
        undo()
    subject.restore()
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


# -------------------------------------------------------------------------------------------------------- optimizer


@pytest.mark.parametrize("kind", ["decoupled", "coupled", "sgd"])
@pytest.mark.parametrize(("of", "names"), [("embeddings", ["embed.weight"]), ("norms", ["norm.weight", "norm.bias"])])
def test_decay_off_a_kind_is_a_group_without_decay(kind: str, of: str, names: list[str]) -> None:
    """oracle: bit for bit the run whose optimizer has these parameters in a group of their own."""
    makes: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "decoupled": lambda groups: torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.3),
        "coupled": lambda groups: torch.optim.Adam(groups, lr=1e-2, weight_decay=0.3, fused=True),
        "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-2, weight_decay=0.3, momentum=0.9),
    }

    def grouped(model: nn.Module) -> torch.optim.Optimizer:
        inside = [p for name, p in model.named_parameters() if name in names]
        outside = [p for name, p in model.named_parameters() if name not in names]
        return makes[kind]([{"params": outside}, {"params": inside}])

    found = trained(subject_of(workload(lambda model: makes[kind](model.parameters()))), f"wd*0:{of}")
    other = subject_of(workload(grouped))
    other.restore()
    other.workload.optimizer.param_groups[1]["weight_decay"] = 0.0
    for _ in take_steps(other.run(), START, STOP):
        pass
    assert same(found, {name: p.detach() for name, p in other.workload.model.named_parameters()})


@pytest.mark.parametrize("option", ["keep", "recompute"])
def test_recomputed_moments_are_continuous_when_debiased(option: str) -> None:
    """oracle: v / (1 - beta2^t) before and after; with "keep" v itself."""
    subject = subject_of(workload(adamw))
    subject.restore()
    optimizer, weight = subject.workload.optimizer, subject.workload.model.get_parameter("head.weight")
    old = {key: optimizer.state[weight][key].clone() for key in ("exp_avg", "exp_avg_sq")}
    run = subject.run()
    cell(f"beta2=0.9:{option}", subject).edit.apply(run)
    factor = (1 - 0.9**START) / (1 - 0.999**START) if option == "recompute" else 1.0
    # one float32 multiplication each
    torch.testing.assert_close(optimizer.state[weight]["exp_avg_sq"], old["exp_avg_sq"] * factor, rtol=1e-6, atol=0)
    assert torch.equal(optimizer.state[weight]["exp_avg"], old["exp_avg"])
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.9)
    subject.restore()
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)


def test_a_refreshed_v_is_that_of_the_coming_gradients() -> None:
    """oracle: one step lies before the suspects, so v_hat is its clipped gradient squared; nothing else has moved."""
    subject = subject_of(workload(adamw, clip_norm=0.1))
    subject.restore()
    before = copied(subject.training.read())
    model, optimizer = subject.workload.model, subject.workload.optimizer
    loss(model, batch(START)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    want = {name: p.grad.square() * (1 - 0.999**START) for name, p in model.named_parameters() if p.grad is not None}
    optimizer.zero_grad()
    cell("refresh:v", subject).edit.apply(subject.run())
    after = subject.training.read()
    for name, value in want.items():
        v = after.tensors[f"optimizer/{name}/exp_avg_sq"]
        torch.testing.assert_close(v, value, rtol=1e-5, atol=1e-30)  # the power is taken in double on both sides
    rest = [name for name in before.tensors if not name.endswith("exp_avg_sq")]
    assert all(torch.equal(before.tensors[name], after.tensors[name]) for name in rest)
    assert len(rest) > 3 * len(want)


def test_moments_that_are_reset() -> None:
    """oracle: what is zero afterwards; "both" is a new optimizer, bit for bit."""
    subject = subject_of(workload(adamw))
    optimizer = subject.workload.optimizer
    weight = subject.workload.model.get_parameter("head.weight")
    for what, zeros, steps in (("m", ["exp_avg"], 8), ("v", ["exp_avg_sq"], 8), ("both", ["exp_avg", "exp_avg_sq"], 0)):
        subject.restore()
        cell(f"reset:{what}", subject).edit.apply(subject.run())
        state = optimizer.state[weight]
        assert [key for key in ("exp_avg", "exp_avg_sq") if not state[key].any()] == zeros
        assert state["step"].item() == steps
    found = trained(subject, "reset:both")
    subject.workload.optimizer.state.clear()
    for _ in take_steps(subject.run(), START, STOP):
        pass
    assert same(found, {name: p.detach() for name, p in subject.workload.model.named_parameters()})


def test_a_rate_is_scaled_over_its_schedule_and_held_before_a_jump() -> None:
    """oracle: the same optimizer with the rates written down; a recursive schedule is not disturbed."""

    def jumping(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1)

    def by_hand(rates: Sequence[float]) -> dict[str, Tensor]:
        subject.restore()
        for step, rate in zip(range(START, STOP), rates, strict=True):
            loss(subject.workload.model, batch(step)).backward()
            with torch.no_grad():
                for p in subject.workload.model.parameters():
                    assert p.grad is not None
                    p.add_(p.grad, alpha=-rate)
                    p.grad = None
        return {name: p.detach().clone() for name, p in subject.workload.model.named_parameters()}

    work = workload(jumping)
    factor = {START + 1: 20.0, START + 3: 0.025}
    work.scheduler = torch.optim.lr_scheduler.MultiplicativeLR(work.optimizer, lambda step: factor.get(step, 1.0))
    subject = subject_of(work)
    for name, rates in (
        ("lr*0.5", (0.05, 1.0, 1.0, 0.025)),
        ("lr=before", (0.1, 0.1, 0.1, 0.05)),
        ("lr=0.01", (0.01,) * 4),
    ):
        found, want = trained(subject, name), by_hand(rates)
        for key in want:
            # the schedule's product of factors is rounded in double, the step in float32
            torch.testing.assert_close(found[key], want[key], rtol=1e-5, atol=1e-7)


def test_clips_are_at_their_level() -> None:
    """oracle: with plain SGD of rate 1 the update is the clipped gradient."""

    def plain(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=1.0)

    subject = subject_of(workload(plain))
    fixed = run_cell(subject, cell("clip=0.01", subject), steps=4, stop_early=False)
    assert fixed.updates == pytest.approx([0.01] * 4, rel=1e-3)  # weights of order 1 hold an update of 1e-2 to 1e-5
    moving = run_cell(subject, cell("clip*0.5", subject), steps=20, stop_early=False)
    assert moving.updates[:8] == pytest.approx(moving.grad_norms[:8], rel=1e-3)
    levels = [0.5 * torch.tensor(moving.grad_norms[:n], dtype=torch.float64).quantile(0.5).item() for n in range(8, 20)]
    assert moving.updates[8:] == pytest.approx(levels, rel=1e-3)


def test_frozen_and_withheld() -> None:
    """oracle: both keep the weights; only the frozen one's moments stand still, and it does not decay."""
    subject = subject_of(workload(adamw))
    subject.restore()
    old = {name: p.detach().clone() for name, p in subject.workload.model.named_parameters()}
    control = trained(subject, "control")
    for name in ("freeze:embed", "withhold:embed.weight"):
        found = trained(subject, name, steps=1)
        assert [key for key in old if torch.equal(found[key], old[key])] == ["embed.weight"]
        assert all(torch.equal(found[k], trained(subject, "control", steps=1)[k]) for k in old if k != "embed.weight")
    assert not torch.equal(control["embed.weight"], old["embed.weight"])


# ------------------------------------------------------------------------------------------------- shams, precision


def test_an_ulp_is_the_next_number() -> None:
    """oracle: numpy's spacing; each draw differs, and is the same again."""
    subject = subject_of(workload(adamw))
    subject.restore()
    old = {name: p.detach().clone() for name, p in subject.workload.model.named_parameters()}
    first, again, other = (trained(subject, f"sham:ulp#{draw}", steps=0) for draw in (1, 1, 2))
    assert same(first, again)
    assert not same(first, other)
    for name, value in old.items():
        moved = (first[name].double() - value.double()).abs()
        up = torch.nextafter(value, torch.full_like(value, torch.inf)).double() - value.double()
        down = value.double() - torch.nextafter(value, torch.full_like(value, -torch.inf)).double()
        assert ((moved == up) | (moved == down)).all()


def test_float64_is_the_run_in_float64() -> None:
    """oracle: a copy of the model and the optimizer's state, cast by hand; the weights come back in float32."""
    subject = subject_of(workload(adamw))
    found = run_cell(subject, cell("float64", subject), steps=4, stop_early=False)
    assert all(p.dtype == torch.float32 for p in subject.workload.model.parameters())
    subject.restore()
    twin = Net().double()
    twin.load_state_dict(subject.workload.model.state_dict())
    optimizer = adamw(twin)
    optimizer.load_state_dict(subject.workload.optimizer.state_dict())  # casts the moments to the weights' type
    want = []
    for step in range(START, START + 4):
        value = loss(twin, batch(step))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        want.append(value.item())
    assert found.losses == pytest.approx(want, rel=1e-14)  # the same operations in double
    assert any(float(torch.tensor(x, dtype=torch.float32)) != x for x in found.losses)


@pytest.mark.parametrize("where", ["loss", "attention", "norms"])
def test_wide_parts_are_wide_and_nothing_else(where: str) -> None:
    """oracle: what type enters the head and the loss, and what a wide softmax of bf16 logits would be."""
    work = workload(adamw)
    work.model.bfloat16()
    subject = subject_of(work)
    subject.restore()
    run = subject.run()
    inside, outside = list[torch.dtype](), list[torch.dtype]()
    work.model.get_submodule("norm").register_forward_hook(lambda _, __, out: outside.append(out.dtype))
    cell(f"float32:{where}", subject).edit.apply(run)
    work.model.get_submodule("head").register_forward_hook(lambda _, __, out: inside.append(out.dtype))
    value = run.loss(work.model, batch(START))
    value.backward()
    for undo in reversed(run.undo):
        undo()
    assert value.dtype == (torch.float32 if where == "loss" else torch.bfloat16)
    assert inside[-1] == torch.bfloat16
    assert {p.grad.dtype for p in work.model.parameters() if p.grad is not None} == {torch.bfloat16}
    if where == "loss":
        with torch.no_grad():
            logits = work.model(batch(START)[:, :-1]).flatten(0, 1).float()
        assert value.item() == F.cross_entropy(logits, batch(START)[:, 1:].flatten()).item()


def test_the_wide_mode_leaves_nothing_narrow() -> None:
    """oracle: casts, types as arguments, autocast; what writes into a tensor still does."""
    x = torch.full((3,), 1 / 3, dtype=torch.float32)
    with Wide(torch.float64) as wide:
        assert x.half().dtype == x.bfloat16().dtype == x.to(torch.float16).dtype == torch.float64
        assert F.softmax(x, dim=0, dtype=torch.float32).dtype == torch.float64
        assert torch.ones(3, dtype=torch.int64).float().dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert (x[None] @ x[:, None]).dtype == torch.float64
        x += 1
        x.mul_(2)
        x[0] = 7.0
    assert wide.count > 0
    assert x.tolist() == pytest.approx([7.0, 8 / 3, 8 / 3], rel=1e-6)  # float32
    with Wide(torch.float32, dry=True) as dry, torch.autocast("cpu", torch.bfloat16):
        assert (x[None] @ x[:, None]).dtype == torch.bfloat16
    assert dry.count == 1


# -------------------------------------------------------------------------------------------- loss, attention, rows


def test_z_loss_is_added_to_the_loss() -> None:
    """oracle: by its formula, ignored positions left out."""

    def ignoring(model: nn.Module, tokens_BT: Tensor) -> Tensor:
        targets = tokens_BT[:, 1:].flatten().clone()
        targets[::3] = -100
        return F.cross_entropy(model(tokens_BT[:, :-1]).flatten(0, 1), targets)

    subject = subject_of(workload(adamw, loss=ignoring))
    subject.restore()
    run, model = subject.run(), subject.workload.model
    cell("z-loss=0.1", subject).edit.apply(run)
    counted = torch.arange(30) % 3 != 0
    log_z = model(batch(0)[:, :-1]).flatten(0, 1).logsumexp(-1)[counted]
    want = ignoring(model, batch(0)) + 0.1 * log_z.square().mean()
    assert run.loss(model, batch(0)).item() == pytest.approx(want.item(), rel=1e-6)  # float32


def test_qk_clip_bounds_the_logits() -> None:
    """oracle: the largest score computed from the weights, fused in one matrix with the values, is tau after a step."""
    subject = subject_of(workload(adamw))
    subject.restore()
    model = subject.workload.model
    attention = model.get_submodule("attention")
    assert isinstance(attention, nn.MultiheadAttention)

    @torch.no_grad()
    def largest(step: int) -> float:
        x_BTD = model.get_submodule("norm")(model.get_submodule("embed")(batch(step)[:, :-1]))
        q, k, _ = F.linear(x_BTD, attention.in_proj_weight, attention.in_proj_bias).unflatten(-1, (3, 2, 3)).unbind(2)
        return float(torch.einsum("bthe,bshe->bhts", q, k).max() / math.sqrt(3))

    tau = 0.5 * largest(START)
    run = subject.run()
    values = attention.in_proj_weight[12:].detach().clone()
    QKClipped(tau=tau).apply(run)
    run.workload.optimizer.param_groups[0]["lr"] = 0.0
    for _ in take_steps(run, START, START + 1):
        pass
    assert largest(START) == pytest.approx(tau, rel=1e-5)  # one rounding of each weight
    assert torch.equal(attention.in_proj_weight[12:], values)


def test_rows_are_taken_out_of_every_tensor_of_a_batch() -> None:
    """oracle: by hand, in a nested batch; without any row left a calm batch stands in."""
    nested = {"x": torch.arange(12).view(4, 3), "rest": [torch.arange(4), 5.0, torch.arange(3)]}
    found = take_rows(nested, [0, 2])
    assert found["x"].tolist() == [[0, 1, 2], [6, 7, 8]]
    assert found["rest"][0].tolist() == [0, 2]
    assert (found["rest"][1], found["rest"][2].tolist()) == (5.0, [0, 1, 2])
    from aftershock.replay.edits.data import WithoutRows

    subject = subject_of(workload(adamw))
    run = subject.run()
    gone = [Row(START + 2, 0, 1), *(Row(START + 3, 0, row) for row in range(5))]
    WithoutRows(rows=frozenset(gone)).apply(run)
    given = {}
    for run.step in range(START, STOP):
        given[run.step] = run.transform(run.batch(run.index_of(run.step)))
    assert torch.equal(given[START], batch(START))
    assert torch.equal(given[START + 2], batch(START + 2)[[0, 2, 3, 4]])
    assert torch.equal(given[START + 3], batch(START))
