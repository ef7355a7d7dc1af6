"""replica: a plain loop over the workload of a config has the losses that the fleet has for that run, bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from aftershock.config import override
from aftershock.lab.data import LanguageBatches, build_batches
from aftershock.lab.fleet import Fleet
from aftershock.lab.interventions import apply
from aftershock.lab.recipe import DecoderConfig, LanguageData, MlpConfig, ModularData, OptimConfig, RunConfig
from aftershock.lab.replica import put_snapshot, workload_of
from aftershock.lab.train import snapshot
from aftershock.replay.edits.places import modules_of
from aftershock.workload import Workload

STEPS = 12
TEXT = "The quick brown fox jumps over the lazy dog. Sphinx of black quartz, judge my vow! " * 40
SMALL: dict[str, RunConfig] = {
    "decoder": RunConfig(
        data=LanguageData(context=16),
        model=DecoderConfig(width=32, depth=2, heads=2),
        optim=OptimConfig(lr=3e-2, warmup_steps=3),
        steps=10,  # two fewer than are taken: past the end the rate stays where it was
        batch_size=4,
        eval_sequences=6,
    ),
    "mlp": RunConfig(
        data=ModularData(modulus=11),
        model=MlpConfig(embed=16, hidden=32),
        optim=OptimConfig(warmup_steps=3),
        steps=STEPS,
        batch_size=16,
    ),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def config_of(kind: str, arm: str, text: Path, **changes: Any) -> RunConfig:
    config = apply(SMALL[kind], arm).config
    source: Mapping[str, Any] = {"data.source": str(text)} if kind == "decoder" else {}
    return override(config, {**source, **changes})


def losses(workload: Workload, start: int, stop: int) -> list[float]:
    """A loop written out by hand: nothing of the replay's."""
    found = []
    for step in range(start, stop):
        found.append(workload.backward(step).item())
        workload.optimizer.step()
        assert workload.scheduler is not None
        workload.scheduler.step()
        workload.optimizer.zero_grad()
    return found


ARMS = (
    *("baseline", "no_qk_norm", "qk_norm_width", "no_z_loss", "z_loss:1e-2", "no_clip", "clip:0.01", "warmup:0"),
    *("no_decay", "coupled_decay:0.1", "parameter_lr", "parameter_lr+coupled_decay:0.1", "mup:simple", "mup:full"),
    *(
        "kappa:100",
        "relu2_attention",
        "inverse_scale",
        "bf16",
        "float64",
        "depth:0",
        "constant_lr+beta2:0.999+eps:1e-15",
    ),
)


@pytest.mark.parametrize("arm", ARMS)
def test_the_loop_has_the_fleets_bits(arm: str, text: Path) -> None:
    """equivalence: every knob of the decoder, the optimizer and the precision, clipped and not, past the last step."""
    config = config_of("decoder", arm, text)
    batches = build_batches(config.data)
    expected = fleet_losses(config, batches, min(STEPS, config.steps))
    workload = workload_of(config, batches)
    assert losses(workload, 0, STEPS)[: config.steps] == expected
    rate = config.optim.lr if "constant_lr" in arm else config.optim.min_lr
    last = workload.optimizer.param_groups[0]
    # mup's factor stands in the group's rate, and nothing else does past the last step
    assert last["lr"] == pytest.approx(rate * last["initial_lr"], rel=1e-12)  # two products of doubles


def fleet_losses(config: RunConfig, batches: Any, steps: int) -> list[float]:
    fleet = Fleet([config], batches=batches)
    state, found = fleet.init(), []
    for _ in range(steps):
        state, record = fleet.step(state)
        found.append(float(record.total_K[0]))
    return found


@pytest.mark.parametrize("arm", ["baseline", "no_clip", "parameter_lr", "batch:400"])
def test_the_small_net_too(arm: str, text: Path) -> None:
    """equivalence: with minibatches and with the whole training split."""
    config = config_of("mlp", arm, text)
    batches = build_batches(config.data)
    assert losses(workload_of(config, batches), 0, STEPS) == fleet_losses(config, batches, STEPS)


@pytest.mark.parametrize("arm", ["baseline", "mup:full"])
def test_a_snapshot_of_the_lab_goes_on_with_its_bits(arm: str, text: Path) -> None:
    """round trip: from the fleet's snapshot before step 5 the losses of the steps after it are the fleet's."""
    config = config_of("decoder", arm, text)
    batches = build_batches(config.data)
    fleet = Fleet([config], batches=batches)
    state, expected = fleet.init(), []
    kept: dict[str, torch.Tensor] = {}
    for step in range(config.steps):
        if step == 5:
            kept = {name: tensor.clone() for name, tensor in snapshot(state, 0).items()}
        state, record = fleet.step(state)
        expected.append(float(record.total_K[0]))
    workload = workload_of(config, batches)
    assert put_snapshot(workload, kept) == 5
    assert losses(workload, 5, config.steps) == expected[5:]
    with pytest.raises(ValueError, match="another number of parameters"):
        put_snapshot(workload_of(config_of("mlp", "baseline", text), build_batches(SMALL["mlp"].data)), kept)


@pytest.mark.parametrize("kind", list(SMALL))
def test_held_out_is_the_labs(kind: str, text: Path) -> None:
    """equivalence: the evaluation's cross-entropy, in chunks of a batch as there."""
    config = config_of(kind, "baseline", text)
    batches = build_batches(config.data)
    fleet, workload = Fleet([config], batches=batches), workload_of(config, batches)
    assert workload.held_out is not None
    expected = float(fleet.evaluate(fleet.init())["loss/eval/ce"][0])
    # the chunks are summed in another order of doubles
    assert workload.held_out(workload.model) == pytest.approx(expected, rel=1e-12)


def test_its_parts_are_told_by_their_classes(text: Path) -> None:
    """contract: what a replay's edits look for: embeddings, norms with all gains, and an attention for each block."""
    config = config_of("decoder", "baseline", text)
    model = workload_of(config, build_batches(config.data)).model
    assert list(modules_of(model, "embeddings")) == ["embed"]
    assert set(modules_of(model, "attention")) == {"blocks.0.attn", "blocks.1.attn"}
    inside = {f"blocks.{i}.{part}" for i in (0, 1) for part in ("attn.norm", "attn.q_gain", "attn.k_gain", "mlp.norm")}
    assert set(modules_of(model, "norms")) == inside | {"final_norm"}


def test_a_width_that_fills_no_vector_is_close(random_batches: Any) -> None:
    """equivalence: the kernel takes each tensor by itself here and the whole row there, so where tensors do not fill
    its vectors their ends may round otherwise: to some ulp of the loss, while nothing is chaotic."""
    batches: LanguageBatches = random_batches(context=8, vocab_size=17)
    config = dataclasses.replace(
        SMALL["decoder"],
        data=LanguageData(context=8, vocab_size=17),
        model=DecoderConfig(width=18, depth=1, heads=3),
        optim=OptimConfig(lr=1e-2, warmup_steps=3),
    )
    ours, theirs = losses(workload_of(config, batches), 0, 10), fleet_losses(config, batches, 10)
    assert ours == pytest.approx(theirs, rel=1e-5)  # a hundred float32 roundings; a wrong term moves the third digit
