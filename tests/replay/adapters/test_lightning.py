"""The workload of a real Lightning Trainer, on the bytes of the interpreter's own library."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("lightning")

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import DataLoader, IterableDataset, Sampler, TensorDataset

from aftershock.guard.adapters.lightning import GuardCallback
from aftershock.guard.digest import of_batch
from aftershock.guard.incidentrecord import read_incidents
from aftershock.guard.state import Training
from aftershock.replay.adapters.lightning import workload_from_lightning
from aftershock.replay.controls import run_controls
from aftershock.replay.loop import take_steps
from aftershock.replay.run import Run, Window
from aftershock.replay.subject import Subject
from aftershock.workload import Workload

LENGTH, PER_EPOCH, EPOCHS = 16, 12, 3

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
]


class Bytes(LightningModule):
    """Predicts the next byte from the last one, with dropout, so that random numbers count; remembers what it saw."""

    def __init__(self, *, interval: str = "step", frequency: int = 1, rate: float = 1e-2) -> None:
        super().__init__()
        self.table, self.drop, self.head = nn.Embedding(256, 16), nn.Dropout(0.1), nn.Linear(16, 256)
        self.config, self.rate = {"interval": interval, "frequency": frequency}, rate
        self.seen: list[tuple[int, float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.head(self.drop(self.table(batch[0])))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[1].flatten())
        self.log("loss", loss)
        self.seen.append((batch_idx, loss.item()))
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.rate)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, **self.config}}


def _data(*, batches: int = PER_EPOCH, bad: range = range(0)) -> TensorDataset:
    """Pairs of bytes; those of the batches `bad`, counted in order, have random targets."""
    text = torch.tensor(list(inspect.getsource(argparse).encode()[: LENGTH * 4 * batches + 1]))
    inputs, targets = text[:-1].view(-1, LENGTH), text[1:].clone().view(-1, LENGTH)
    random = torch.Generator().manual_seed(0)
    rows = slice(4 * bad.start, 4 * bad.stop)
    targets[rows] = torch.randint(256, targets[rows].shape, generator=random)
    return TensorDataset(inputs, targets)


def _loader(*, seeded: bool = True, shuffle: bool = True, **data: Any) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(5) if seeded else None
    return DataLoader(_data(**data), batch_size=4, shuffle=shuffle, generator=generator)


def _module(**settings: Any) -> Bytes:
    torch.manual_seed(0)
    return Bytes(**settings)


def _trainer(folder: Path, *callbacks: Callback, **changes: Any) -> Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": EPOCHS,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": folder,
    }
    torch.manual_seed(1)
    return Trainer(callbacks=list(callbacks), **(settings | changes))


def _train(workload: Workload, steps: int) -> None:
    training = Training(workload.model, workload.optimizer, scheduler=workload.scheduler)
    for _ in take_steps(Run(workload, training, Window(0, 0, 0, 1)), 0, steps):
        pass


def _same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


class Module(LightningDataModule):
    def setup(self, stage: str) -> None:
        self.data = _loader()

    def train_dataloader(self) -> Any:
        return self.data


@pytest.mark.parametrize(
    ("module", "data", "changes"),
    [
        ({}, _loader, {"gradient_clip_val": 0.5}),
        ({}, _loader, {"accumulate_grad_batches": 5}),  # 12 batches: the last step of an epoch has two
        ({"interval": "epoch"}, lambda: _loader(seeded=False, shuffle=False), {"accumulate_grad_batches": 2}),
        ({"interval": "epoch", "frequency": 2}, Module, {"max_epochs": 4}),
        ({"interval": "step", "frequency": 4}, _loader, {"limit_train_batches": 10, "precision": "bf16-mixed"}),
    ],
)
def test_a_plain_loop_has_the_trainers_losses(
    tmp_path: Path, module: dict[str, Any], data: Any, changes: dict[str, Any]
) -> None:
    """equivalence: bit for bit, with dropout, over epochs, each with its number in the epoch; and the last weights."""
    fitted = _module(**module)
    trainer = _trainer(tmp_path, **changes)
    trainer.fit(fitted, data())
    again = _module(**module)
    workload = workload_from_lightning(again, data(), trainer=_trainer(tmp_path, **changes))
    _train(workload, trainer.global_step)
    assert again.seen == fitted.seen
    assert _same(fitted, again)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in (trainer.optimizers[0], workload.optimizer)]
    assert rates[0] == rates[1] < 1e-2


def test_batches_are_a_function_of_the_index(tmp_path: Path) -> None:
    """contract: in any order; the loader's own generator stays where it stood."""
    loader = _loader()
    workload = workload_from_lightning(_module(), loader, trainer=_trainer(tmp_path))
    assert loader.generator is not None
    before = loader.generator.get_state()
    digests = {i: of_batch(workload.batch(i)) for i in (30, 0, 13, 30, 1)}
    assert all(of_batch(workload.batch(i)) == digest for i, digest in digests.items())
    assert len(set(digests.values())) == 4
    assert torch.equal(loader.generator.get_state(), before)


