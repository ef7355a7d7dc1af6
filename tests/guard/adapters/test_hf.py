"""The guard in a real transformers Trainer, on the bytes of the interpreter's own library."""

from __future__ import annotations

import argparse
import inspect
import math
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from aftershock.guard.adapters.hf import STATE, GuardCallback, _Scaled, guarded_train
from aftershock.guard.adapters.seat import Clock, Seat
from aftershock.guard.policies.ladder import Ladder
from aftershock.guard.policy import CONTINUE, Action, Live, Rewind, Seen, Stop

LENGTH, STEPS = 16, 24


@pytest.fixture(autouse=True)
def _quiet() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


def _text() -> list[dict[str, Tensor]]:
    data = torch.tensor(list(inspect.getsource(argparse).encode()[: LENGTH * 64])).view(64, LENGTH)
    return [{"input_ids": row, "labels": row} for row in data]


def _model(kind: str = "gpt2") -> Any:
    torch.manual_seed(0)
    if kind == "llama":
        sizes: dict[str, Any] = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        }
        return LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=LENGTH, **sizes))
    # With its default dropout: random numbers count.
    return GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=2))


class Faulty:
    """Multiplies the loss of chosen calls of the training forward, once each: the call, not the batch, is at fault."""

    def __init__(self, model: nn.Module, faults: dict[int, float]) -> None:
        self.calls, self.faults = -1, dict(faults)
        model.register_forward_hook(self)

    def __call__(self, model: nn.Module, args: Any, output: Any) -> None:
        if model.training:
            self.calls += 1
            output["loss"] = output["loss"] * self.faults.pop(self.calls, 1.0)


