"""fleet: replicas in lockstep are the runs they would be alone, and none of them can touch another.

Legend: K replicas, B batch, T positions, P parameters of one replica.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aftershock.config import override
from aftershock.lab.data import Batches, build_batches
from aftershock.lab.fleet import Fleet, FleetState, StepRecord
from aftershock.lab.models import Model, Probe
from aftershock.lab.optim import schedule
from aftershock.lab.recipe import DecoderConfig, MlpConfig, ModularData, OptimConfig, PrecisionConfig, RunConfig

FLOAT64 = PrecisionConfig(params="float64", loss="float64")
BF16 = PrecisionConfig(matmul="bfloat16")
TEXT = RunConfig(
    model=DecoderConfig(width=16, depth=2, heads=2), optim=OptimConfig(warmup_steps=2), steps=30, batch_size=4
)
MODULAR = dataclasses.replace(TEXT, data=ModularData(modulus=11), batch_size=16, eval_sequences=10_000)
GROK = dataclasses.replace(MODULAR, model=MlpConfig(embed=8, hidden=16))
WORKLOADS = {"text": TEXT, "modular-decoder": MODULAR, "modular-mlp": GROK}

REPLICAS: list[dict[str, Any]] = [
    {},
    {"seed": 1, "optim.lr": 3e-3, "optim.beta1": 0.8, "optim.weight_decay": 1e-2},
    {"data_seed": 1, "optim.beta2": 0.99, "optim.eps": 1e-6, "optim.decay": "coupled", "optim.weight_decay": 0.1},
    {"seed": 2, "data_seed": 2, "optim.clip_norm": None, "optim.z_loss": 1e-2, "optim.schedule": "constant"},
    {"optim.clip_norm": 0.05, "optim.z_loss": 0.0, "optim.warmup_steps": 0, "optim.min_lr": 1e-3},
]
"""Everything that may differ inside a fleet, differing, at stable rates."""


@pytest.fixture(scope="module")
def modular() -> Batches:
    return build_batches(MODULAR.data)


@pytest.fixture
def text(random_batches: Any) -> Batches:
    return random_batches(context=8, vocab_size=11)


def batches_of(name: str, text: Batches, modular: Batches) -> Batches:
    return text if name == "text" else modular


def train(
    configs: Sequence[RunConfig],
    batches: Batches,
    *,
    steps: int = 30,
    measure_every: int = 0,
    start: FleetState | None = None,
) -> tuple[FleetState, list[StepRecord]]:
    fleet = Fleet(configs, batches=batches)
    state, records = fleet.init() if start is None else start, []
    for step in range(steps):
        state, record = fleet.step(state, measure=measure_every > 0 and step % measure_every == 0)
        records.append(record)
    return state, records


def losses(records: Sequence[StepRecord]) -> Tensor:
    """[steps, K]."""
    return torch.stack([record.ce_K for record in records])


def heterogeneous(base: RunConfig) -> list[RunConfig]:
    return [override(base, changes) for changes in REPLICAS]


@pytest.mark.parametrize("precision", [PrecisionConfig(), BF16, FLOAT64], ids=["float32", "bf16", "float64"])
@pytest.mark.parametrize("name", WORKLOADS)
def test_measuring_changes_not_one_bit_and_twice_is_the_same(
    name: str, precision: PrecisionConfig, text: Batches, modular: Batches
) -> None:
    """equivalence: measured never, at every step, and every third: losses, parameters, moments, all to the bit."""
    configs = heterogeneous(dataclasses.replace(WORKLOADS[name], precision=precision))
    batches = batches_of(name, text, modular)
    base, base_records = train(configs, batches, steps=12)
    for every in (0, 1, 3):
        state, records = train(configs, batches, steps=12, measure_every=every)
        assert torch.equal(losses(records), losses(base_records))
        assert all(torch.equal(a, b) for a, b in zip(state.optim, base.optim, strict=True))
        assert [bool(record.signals) for record in records] == [every > 0 and t % every == 0 for t in range(12)]


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [
        (FLOAT64, 1e-11),  # 30 steps of rounding at 1e-16; a wrong beta or seed is 1e-3 and more
        (PrecisionConfig(), 2e-4),  # rounding at 6e-8, which Adam magnifies where a gradient is near eps
    ],
    ids=["float64", "float32"],
)
def test_equivalence_of_fleet_and_solo(
    name: str, precision: PrecisionConfig, tolerance: float, text: Batches, modular: Batches
) -> None:
    """equivalence: five replicas that differ in everything they may, against each of them alone, for 30 steps."""
    configs = heterogeneous(dataclasses.replace(WORKLOADS[name], precision=precision))
    batches = batches_of(name, text, modular)
    state, records = train(configs, batches)
    fleet_eval = Fleet(configs, batches=batches).evaluate(state)
    for k, config in enumerate(configs):
        solo, solo_records = train([config], batches)
        torch.testing.assert_close(losses(records)[:, k], losses(solo_records)[:, 0], rtol=0, atol=tolerance)
        torch.testing.assert_close(state.optim.params_KP[k], solo.optim.params_KP[0], rtol=0, atol=10 * tolerance)
        solo_eval = Fleet([config], batches=batches).evaluate(solo)["loss/eval/ce"]
        torch.testing.assert_close(fleet_eval["loss/eval/ce"][k], solo_eval[0], rtol=0, atol=tolerance)


def test_every_replica_is_another_run(text: Batches) -> None:
    """planted: the equivalence above would mean little if a setting did not reach its replica."""
    configs = [override(TEXT, change) for change in [{}, *({key: value} for r in REPLICAS for key, value in r.items())]]
    _, records = train(configs, text)
    curves = losses(records)
    for k in range(1, len(configs)):
        assert not torch.equal(curves[:, k], curves[:, 0]), configs[k]


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("precision", [PrecisionConfig(), BF16, FLOAT64], ids=["float32", "bf16", "float64"])
def test_a_replica_that_breaks_leaves_the_others_bitwise_unchanged(
    name: str, precision: PrecisionConfig, text: Batches, modular: Batches
) -> None:
    """planted: replica 1 goes infinite at step 4; it is retired there, frozen, and nobody else moves by one bit."""
    configs = heterogeneous(dataclasses.replace(WORKLOADS[name], precision=precision))[:3]
    batches = batches_of(name, text, modular)
    fleet = Fleet(configs, batches=batches)
    outcomes = []
    for plant in (False, True):
        state, records, frozen = fleet.init(), [], None
        for step in range(12):
            if plant and step == 4:
                state.optim.params_KP[1] = torch.inf
                frozen = [tensor[1].clone() for tensor in state.optim]
            state, record = fleet.step(state, measure=step % 2 == 0)
            records.append(record)
        outcomes.append((state, records))
        assert state.retired_at_K.tolist() == [-1, 4 if plant else -1, -1]
        alive = [record.alive_K.tolist() for record in records]
        assert alive == [[True, not plant or step < 4, True] for step in range(12)]
        if frozen is not None:
            assert all(torch.equal(now[1], then) for now, then in zip(state.optim, frozen, strict=True))
    (healthy, healthy_records), (planted, planted_records) = outcomes
    others = [0, 2]
    assert all(torch.equal(a[others], b[others]) for a, b in zip(healthy.optim, planted.optim, strict=True))
    for a, b in zip(healthy_records, planted_records, strict=True):
        assert torch.equal(a.ce_K[others], b.ce_K[others])
        assert torch.equal(a.grad_norm_K[others], b.grad_norm_K[others])
        for signal in a.signals:
            assert torch.equal(a.signals[signal][others], b.signals[signal][others]), signal


def test_a_rate_that_breaks_training_retires_its_replica_at_that_step(text: Batches) -> None:
    """planted: lr 1e25 overflows float32 with the first update it makes; a neighbour's rate moves no one else."""
    rates = (1e-2, 1e25, 3e-2)
    configs = [override(TEXT, {"optim.lr": lr, "optim.warmup_steps": 0}) for lr in rates]
    state, records = train(configs, text, steps=10)
    assert state.retired_at_K.tolist() == [-1, 1, -1]
    assert losses(records)[1:, 1].isfinite().logical_not().all()
    tame = [configs[0], override(configs[1], {"optim.lr": 1e-3}), configs[2]]
    other, other_records = train(tame, text, steps=10)
    assert torch.equal(losses(records)[:, [0, 2]], losses(other_records)[:, [0, 2]])
    assert torch.equal(state.optim.params_KP[[0, 2]], other.optim.params_KP[[0, 2]])