class Drawing(Sampler[int]):
    """In order, yet it takes a random number first, as an unseeded shuffle does."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[int]:
        torch.rand(())
        return iter(range(self.length))

    def __len__(self) -> int:
        return self.length


@pytest.mark.parametrize("sampler", [None, Drawing])
def test_an_incident_is_replayed(tmp_path: Path, sampler: Any) -> None:
    """planted: random targets; bit for bit. Where no index tells the order, the copies that the guard kept serve."""
    data = _data(batches=72, bad=range(65, 69))
    loader = DataLoader(data, batch_size=4, sampler=None if sampler is None else sampler(len(data)))
    guard = GuardCallback(folder=tmp_path / "guard", incident_state="all", snapshot_every=10, threshold=5.0)
    fitted = _module(rate=3e-2)
    _trainer(tmp_path, guard, max_epochs=1).fit(fitted, loader)
    (incident,) = read_incidents(tmp_path / "guard")
    assert incident.at.batch_id == 65
    again = workload_from_lightning(_module(rate=3e-2), loader, trainer=_trainer(tmp_path, max_epochs=1))
    subject = Subject.from_incident(incident.folder, again)
    assert [subject.recorded[step] for step in range(55, 66)] == [loss for _, loss in fitted.seen[55:66]]
    copies = [note for note in subject.notes if "kept copies are replayed, and nothing after them" in note]
    assert len(copies) == (subject.stop is not None) == (sampler is not None)
    controls = run_controls(subject, steps=18)
    assert (controls.kind, controls.came_back) == ("deterministic", 3)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(_data())


@pytest.mark.parametrize(
    ("data", "words"),
    [(DataLoader(Stream(), batch_size=4), "are a stream"), (_loader(seeded=False), "the sampler draws each epoch's")],
)
def test_data_without_an_index_are_refused_when_asked_for(tmp_path: Path, data: Any, words: str) -> None:
    """planted: the workload itself is made, since kept copies can be replayed with it."""
    trainer = _trainer(tmp_path, max_epochs=-1, max_steps=10)
    workload = workload_from_lightning(_module(), data, trainer=trainer)
    with pytest.raises(ValueError, match=words):
        workload.batch(0)


class Manual(Bytes):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Two(Bytes):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.table.parameters()), torch.optim.SGD(self.head.parameters())]


class Plateau(Bytes):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "loss"}}


class Noisy(Bytes):
    def on_after_backward(self) -> None:
        self.head.bias.grad = None


class Freezes(Callback):
    def on_train_batch_end(self, *args: Any) -> None:
        args[1].requires_grad_(False)


@pytest.mark.parametrize(
    ("module", "changes", "words"),
    [
        (Manual, {}, "manual optimization"),
        (Two, {}, "multiple optimizers"),
        (Plateau, {}, "replace one that steps with a metric"),
        (Noisy, {}, "Noisy overrides on_after_backward"),
        (Bytes, {"callbacks": [Freezes()]}, "Freezes may change training in on_train_batch_end"),
        (Bytes, {"callbacks": [GradientAccumulationScheduler({0: 2})]}, "GradientAccumulationScheduler may change"),
        (Bytes, {"strategy": "ddp"}, "one process on one device"),
        (Bytes, {"precision": "64-true"}, "only float32 and bf16-mixed"),
        (Bytes, {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}, "clipped by value"),
    ],
)
def test_what_a_plain_loop_cannot_do_is_refused(
    tmp_path: Path, module: type[Bytes], changes: dict[str, Any], words: str
) -> None:
    """planted: with what to do."""
    trainer = _trainer(tmp_path, *changes.pop("callbacks", ()), **changes)
    with pytest.raises(ValueError, match=words):
        workload_from_lightning(module(), _loader(), trainer=trainer)


def test_a_fitted_trainer_goes_on_where_it_ended(tmp_path: Path) -> None:
    """contract: with its own optimizer and schedule; a loader whose generator has moved on must be given anew."""
    module, trainer = _module(), _trainer(tmp_path)
    trainer.fit(module, _loader())
    with pytest.raises(ValueError, match="generator has moved on"):
        workload_from_lightning(module, trainer=trainer)
    workload = workload_from_lightning(module, _loader(), trainer=trainer)
    assert workload.optimizer is trainer.optimizers[0]
    fresh = workload_from_lightning(_module(), _loader(), trainer=_trainer(tmp_path))
    assert [of_batch(workload.batch(i)) for i in (0, 20)] == [of_batch(fresh.batch(i)) for i in (0, 20)]


def test_hooks_said_to_be_harmless_pass(tmp_path: Path) -> None:
    """contract: the module's and a callback's."""
    harmless = ["on_after_backward", "Freezes"]
    trainer = _trainer(tmp_path, Freezes())
    assert workload_from_lightning(Noisy(), _loader(), trainer=trainer, harmless=harmless).accumulate == 1