def _trainer(folder: Path, callback: GuardCallback | None, *, model: Any = None, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    return Trainer(
        _model() if model is None else model,
        TrainingArguments(**(settings | changes)),
        train_dataset=_text(),  # pyright: ignore[reportArgumentType] - a list is a map-style dataset
        callbacks=[] if callback is None else [callback],
    )


def _weights(trainer: Any) -> list[Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters()]


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gpt2", {}),
        ("llama", {"gradient_accumulation_steps": 2, "optim": "adafactor"}),
        ("gpt2", {"max_grad_norm": 0.0, "optim": "sgd", "lr_scheduler_type": "constant"}),
    ],
)
def test_no_bit_changes(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    """equivalence: a healthy run with the guard, clipping taken over, ends with the bits of one without."""
    plain = _trainer(tmp_path / "a", None, model=_model(kind), **changes)
    plain.train()
    callback = GuardCallback(snapshot_every=5)
    guarded = _trainer(tmp_path / "b", callback, model=_model(kind), **changes)
    guarded.train()
    assert _same(_weights(plain), _weights(guarded))
    assert callback.guard.step_count == callback.guard.batch_id == STEPS
    assert guarded.args.max_grad_norm == plain.args.max_grad_norm
    assert not guarded.model._forward_hooks


def test_the_loss_and_the_norm_before_clipping_are_seen(tmp_path: Path) -> None:
    """oracle: both equal what the Trainer itself logs, with two micro-batches a step."""
    callback = GuardCallback()
    trainer = _trainer(tmp_path, callback, gradient_accumulation_steps=2, logging_strategy="steps", logging_steps=1)
    trainer.train()
    logged = [row for row in trainer.state.log_history if "grad_norm" in row]
    rows = callback.guard.recorder.rows
    assert len(rows) == len(logged) == STEPS
    for row, line in zip(rows, logged, strict=True):
        assert row.loss == pytest.approx(line["loss"], rel=1e-6)  # sums of float32 in another order
        assert row.grad_norm == pytest.approx(line["grad_norm"], rel=1e-6)
    assert max(row.grad_norm for row in rows) > 1.0  # some step was clipped


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch"])
def test_a_vetoed_step_leaves_weights_moments_and_schedule(tmp_path: Path, optim: str) -> None:
    """planted: one NaN; the steps counted by optimizer and scheduler are those taken."""
    model, callback = _model(), GuardCallback()
    Faulty(model, {12: math.nan})
    trainer = _trainer(tmp_path, callback, model=model, optim=optim)
    trainer.train()
    assert trainer.state.global_step == STEPS
    assert callback.guard.step_count == STEPS - 1
    assert trainer.lr_scheduler.state_dict()["last_epoch"] == STEPS - 1
    assert {float(state["step"]) for state in trainer.optimizer.state.values()} == {STEPS - 1.0}
    assert all(torch.isfinite(p).all() for p in _weights(trainer))


@pytest.mark.parametrize("filtered", [True, False])
def test_what_the_trainers_own_log_makes_of_a_nan_is_said(
    tmp_path: Path, filtered: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """contract: the sentence at the start is what happens, with the filter and without."""
    model = _model()
    Faulty(model, {12: math.nan})
    settings = {"logging_strategy": "steps", "logging_steps": 1, "logging_nan_inf_filter": filtered}
    trainer = _trainer(tmp_path, GuardCallback(), model=model, **settings)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert [math.isnan(loss) for loss in losses] == [not filtered and step >= 12 for step in range(STEPS)]
    assert f"logging_nan_inf_filter={filtered}" in caplog.text
    assert "step 12, batch 12: loss or gradient is not finite" in caplog.text


def test_a_rewind_in_place_goes_on_with_the_loop(tmp_path: Path) -> None:
    """planted: three NaN in a row; weights, optimizer and schedule are of the snapshot, data and count go on."""
    model, callback = _model(), GuardCallback(snapshot_every=5, folder=tmp_path / "guard")
    Faulty(model, {12: math.nan, 13: math.nan, 14: math.nan})
    trainer = _trainer(tmp_path, callback, model=model)
    trainer.train()
    taken = 10 + (STEPS - 15)
    assert trainer.state.global_step == STEPS
    assert callback.guard.step_count == taken
    assert trainer.lr_scheduler.state_dict()["last_epoch"] == taken
    assert [tuple(one)[:2] for one in callback.guard.skips.ranges] == [(12, 15)]


class At(Ladder):
    """Rewinds once, before the step of batch `batch`; the batches it leaves out are [batch - 2, batch + 1)."""

    batch: int = 13
    done: bool = False

    def before_step(self, seen: Seen, live: Live) -> Action:
        if seen.batch_id != self.batch or self.done:
            return CONTINUE
        self.done = True
        return Rewind(seen.healthy[-1], (self.batch - 2, self.batch + 1), "planted")


class Always(Ladder):
    """Rewinds each time batch 11 comes."""

    def before_step(self, seen: Seen, live: Live) -> Action:
        return Rewind(seen.healthy[-1], (9, 12), "planted") if seen.batch_id == 11 else CONTINUE


def _restarts(place: Path, faults: dict[int, float], **settings: Any) -> tuple[Any, GuardCallback]:
    model, callback = _model(), GuardCallback(mode="restart", snapshot_every=5, **settings)
    Faulty(model, faults)
    trainer = _trainer(place, callback, model=model, save_strategy="steps", save_steps=4)
    return trainer, callback


def test_stopped_rewound_and_resumed_is_as_if_uninterrupted(tmp_path: Path) -> None:
    """equivalence: the machine fails at steps 13 to 15; with nothing skipped the run ends bit for bit as without."""
    plain = _trainer(tmp_path / "a", None)
    plain.train()
    trainer, callback = _restarts(tmp_path / "b", dict.fromkeys((13, 14, 15), math.nan), folder=tmp_path / "guard")
    guarded_train(trainer, skip=False)
    assert callback.stopped is None
    assert callback.guard.step_count == callback.guard.batch_id == trainer.state.global_step == STEPS
    assert not callback.guard.skips
    assert _same(_weights(plain), _weights(trainer))
    pairs = zip(plain.optimizer.state.values(), trainer.optimizer.state.values(), strict=True)
    assert all(torch.equal(one[key], other[key]) for one, other in pairs for key in one)


def test_a_restart_leaves_the_skip_list_out(tmp_path: Path) -> None:
    """equivalence: batches 11 to 13 give no update after the restart; as a run whose gradients there are thrown away.

    The listed batches are computed, so both runs draw the same dropout.
    """
    trainer, callback = _restarts(tmp_path / "b", {}, policy=At(), folder=tmp_path / "guard")
    guarded_train(trainer)
    assert callback.guard.step_count == STEPS - 3
    assert callback.guard.batch_id == trainer.state.global_step == STEPS
    assert trainer.lr_scheduler.state_dict()["last_epoch"] == STEPS - 3
    assert (tmp_path / "guard" / "skip.yaml").read_text().count("start: 11") == 1
    # The same list from the start, in a run of its own.
    model, other = _model(), GuardCallback(folder=tmp_path / "guard")
    again = _trainer(tmp_path / "c", other, model=model)
    again.train()
    assert other.guard.step_count == STEPS - 3
    assert _same(_weights(trainer), _weights(again))


def test_a_plain_resume_takes_the_guards_state_along(tmp_path: Path) -> None:
    """round trip: a new process's objects, resumed from a checkpoint; without guard.pt it begins anew and says so."""
    first = GuardCallback(snapshot_every=5)
    trainer = _trainer(tmp_path, first, save_strategy="steps", save_steps=8, model=_model())
    trainer.train()
    second = GuardCallback(snapshot_every=5)
    resumed = _trainer(tmp_path, second, save_strategy="steps", save_steps=8)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-16"))
    assert _same(_weights(trainer), _weights(resumed))
    assert second.guard.step_count == second.guard.batch_id == STEPS
    then = first.guard.state_dict()["watch"]["rules"]["loss"]
    assert second.guard.state_dict()["watch"]["rules"]["loss"] == then
    (tmp_path / "checkpoint-16" / STATE).unlink()
    third = GuardCallback()
    _trainer(tmp_path, third).train(resume_from_checkpoint=str(tmp_path / "checkpoint-16"))
    assert third.guard.step_count == third.guard.batch_id == STEPS


def test_restarts_are_counted_and_sick_checkpoints_put_aside(tmp_path: Path) -> None:
    """planted: a fault that comes back at the same place; training ends with the reason, and never loops."""
    trainer, callback = _restarts(tmp_path, {}, policy=Always())
    guarded_train(trainer, attempts=2, skip=False)
    assert callback.stopped is not None
    assert callback.stopped.reason == "2 restarts did not help: planted"
    # Training stopped with step 12, where one was due: what lay in memory then belonged to no step.
    assert {path.name for path in tmp_path.glob("*checkpoint-*")} == {"checkpoint-4", "checkpoint-8"}
    early, callback = _restarts(tmp_path / "early", dict.fromkeys((1, 2, 3), math.nan))
    guarded_train(early)
    assert callback.stopped is not None
    assert "save more often" in callback.stopped.reason


def test_checkpoints_from_after_the_onset_are_not_resumed(tmp_path: Path) -> None:
    """planted: the onset lies before the last checkpoint, so that one is renamed and the one before it taken."""
    policy = At()
    trainer, callback = _restarts(tmp_path, {}, policy=policy)
    policy.batch = 14  # onset 12; there are checkpoints 4, 8 and 12
    seen: list[Path | None] = []
    real = callback.healthy
    callback.healthy = lambda folder: seen.append(real(folder)) or seen[-1]  # pyright: ignore[reportAttributeAccessIssue]
    (tmp_path / "checkpoint-13").mkdir()
    torch.save({"step": 13}, tmp_path / "checkpoint-13" / STATE)
    guarded_train(trainer)
    assert seen == [tmp_path / "checkpoint-8"]  # 12 is no later than the onset, and later than the snapshot of step 10
    assert (tmp_path / "distrusted-checkpoint-13").is_dir()


def test_the_policy_stops_training(tmp_path: Path) -> None:
    """contract: Stop ends train(), with the last healthy state in the model."""

    class Stops(Ladder):
        def before_step(self, seen: Seen, live: Live) -> Action:
            return Stop("enough") if seen.step == 7 else CONTINUE

    callback = GuardCallback(policy=Stops())
    trainer = _trainer(tmp_path, callback)
    trainer.train()
    assert trainer.state.global_step == 8
    assert callback.stopped == Stop("enough")


def test_dry_run_changes_no_bit(tmp_path: Path) -> None:
    """equivalence: a spike is reported and taken."""
    results = []
    for callback in (None, GuardCallback(dry_run=True)):
        model = _model()
        Faulty(model, dict.fromkeys((20, 21, 22), 1e4))
        trainer = _trainer(tmp_path / str(callback is None), callback, model=model)
        trainer.train()
        results.append(_weights(trainer))
    assert _same(*results)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: GuardCallback(scheduler=None), "the guard takes this from the Trainer"),
        (lambda: GuardCallback(mode="forward"), "mode must be"),  # pyright: ignore[reportArgumentType]
        (lambda: GuardCallback().guard, "training has not begun"),
    ],
)
def test_what_cannot_be_is_refused(build: Callable[[], object], words: str) -> None:
    """planted: by the callback alone."""
    with pytest.raises(ValueError, match=words):
        build()