def test_an_infinite_gradient_under_a_finite_loss_retires_too(modular: Batches) -> None:
    """planted: parameters of 1e30 times zero activations: the loss is fine, its gradient is not."""
    fleet = Fleet([GROK, GROK], batches=modular)
    state = fleet.init()
    views = fleet.layout.views(state.optim.params_KP)
    views["hidden"][1], views["hidden_bias"][1], views["head"][1] = 0.0, 1e-30, 1e38
    state, record = fleet.step(state)
    assert record.total_K.isfinite().all()
    assert record.grad_norm_K.isfinite().tolist() == [True, False]
    assert state.retired_at_K.tolist() == [-1, 0]


def slow_step(config: RunConfig, fleet: Fleet, state: FleetState, k: int) -> dict[str, float]:
    """RMS of gradient, clipped gradient, parameter and update of replica k, by autograd and torch's clip and AdamW."""

    def rms(values: list[float]) -> float:
        return math.sqrt(sum(v * v for v in values) / len(values))

    row = state.optim.params_KP[k : k + 1].clone()
    params = {name: view.clone().requires_grad_() for name, view in fleet.layout.views(row).items()}
    batch = fleet.batches.train(fleet.data_seeds_K[k : k + 1], state.step, config.batch_size)
    logits, targets = fleet.model(params, batch.inputs_KBT)[0], batch.targets_KBT.flatten()
    kept = targets >= 0
    z_term = logits[kept].logsumexp(-1).square().mean()
    (F.cross_entropy(logits[kept], targets[kept]) + config.optim.z_loss * z_term).backward()
    found = {}
    for name, param in params.items():
        assert param.grad is not None
        found[f"grad/{name}/rms"] = rms(param.grad.flatten().tolist())
    if config.optim.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(list(params.values()), config.optim.clip_norm)
    o, lr = config.optim, schedule(config.optim, state.step, config.steps)
    decay = o.weight_decay / (o.lr if o.decay == "independent" else 1)
    adamw = torch.optim.AdamW(list(params.values()), lr=lr, betas=(o.beta1, o.beta2), eps=o.eps, weight_decay=decay)
    moments = [fleet.layout.views(buffer[k : k + 1].clone()) for buffer in state.optim[1:]]
    before = {name: param.detach().clone() for name, param in params.items()}
    for name, param in params.items():
        step = torch.tensor(float(state.step))
        adamw.state[param] = {"step": step, "exp_avg": moments[0][name], "exp_avg_sq": moments[1][name]}
        assert param.grad is not None
        found[f"grad_clipped/{name}/rms"] = rms(param.grad.flatten().tolist())
    adamw.step()
    for name, param in params.items():
        found[f"param/{name}/rms"] = rms(param.flatten().tolist())
        found[f"update/{name}/rms"] = rms(((before[name] * (1 - lr * decay) - param.detach()) / lr).flatten().tolist())
    return found


