"""The state of a run goes back bit for bit: every optimizer, schedule, kind of tensor and source of chance."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from aftershock.guard.state import State, Training, all_finite
from aftershock.guard.tree import decode, encode


class Net(nn.Module):
    """Everything awkward at once: tied weights, running statistics, dropout, integer, complex and empty tensors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.late = nn.Linear(4, 4)
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("phase", torch.ones(2, dtype=torch.complex64))
        self.register_buffer("wide", torch.zeros(1, 3).expand(5, 3))
        self.register_buffer("cache", torch.zeros(2), persistent=False)

    def forward(self, ids_B: Tensor) -> Tensor:
        self.seen += 1  # pyright: ignore[reportOperatorIssue]
        self.phase *= 1j  # pyright: ignore[reportOperatorIssue]
        noise = torch.randn(4) * random.random() * np.random.rand()  # noqa: NPY002
        hidden = self.drop(self.norm(self.embed(ids_B) + noise))
        return nn.functional.cross_entropy(self.head(self.late(hidden)), (ids_B + 1) % 7) + self.empty.sum()


class Dense(nn.Module):
    """Matrices only, for optimizers that take nothing else."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Linear(7, 4, bias=False)
        self.two = nn.Linear(4, 7, bias=False)

    def forward(self, ids_B: Tensor) -> Tensor:
        hot = nn.functional.one_hot(ids_B, 7).to(self.one.weight.dtype)
        return nn.functional.cross_entropy(self.two(torch.dropout(self.one(hot), 0.2, True)), (ids_B + 1) % 7)


class Bags(nn.Module):
    """Sparse gradients only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 7, sparse=True)

    def forward(self, ids_B: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.embed(ids_B), (ids_B + 1) % 7)


OPTIMIZERS: dict[str, tuple[type[nn.Module], Callable[..., torch.optim.Optimizer]]] = {
    "AdamW": (Net, torch.optim.AdamW),
    "AdamW foreach": (Net, partial(torch.optim.AdamW, foreach=True)),
    "Adam fused amsgrad": (Net, partial(torch.optim.Adam, fused=True, amsgrad=True)),
    "Adam rate as tensor": (Net, lambda params: torch.optim.Adam(params, lr=torch.tensor(0.01), foreach=False)),
    "SGD momentum": (Net, partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True)),
    "SGD": (Net, partial(torch.optim.SGD, lr=0.1)),
    "Adagrad": (Net, torch.optim.Adagrad),
    "RMSprop": (Net, partial(torch.optim.RMSprop, momentum=0.5, centered=True)),
    "Rprop": (Net, torch.optim.Rprop),
    "NAdam": (Net, torch.optim.NAdam),
    "ASGD": (Net, torch.optim.ASGD),
    "Adafactor": (Dense, torch.optim.Adafactor),
    "Muon": (Dense, torch.optim.Muon),
    "SparseAdam": (Bags, lambda params: torch.optim.SparseAdam(list(params), lr=0.01)),
    "LBFGS": (Dense, partial(torch.optim.LBFGS, history_size=3, max_iter=2)),
}


def copied(state: State) -> State:
    return State({name: tensor.clone() for name, tensor in state.tensors.items()}, state.plain)


def train(training: Training, steps: int, *, start: int = 0) -> list[float]:
    """Losses of `steps` steps; batches depend on the index alone, everything else on the run's own state."""
    losses = []
    for step in range(start, start + steps):
        ids_B = torch.randint(0, 7, (6,), generator=torch.Generator().manual_seed(step))

        def closure(ids_B: Tensor = ids_B) -> Tensor:
            training.optimizer.zero_grad()
            loss = training.model(ids_B)
            loss.backward()
            return loss

        loss = training.optimizer.step(closure)  # pyright: ignore[reportCallIssue, reportArgumentType]
        assert loss is not None
        losses.append(float(torch.as_tensor(loss).detach()))
        if training.scheduler is not None:
            training.scheduler.step()  # pyright: ignore[reportAttributeAccessIssue]
        for part in training.extra.values():
            part.update_parameters(training.model)  # pyright: ignore[reportAttributeAccessIssue]
    training.optimizer.zero_grad()
    return losses