def test_what_a_trainer_cannot_do_is_refused(tmp_path: Path) -> None:
    """planted: when training begins."""
    with pytest.raises(ValueError, match="mode='restart' goes back to checkpoints"):
        _trainer(tmp_path, GuardCallback(mode="restart")).train()
    with pytest.raises(ValueError, match="one GuardCallback"):
        guarded_train(_trainer(tmp_path, GuardCallback()))


def test_a_grad_scalers_overflow_is_its_own(tmp_path: Path) -> None:
    """planted: as in fp16, six overflows before the first step; the guard waits, and judges none of them as a NaN."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    Accelerator(cpu=True)
    model = nn.Linear(4, 1)
    inner = torch.optim.AdamW(model.parameters(), fused=True)
    wrapper = AcceleratedOptimizer(inner, scaler=torch.amp.GradScaler("cpu"))
    clock = Clock(0, 10, None)
    seat = Seat(model, inner, scheduler=None, clock=clock, settings={})
    for at in range(6):
        model.weight.grad = torch.full((1, 4), math.inf)
        seat.open(at)
        with _Scaled(wrapper):
            assert not seat.begin(torch.tensor(1.0), None)
        seat.finish()
    assert "6 skip" in seat.guard.report()
    assert "rewind" not in seat.guard.report()
    assert "grad_scale" not in vars(inner)


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """contract: it plants a NaN and ends with the guard's report."""
    runpy.run_path(str(Path(__file__).parents[3] / "examples" / "hf_trainer.py"), run_name="__main__")
    assert "99 steps, 1 nonfinite, 1 skip" in capsys.readouterr().out


def test_the_page_runs_as_printed() -> None:
    """contract: the block for the Trainer of docs/guard-adapters.md."""
    page = (Path(__file__).parents[3] / "docs" / "guard-adapters.md").read_text("utf-8")
    blocks = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "adapters.hf import" in block]
    assert len(blocks) == 1
    exec(compile(blocks[0], "guard-adapters.md", "exec"), {"__name__": "page"})