@pytest.mark.parametrize("name", WORKLOADS)
def test_oracle_of_the_signals_of_a_step(name: str, text: Batches, modular: Batches) -> None:
    """oracle: every signal that is not the probe's (those have theirs in test_probe), for each replica, in float64.

    1e-7: the update is a difference of parameters over a rate of 1e-3, so it keeps 13 of 16 digits. The update without
    decay and the gradient before clipping differ from the wrong ones by 1e-2 and more.
    """
    configs = heterogeneous(dataclasses.replace(WORKLOADS[name], precision=FLOAT64))
    batches = batches_of(name, text, modular)
    fleet = Fleet(configs, batches=batches)
    state, _ = train(configs, batches, steps=7)
    expected = [slow_step(config, fleet, state, k) for k, config in enumerate(configs)]
    probe = Probe(len(configs))
    fleet.model(fleet.layout.views(state.optim.params_KP), batches.train(fleet.data_seeds_K, 0, 2).inputs_KBT, probe)
    probed = set(probe.values) | {f"output/head/{s}" for s in ("log_z", "log_z_sq", "abs_log_z", "mean_logit")}
    _, record = fleet.step(state, measure=True)
    for k, row in enumerate(expected):
        assert set(record.signals) == set(row) | probed
        for signal, value in row.items():
            assert record.signals[signal][k].item() == pytest.approx(value, rel=1e-7, abs=1e-12), (signal, k)
    for k, config in enumerate(configs):
        clipped = config.optim.clip_norm is not None and record.grad_norm_K[k] > config.optim.clip_norm
        ratio = record.signals["grad_clipped/head/rms"][k] / record.signals["grad/head/rms"][k]
        assert (ratio < 0.99).item() == clipped
    norm = torch.stack([record.signals[f"grad/{n}/rms"] ** 2 * p.size for n, p in _sizes(fleet)]).sum(0).sqrt()
    torch.testing.assert_close(norm, record.grad_norm_K)