def same_bits(one: State, two: State) -> bool:
    """Names, types, shapes and bytes of all tensors, and the rest; the first that differs is named."""
    assert list(one.tensors) == list(two.tensors)
    for name, tensor in one.tensors.items():
        other = two.tensors[name]
        assert tensor.dtype == other.dtype, name
        assert tensor.shape == other.shape, name
        assert tensor.contiguous().flatten().view(torch.uint8).equal(other.contiguous().flatten().view(torch.uint8)), (
            name
        )
    return one.plain == two.plain


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimizer_goes_back_bit_for_bit(kind: str) -> None:
    """contract: before the first step and in the middle; losses from there are the same bits, in the same memory."""
    model_type, make = OPTIMIZERS[kind]
    model = model_type()
    training = Training(model, make(model.parameters()))
    fresh = copied(training.read())
    first = train(training, 3)
    middle = copied(training.read())
    memory = {name: tensor.data_ptr() for name, tensor in training.read().tensors.items() if not name.startswith("rng")}
    second = train(training, 20, start=3)

    training.restore(middle, rng=True)
    assert same_bits(training.read(), middle)
    if kind != "LBFGS":  # its history moves through lists
        assert {n: t.data_ptr() for n, t in training.read().tensors.items() if not n.startswith("rng")} == memory
    assert train(training, 20, start=3) == second

    training.restore(fresh, rng=True)
    assert same_bits(training.read(), fresh)
    assert train(training, 3) == first
    assert train(training, 20, start=3) == second


def _one_cycle(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    return lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=100)


def _in_turn(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    warm = lr_scheduler.LinearLR(optimizer, total_iters=4)
    return lr_scheduler.SequentialLR(optimizer, [warm, lr_scheduler.CosineAnnealingLR(optimizer, 9)], milestones=[4])


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "cosine": partial(lr_scheduler.CosineAnnealingLR, T_max=9),
    "restarts": partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=5),
    "lambda": partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: 1 / (1 + step)),
    "milestones": partial(lr_scheduler.MultiStepLR, milestones=[2, 5, 5, 8]),
    "one cycle": _one_cycle,
    "in turn": _in_turn,
}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_every_schedule_goes_back(kind: str) -> None:
    """contract: rates and losses after the restore; also through JSON."""
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    training = Training(model, optimizer, scheduler=SCHEDULES[kind](optimizer))
    train(training, 4)
    kept = copied(training.read())
    losses = train(training, 6, start=4)
    after = copied(training.read())
    for state in (kept, State(kept.tensors, decode(encode(kept.plain, "state")))):
        training.restore(state, rng=True)
        assert train(training, 6, start=4) == losses
        assert same_bits(training.read(), after)


