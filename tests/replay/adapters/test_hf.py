"""The workload of a real transformers Trainer, on the bytes of the interpreter's own library."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from torch.utils.data import IterableDataset, RandomSampler
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from aftershock.guard.adapters.hf import GuardCallback
from aftershock.guard.digest import of_batch, of_rng
from aftershock.guard.disk import load_snapshot
from aftershock.guard.incidentrecord import read_incidents
from aftershock.guard.state import Training
from aftershock.replay.adapters.hf import workload_from_trainer
from aftershock.replay.controls import run_controls
from aftershock.replay.loop import take_steps
from aftershock.replay.run import Run, Window
from aftershock.replay.subject import Subject
from aftershock.workload import Workload

LENGTH, STEPS = 16, 12


@pytest.fixture(autouse=True)
def _quiet() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


def _text(rows: int) -> list[dict[str, Tensor]]:
    data = torch.tensor(list(inspect.getsource(argparse).encode()[: LENGTH * rows])).view(rows, LENGTH)
    return [{"input_ids": row, "labels": row} for row in data]


def _gpt2() -> Any:
    torch.manual_seed(0)
    # With its default dropout of 0.1: random numbers count.
    return GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=LENGTH, n_embd=16, n_layer=1, n_head=2))


def _llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=256, max_position_embeddings=LENGTH, attention_dropout=0.1, **sizes)  # pyright: ignore[reportArgumentType]
    return LlamaForCausalLM(config)


class Means(nn.Module):
    """A model that is told nothing of the other micro-batches: its loss is the mean of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.drop, self.head = nn.Embedding(256, 8), nn.Dropout(0.1), nn.Linear(8, 256)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.drop(self.table(input_ids[:, :-1])))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())}


def _means() -> nn.Module:
    torch.manual_seed(0)
    return Means()


def _trainer(
    folder: Path,
    build: Callable[[], Any] = _gpt2,
    *,
    rows: int = 28,
    data: Any = None,
    kind: type[Trainer] = Trainer,
    callbacks: Any = (),
    **changes: Any,
) -> Any:
    parts = {
        name: changes.pop(name) for name in ("data_collator", "model_init", "compute_loss_func") if name in changes
    }
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "save_strategy": "no",
        "logging_strategy": "steps",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    return kind(
        None if "model_init" in parts else build(),
        TrainingArguments(**(settings | changes)),
        train_dataset=_text(rows) if data is None else data,  # pyright: ignore[reportArgumentType]
        eval_dataset=_text(8),  # pyright: ignore[reportArgumentType] - a list is a map-style dataset
        callbacks=list(callbacks),
        **parts,
    )


def _losses(workload: Workload, stop: int, *, start: int = 0) -> list[float]:
    """Those of a plain loop from where the workload stands."""
    training = Training(workload.model, workload.optimizer, scheduler=workload.scheduler)
    return [taken.loss for taken in take_steps(Run(workload, training, Window(0, 0, 0, 1)), start, stop)]


def _same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize(
    ("build", "changes"),
    [
        (_gpt2, {"gradient_accumulation_steps": 2}),  # 7 batches an epoch: every fourth step has one only
        (_llama, {"gradient_accumulation_steps": 2}),
        (_llama, {"bf16": True, "optim": "sgd", "max_grad_norm": 0.0}),
        (_gpt2, {"eval_strategy": "steps", "eval_steps": 5, "eval_on_start": True}),
        (_gpt2, {"eval_strategy": "epoch", "max_steps": -1, "num_train_epochs": 1.7, "data_seed": 5}),
        (_means, {"gradient_accumulation_steps": 2, "warmup_steps": 3}),
    ],
)
def test_a_plain_loop_has_the_trainers_losses(
    tmp_path: Path, build: Callable[[], Any], changes: dict[str, Any]
) -> None:
    """equivalence: bit for bit, with dropout, over epochs; and the last weights."""
    trainer = _trainer(tmp_path, build, **changes)
    trainer.train()
    logged = [row["loss"] for row in trainer.state.log_history if "grad_norm" in row]
    assert len(logged) == STEPS
    other = _trainer(tmp_path, build, **changes)
    before = of_rng()
    workload = workload_from_trainer(other)
    assert of_rng() == before
    assert _losses(workload, STEPS) == logged
    assert _same(trainer.model, other.model)
    assert (workload.clip_norm is None) == (changes.get("max_grad_norm") == 0.0)


def test_odd_accumulation_is_exact_but_for_the_reported_loss(tmp_path: Path) -> None:
    """equivalence: three micro-batches: x * 3 / 3 may be the float beside x, and its gradient is not touched."""
    trainer = _trainer(tmp_path, gradient_accumulation_steps=3)
    trainer.train()
    logged = [row["loss"] for row in trainer.state.log_history if "grad_norm" in row]
    other = _trainer(tmp_path, gradient_accumulation_steps=3)
    assert _losses(workload_from_trainer(other), STEPS) == pytest.approx(logged, rel=3e-7)  # three roundings of float32
    assert _same(trainer.model, other.model)


def test_the_trainer_stays_as_it_was(tmp_path: Path) -> None:
    """contract: making a workload and asking it for batches in any order changes no bit of what `train()` does."""
    plain = _trainer(tmp_path)
    plain.train()
    trainer = _trainer(tmp_path)
    workload = workload_from_trainer(trainer)
    digests = {i: of_batch(workload.batch(i)) for i in (9, 0, 3, 9, 7)}
    assert all(of_batch(workload.batch(i)) == digest for i, digest in digests.items())
    assert len(set(digests.values())) == 4
    assert trainer.optimizer is None
    trainer.train()
    assert _same(plain.model, trainer.model)