def _sizes(fleet: Fleet) -> list[tuple[str, Any]]:
    return [(place.spec.name, place.spec) for place in fleet.layout.places]


OPTIM_KNOBS: dict[str, Any] = {
    "lr": 3e-3,
    "min_lr": 1e-3,
    "schedule": "constant",
    "warmup_steps": 5,
    "beta1": 0.8,
    "beta2": 0.99,
    "eps": 1e-4,
    "decay": "coupled",
    "weight_decay": 1e-2,
    "clip_norm": 0.1,
    "z_loss": 1e-1,
    "lr_scale": "parameter_rms",
}


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(OptimConfig)])
def test_each_optimizer_knob_changes_the_update_and_not_the_start(field: str, text: Batches) -> None:
    """contract: every field of OptimConfig; the first cross-entropy is the same bits, the parameters soon are not."""
    (base, base_records), (other, records) = (
        train([config], text, steps=8) for config in (TEXT, override(TEXT, {f"optim.{field}": OPTIM_KNOBS[field]}))
    )
    assert torch.equal(losses(records)[0], losses(base_records)[0])
    assert (base.optim.params_KP - other.optim.params_KP).abs().max() > 1e-5


class Watched:
    """A model that remembers the dtypes of its logits."""

    def __init__(self, model: Model) -> None:
        self.model, self.dtypes, self.specs = model, model.dtypes, model.specs
        self.seen: set[torch.dtype] = set()

    def __call__(self, params: Mapping[str, Tensor], inputs_KBT: Tensor, probe: Probe | None = None) -> Tensor:
        logits = self.model(params, inputs_KBT, probe)
        self.seen.add(logits.dtype)
        return logits


@pytest.mark.parametrize(
    ("change", "logits", "loss"),
    [
        ({}, torch.float32, torch.float32),
        ({"params": "float64"}, torch.float64, torch.float32),
        ({"matmul": "bfloat16"}, torch.float32, torch.float32),
        ({"logits": "bfloat16"}, torch.bfloat16, torch.float32),
        ({"logits": "float64"}, torch.float64, torch.float32),
        ({"loss": "float64"}, torch.float32, torch.float64),
        ({"params": "float64", "matmul": "bfloat16", "logits": "float32"}, torch.float32, torch.float32),
    ],
)
@pytest.mark.parametrize("name", WORKLOADS)
def test_each_precision_is_what_it_says(
    name: str, change: dict[str, Any], logits: torch.dtype, loss: torch.dtype, text: Batches, modular: Batches
) -> None:
    """contract: dtypes of state, logits and loss are separate settings; training works and learns in all of them."""
    config = dataclasses.replace(WORKLOADS[name], precision=PrecisionConfig(**change), steps=60)
    fleet = Fleet([config, config], batches=batches_of(name, text, modular))
    watched = fleet.model = Watched(fleet.model)
    state = fleet.init()
    first = fleet.evaluate(state)["loss/eval/ce"]
    state, record = fleet.step(state, measure=True)
    state, record = fleet.step(state, measure=True)
    assert watched.seen == {logits}
    assert record.ce_K.dtype == record.total_K.dtype == loss
    assert {tensor.dtype for tensor in state.optim} == {getattr(torch, config.precision.params)}
    assert state.retired_at_K.tolist() == [-1, -1]
    whole = Fleet([config], batches=fleet.batches)
    start = whole.evaluate(whole.init())["loss/eval/ce"]
    torch.testing.assert_close(first[:1], start, rtol=0, atol=0.05)