def test_groups_ema_scaler_and_bfloat16() -> None:
    """round trip: two groups of their own settings, a module as extra, an enabled scaler, parameters in bfloat16."""
    model = Dense().bfloat16()
    optimizer = torch.optim.AdamW(
        [{"params": model.one.weight, "lr": 0.1}, {"params": model.two.weight, "betas": (0.5, 0.6)}]
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    training = Training(model, optimizer, scaler=scaler, extra={"ema": ema})
    train(training, 3)
    kept = copied(training.read())
    assert kept.tensors["model/one.weight"].dtype == torch.bfloat16
    optimizer.param_groups[0] |= {"lr": 9.0, "invented": 1}
    optimizer.param_groups[1]["betas"] = (0.0, 0.0)
    scaler.load_state_dict(scaler.state_dict() | {"scale": 2.0})
    losses = train(training, 3, start=3)
    training.restore(kept, rng=True)
    assert same_bits(training.read(), kept)
    assert scaler.get_scale() == 8.0
    assert "invented" not in optimizer.param_groups[0]
    assert train(training, 3, start=3) != losses  # the edited rates mattered


def test_disabled_scaler() -> None:
    """round trip: its state is empty, and that is no fault."""
    model = Dense()
    training = Training(
        model, torch.optim.SGD(model.parameters(), lr=0.1), scaler=torch.amp.GradScaler("cpu", enabled=False)
    )
    kept = copied(training.read())
    train(training, 2)
    training.restore(kept, rng=True)
    assert same_bits(training.read(), kept)


def test_without_rng_chance_runs_on() -> None:
    """contract: weights go back, random numbers do not."""
    model = Net()
    training = Training(model, torch.optim.SGD(model.parameters(), lr=0.1))
    kept = copied(training.read())
    first = train(training, 3)
    now = copied(training.read())
    training.restore(kept, rng=False)
    read = training.read()
    assert all(torch.equal(read.tensors[n], now.tensors[n]) for n in read.tensors if n.startswith("rng"))
    assert all(torch.equal(read.tensors[n], kept.tensors[n]) for n in read.tensors if n.startswith("model"))
    assert train(training, 3) != first


def test_late_unfrozen_parameters() -> None:
    """round trip: a parameter without a gradient has no optimizer state; after the restore it has none again."""
    model = Net()
    model.late.requires_grad_(False)
    training = Training(model, torch.optim.AdamW(model.parameters()))
    train(training, 2)
    kept = copied(training.read())
    model.late.requires_grad_(True)
    train(training, 2, start=2)
    assert "optimizer/late.weight/exp_avg" in training.read().tensors
    training.restore(kept, rng=True)
    assert model.late.weight not in training.optimizer.state
    assert model.late.weight.requires_grad  # the user's own decision, not the run's state
    assert same_bits(training.read(), kept)


def test_parameters_that_only_the_optimizer_knows() -> None:
    """round trip: a loss's own temperature is part of the run."""
    model, temperature = Dense(), nn.Parameter(torch.tensor(2.0))
    training = Training(model, torch.optim.SGD([*model.parameters(), temperature], lr=0.1, momentum=0.9))
    assert training.params["optimizer.0.2"] is temperature
    kept = copied(training.read())
    with torch.no_grad():
        temperature.fill_(7)
    training.restore(kept, rng=False)
    assert temperature.item() == 2


def test_buffers_that_come_go_and_grow() -> None:
    """contract: a grown buffer gets its old size, one made since stays, a dropped cache is no fault."""
    model = Net()
    training = Training(model, torch.optim.SGD(model.parameters(), lr=0.1))
    kept = copied(training.read())
    model.seen = torch.arange(3)
    model.register_buffer("new", torch.ones(1))
    del model.cache
    training.restore(kept, rng=False)
    assert model.get_buffer("seen").shape == ()
    assert "new" in dict(model.named_buffers())
    del model.phase
    with pytest.raises(ValueError, match="buffer phase is missing here"):
        training.restore(kept, rng=False)


class Scales(nn.Linear):
    """State that is no tensor of the module, as fp8 layers have."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.history = [1.0]

    def get_extra_state(self) -> dict[str, Any]:
        return {"history": self.history}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.history = state["history"]


def test_extra_state_of_modules() -> None:
    """round trip: what `get_extra_state` gives is copied, and given back."""
    scales = Scales()
    model = nn.Sequential(scales)
    training = Training(model, torch.optim.SGD(model.parameters(), lr=0.1))
    kept = copied(training.read())
    scales.history.append(5.0)
    training.restore(kept, rng=False)
    assert scales.history == [1.0]


def test_refused_before_anything_changes() -> None:
    """planted: another parameter, another shape, another group, a part too many; the weights stay as they were."""
    model = Dense()
    training = Training(model, torch.optim.SGD(model.parameters(), lr=0.1))
    kept = copied(training.read())
    train(training, 1)
    ema = AveragedModel(model)
    wrong = [
        (Training(Net(), training.optimizer), "parameter one.weight is|parameter .* is new here"),
        (Training(model, torch.optim.SGD([model.one.weight], lr=0.1)), "1 groups here, of other parameters"),
        (Training(model, training.optimizer, extra={"ema": ema}), "extra ema is new here"),
        (Training(model, training.optimizer, scaler=torch.amp.GradScaler("cpu")), "there was no scaler"),
    ]
    now = copied(training.read())
    for other, words in wrong:
        with pytest.raises(ValueError, match=words):
            other.restore(kept, rng=True)
    assert same_bits(training.read(), now)
    short = copied(kept)
    short.tensors["model/one.weight"] = torch.zeros(4, 6)
    with pytest.raises(ValueError, match=r"parameter one.weight is \(4, 7\) .* was \(4, 6\)"):
        training.restore(short, rng=True)
    with pytest.raises(ValueError, match=r"extra\['ema'\] is a int without state_dict"):
        Training(model, training.optimizer, extra={"ema": 3})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64])
def test_one_sick_element_is_found(value: float, dtype: torch.dtype) -> None:
    """planted: anywhere among healthy tensors; a clean set, huge values included, is healthy."""
    huge = 6e4 if dtype == torch.float16 else 1e30  # its square overflows, it does not
    tensors = [torch.zeros(0), torch.ones(3, dtype=torch.int64), torch.full((9,), huge, dtype=dtype), torch.ones(())]
    assert all_finite(tensors)
    tensors[2][4] = value
    assert not all_finite(tensors)
    assert all_finite(tensors, infinite_too=False) == (value == value)


def test_is_finite_looks_at_state_and_buffers() -> None:
    """planted: a NaN in a parameter, a moment, a running statistic; an infinite mask is no fault."""
    model = Net()
    training = Training(model, torch.optim.AdamW(model.parameters()))
    train(training, 1)
    model.register_buffer("mask", torch.full((2, 2), -float("inf")))
    assert training.is_finite()
    for tensor in (
        model.embed.weight,
        training.optimizer.state[model.late.bias]["exp_avg_sq"],
        model.norm.running_mean,
    ):
        assert isinstance(tensor, Tensor)
        with torch.no_grad():
            before = tensor.flatten()[0].clone()
            tensor.view(-1)[0] = float("nan")
            assert not training.is_finite()
            tensor.view(-1)[0] = before
    assert training.is_finite()
