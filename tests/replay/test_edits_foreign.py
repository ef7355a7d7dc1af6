"""Edits on a model that nobody here wrote, and on a spike that nobody planted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from aftershock.guard.state import Training
from aftershock.lab.zoo.registry import specimen
from aftershock.replay.cells import cell, grid
from aftershock.replay.edits.architecture import _rows_first
from aftershock.replay.edits.places import coarse_parts, modules_of, parameters_of
from aftershock.replay.loop import take_steps
from aftershock.replay.run import CONTROL, Run, Window
from aftershock.replay.runner import run_cell
from aftershock.replay.subject import Subject, copied
from aftershock.signals.attention import probe_attention
from aftershock.workload import Workload

VOCABULARY, START = 50, 6


def gpt2_loss(model: nn.Module, tokens_BT: Tensor) -> Tensor:
    return model(input_ids=tokens_BT, labels=tokens_BT).loss


@pytest.fixture(scope="module")
def gpt2() -> Subject:
    """Hugging Face's GPT-2, its loss computed inside of it, dropout on, the head tied to the embedding."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).train()
    work = Workload(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1),
        batch=lambda i: torch.randint(VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(i)),
        loss=gpt2_loss,
        clip_norm=1.0,
    )
    return record(work, Window(START, START + 3, START + 4, START + 5), keep=(START // 2, START), steps=START + 2)


def record(work: Workload, window: Window, *, keep: tuple[int, int], steps: int) -> Subject:
    """Trains, and keeps the states before the two steps."""
    training = Training(work.model, work.optimizer, scheduler=work.scheduler)
    states, recorded = {}, dict[int, float]()
    for taken in take_steps(Run(work, training, Window(0, 0, 0, 1)), 0, steps):
        recorded[taken.step] = taken.loss
        if taken.step + 1 in keep:
            states[taken.step + 1] = copied(training.read())
    return Subject(work, states=states, recorded=recorded, window=window, earlier=keep[0])


def test_every_cell_works_on_gpt2(gpt2: Subject) -> None:
    """contract: as for our own models; what is left out says why."""
    found = grid(gpt2)
    names = {one.name for one in found.cells}
    assert {"qk-clip", "qk-norm", "z-loss=1e-4", "dropout=0", "wd*0:embeddings", "float64:loss"} <= names
    assert {"float32", "float32:loss", "lr=before"} <= set(found.left_out)
    control = run_cell(gpt2, CONTROL, steps=1, stop_early=False)
    assert control.losses == (gpt2.recorded[START],)
    for one in found.cells:
        result = run_cell(gpt2, one, steps=2, stop_early=False)
        assert result.error == "", one.name
        assert all(0 < loss < 10 for loss in result.losses), one.name
        again = run_cell(gpt2, CONTROL, steps=1, stop_early=False)
        assert (again.losses, again.grad_norms, again.updates) == control[4:7], f"after {one.name}"


def test_the_parts_of_gpt2(gpt2: Subject) -> None:
    """oracle: its own names; a head that is tied to the embedding is no part of its own."""
    model = gpt2.workload.model
    assert list(modules_of(model, "attention")) == ["transformer.h.0.attn", "transformer.h.1.attn"]
    assert list(parameters_of(model, "embeddings")) == ["transformer.wte.weight", "transformer.wpe.weight"]
    assert len(parameters_of(model, "norms")) == 2 * (2 * 2 + 1)
    assert coarse_parts(model, most=6) == [f"transformer.{part}" for part in ("wte", "wpe", "h.0", "h.1", "ln_f")]
    assert coarse_parts(nn.Linear(2, 2), most=6) == []


def test_qk_clip_finds_the_columns_of_gpt2(gpt2: Subject) -> None:
    """oracle: after a step no logit is above tau; values keep the weights that the step gave them."""
    model, batch = gpt2.workload.model, gpt2.batch(START)

    def logits() -> dict[str, float]:
        found = probe_attention(model, lambda: gpt2_loss(model, batch), "transformer.h.*.attn").read()
        return {name: value for name, value in found.items() if name.endswith("attn/max_logit")}

    gpt2.restore()
    tau = 0.5 * min(logits().values())
    run = gpt2.run()
    cell(f"qk-clip={tau}", gpt2).edit.apply(run)
    run.workload.optimizer.param_groups[0]["lr"] = 0.0
    name = "transformer.h.1.attn.c_attn.weight"
    old = _rows_first(model)[name].clone()
    list(take_steps(run, START, START + 1))
    # biases and both weights shrink alike; what is below comes from the first layer, which changes the second's input
    assert logits()["attn/transformer.h.0.attn/max_logit"] == pytest.approx(tau, rel=1e-4)
    changed = (_rows_first(model)[name] != old).any(1)
    assert changed[:16].any()
    assert not changed[16:].any()


@pytest.mark.study
def test_the_slingshot_table() -> None:
    """planted: from 43 steps before its peak, float64, larger eps and a tenth of the rate remove it; clips do not."""
    work = specimen("slingshot").build(0).workload
    subject = record(work, Window(750, 786, 793, 801), keep=(500, 750), steps=850)
    recorded = {step: subject.recorded[step] for step in range(750, 850)}
    assert max(recorded, key=lambda step: recorded[step]) == 793
    for name, removes in (
        ("control", False),
        ("float64", True),
        ("float64:loss", True),
        ("eps=1e-6", True),
        ("eps=1e-5", True),
        ("lr*0.1", True),
        ("clip=1e-4", False),
        ("reset:both", False),
        ("beta2=0.999", False),
        ("sham:ulp#1", False),
        ("sham:ulp#2", False),
    ):
        result = run_cell(subject, cell(name, subject), steps=100, stop_early=False)
        assert (max(result.losses) < 1e-6) == removes, name