def test_precision_changes_the_loss_by_no_more_than_its_rounding(text: Batches) -> None:
    """equivalence: step-0 loss against float64: bf16 rounds at 2^-9, float32 at 6e-8; and each does round."""
    found = {}
    for name, precision in {"float64": FLOAT64, "float32": PrecisionConfig(), "bf16": BF16}.items():
        _, records = train([dataclasses.replace(TEXT, precision=precision)], text, steps=1)
        found[name] = records[0].total_K[0].item()
    assert 0 < abs(found["float32"] - found["float64"]) < 1e-5
    assert 1e-6 < abs(found["bf16"] - found["float64"]) < 1e-2


def test_oracle_evaluate(modular: Batches) -> None:
    """oracle: mean over all held-out targets, whatever the chunks (the last one is smaller); no step is taken."""
    configs = [dataclasses.replace(GROK, seed=s, precision=FLOAT64, batch_size=13) for s in range(3)]
    fleet = Fleet(configs, batches=modular)
    state, _ = train(configs, modular, steps=5)
    before = [tensor.clone() for tensor in state.optim]
    values = fleet.evaluate(state)
    batch = modular.eval(10_000)
    assert batch.inputs_KBT.shape[1] % 13 != 0
    for k in range(3):
        params = fleet.layout.views(state.optim.params_KP[k : k + 1])
        logits = fleet.model(params, batch.inputs_KBT)[0].view(-1, 4, 13)[:, -1]
        target = batch.targets_KBT[0, :, -1]
        assert values["loss/eval/ce"][k].item() == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-12)
        right = (logits.argmax(-1) == target).double().mean().item()
        assert values["accuracy/eval/mean"][k].item() == pytest.approx(right, rel=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(state.optim, before, strict=True))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model.width": 32}, "model.width"),
        ({"steps": 40}, "steps"),
        ({"batch_size": 8, "precision.params": "float64"}, "batch_size, precision.params"),
        ({"optim.lr_scale": "parameter_rms"}, "optim.lr_scale"),
        ({"data.kind": "modular"}, "data.context, data.eval_frac, data.kind, data.modulus"),
    ],
)
def test_runs_that_cannot_share_a_fleet_are_refused_with_the_fields_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match="may differ only in optimizer settings and seeds; these differ in") as caught:
        Fleet([TEXT, TEXT, override(TEXT, change)])
    assert str(caught.value).split("differ in ")[-1].startswith(named)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [(FLOAT64, 1e-9), (PrecisionConfig(), 1e-3), (BF16, 0.05)],  # rounding of each, after five stable steps
    ids=["float64", "float32", "bf16"],
)
@pytest.mark.parametrize("replicas", [1, 3])
def test_equivalence_of_cpu_and_gpu(precision: PrecisionConfig, tolerance: float, replicas: int, text: Batches) -> None:
    configs = heterogeneous(dataclasses.replace(TEXT, precision=precision))[:replicas]
    curves = []
    for device in ("cpu", "cuda"):
        fleet = Fleet(configs, batches=text, device=device)
        state, records = fleet.init(), []
        for step in range(5):
            state, record = fleet.step(state, measure=step == 2)
            records.append(record)
        curves.append(losses(records).cpu())
        assert (fleet.evaluate(state)["loss/eval/ce"].isfinite()).all()
    torch.testing.assert_close(*curves, rtol=0, atol=tolerance)


def test_an_empty_fleet_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one run"):
        Fleet([])