def test_a_short_step_is_filled_with_micro_batches_of_no_rows(tmp_path: Path) -> None:
    """contract: 7 batches of 4, two a step: the last step of the epoch has one, and its filling costs nothing."""
    workload = workload_from_trainer(_trainer(tmp_path, gradient_accumulation_steps=2))
    first, second = workload.batch(3)
    assert (first["input_ids"].shape, second["input_ids"].shape) == ((4, LENGTH), (0, LENGTH))
    assert first["num_items_in_batch"] == second["num_items_in_batch"] > 0
    state = of_rng()
    loss = workload.loss(workload.model, second)
    loss.backward()
    assert (loss.item(), of_rng()) == (0.0, state)
    assert all(p.grad is None for p in workload.model.parameters())


def _plant(trainer: Any, batches: range) -> None:
    """Random labels in the rows that the Trainer will draw for these steps."""
    workload = workload_from_trainer(trainer)
    rows = torch.cat([workload.batch(i)["input_ids"] for i in batches])
    random = torch.Generator().manual_seed(0)
    for i, row in enumerate(trainer.train_dataset):
        if (rows == row["input_ids"]).all(1).any():
            labels = torch.randint(256, (LENGTH,), generator=random)
            trainer.train_dataset[i] = {"input_ids": row["input_ids"], "labels": labels}


def test_an_incident_is_replayed(tmp_path: Path) -> None:
    """planted: four batches of random labels; the guard skips, and the replay has the recorded losses bit for bit."""
    bad = range(65, 69)
    settings: Any = {"rows": 600, "max_steps": 70, "per_device_train_batch_size": 8, "lr_scheduler_type": "constant"}
    guard = GuardCallback(folder=tmp_path / "guard", incident_state="all", snapshot_every=10, threshold=5.0)
    trainer = _trainer(tmp_path, callbacks=[guard], **settings)
    _plant(trainer, bad)
    trainer.train()
    (incident,) = read_incidents(tmp_path / "guard")
    assert (incident.onset.batch_id, incident.kind) == (bad.start, "skip")
    logged = [row["loss"] for row in trainer.state.log_history if "grad_norm" in row]
    again = _trainer(tmp_path, **settings)  # as another process would make it
    _plant(again, bad)
    subject = Subject.from_incident(incident.folder, workload_from_trainer(again))
    assert (subject.window.start, subject.window.onset) == (60, bad.start)
    assert not [note for note in subject.notes if "copies" in note]
    assert [subject.recorded[step] for step in range(55, 66)] == logged[55:66]
    controls = run_controls(subject, steps=8)
    assert (controls.kind, controls.came_back) == ("deterministic", 3)
    # The Trainer that has trained serves as well, taken back.
    workload = workload_from_trainer(trainer)
    assert incident.snapshot is not None
    training = Training(workload.model, workload.optimizer, scheduler=workload.scheduler)
    training.restore(load_snapshot(incident.snapshot).state, rng=True)
    assert _losses(workload, 66, start=60) == logged[60:66]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(_text(8))


def _noisy(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    ids = torch.stack([row["input_ids"] for row in rows])
    return {"input_ids": torch.where(torch.rand(ids.shape) < 0.1, 0, ids), "labels": ids}


class Shuffling(Trainer):
    """Draws its order from a generator that nobody seeds anew."""

    def get_train_dataloader(self) -> Any:
        loader: Any = super().get_train_dataloader()
        loader.set_sampler(RandomSampler(range(28)))
        return loader


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": Stream()}, "are a stream"),
        ({"data_collator": _noisy}, "collator draws from the process's random numbers"),
        ({"kind": Shuffling}, "the sampler draws each epoch's order"),
    ],
)
def test_data_without_an_index_are_refused_when_asked_for(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    """planted: the workload itself is made, since kept copies can be replayed with it."""
    workload = workload_from_trainer(_trainer(tmp_path, **changes))
    with pytest.raises(ValueError, match=words):
        workload.batch(0)


class Stepping(Trainer):
    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().training_step(*args, **kwargs)


class Freezes(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].requires_grad_(False)


class Prints(TrainerCallback):
    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        print(state.global_step)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"label_smoothing_factor": 0.1}, "label smoother"),
        ({"compute_loss_func": lambda outputs, labels, **kw: outputs.loss}, "override compute_loss instead"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
        ({"kind": Stepping}, "overrides training_step"),
        ({"model_init": _gpt2}, "model_init"),
        ({"callbacks": [Freezes()]}, "Freezes may change training in on_step_end"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"}, "ReduceLROnPlateau steps with"),
    ],
)
def test_what_a_plain_loop_cannot_do_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    """planted: with what to do."""
    with pytest.raises(ValueError, match=words):
        workload_from_trainer(_trainer(tmp_path, **changes))


def test_callbacks_that_only_look_pass(tmp_path: Path) -> None:
    """contract: those without an acting event, and those that are said to be harmless."""
    trainer = _trainer(tmp_path, callbacks=[Prints(), Freezes()])
    assert workload_from_trainer(trainer, harmless=["Freezes"]).accumulate == 1
