"""The guard in a real Lightning Trainer, on the bytes of the interpreter's own library."""

from __future__ import annotations

import argparse
import inspect
import math
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("lightning")

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from aftershock.guard.adapters.lightning import GuardCallback, RestartNeeded, guarded_fit
from aftershock.guard.policies.ladder import Ladder
from aftershock.guard.policy import CONTINUE, Action, Live, Rewind, Seen, Stop

LENGTH, PER_EPOCH, EPOCHS = 16, 12, 3
STEPS = PER_EPOCH * EPOCHS

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
]


class Bytes(LightningModule):
    """Predicts the next byte from the last two, with dropout, so that random numbers count."""

    def __init__(self, faults: dict[int, float] | None = None, *, manual: bool = False) -> None:
        super().__init__()
        self.table, self.drop, self.head = nn.Embedding(256, 16), nn.Dropout(0.1), nn.Linear(16, 256)
        self.calls, self.faults = -1, dict(faults or {})
        self.automatic_optimization = not manual

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.calls += 1
        text = batch[0]
        logits = self.head(self.drop(self.table(text[:, :-1])))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
        return loss * self.faults.pop(self.calls, 1.0)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _module(faults: dict[int, float] | None = None, **settings: Any) -> Bytes:
    torch.manual_seed(0)
    return Bytes(faults, **settings)


def _loader() -> DataLoader[Any]:
    size = LENGTH * 4 * PER_EPOCH
    data = torch.tensor(list(inspect.getsource(argparse).encode()[:size])).view(-1, LENGTH)
    return DataLoader(TensorDataset(data), batch_size=4, shuffle=True)


def _trainer(folder: Path, *callbacks: Any, **changes: Any) -> Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": EPOCHS,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(one, ModelCheckpoint) for one in callbacks),
        "default_root_dir": folder,
    }
    return Trainer(callbacks=list(callbacks), **(settings | changes))


def _fit(folder: Path, module: Bytes, *callbacks: Any, **changes: Any) -> Trainer:
    torch.manual_seed(1)
    trainer = _trainer(folder, *callbacks, **changes)
    trainer.fit(module, _loader())
    return trainer


def _same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def _scheduled(trainer: Trainer) -> int:
    return trainer.lr_scheduler_configs[0].scheduler.last_epoch  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("changes", [{"gradient_clip_val": 0.5}, {"accumulate_grad_batches": 5}])
def test_no_bit_changes(tmp_path: Path, changes: dict[str, Any]) -> None:
    """equivalence: a healthy run ends with the bits of one without; 5 does not divide an epoch's 12 batches."""
    plain, guarded, callback = _module(), _module(), GuardCallback(snapshot_every=5)
    _fit(tmp_path, plain, **changes)
    trainer = _fit(tmp_path, guarded, callback, **changes)
    assert _same(plain, guarded)
    steps = EPOCHS * -(-PER_EPOCH // changes.get("accumulate_grad_batches", 1))
    assert callback.guard.step_count == callback.guard.batch_id == trainer.global_step == steps
    assert not trainer.optimizers[0]._optimizer_step_post_hooks


def test_the_norm_is_that_before_clipping_and_the_loss_that_of_the_step(tmp_path: Path) -> None:
    """oracle: against the module's own loss; with two micro-batches their mean."""
    losses: list[float] = []

    class Told(Bytes):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            losses.append(loss.item())
            return loss

    torch.manual_seed(0)
    callback = GuardCallback()
    _fit(tmp_path, Told(), callback, accumulate_grad_batches=2, gradient_clip_val=1e-3)
    rows = callback.guard.recorder.rows
    assert len(rows) == STEPS // 2
    means = [(a + b) / 2 for a, b in zip(losses[::2], losses[1::2], strict=True)]
    assert [row.loss for row in rows] == pytest.approx(means, rel=1e-6)  # float32 sums
    assert min(row.grad_norm for row in rows) > 1e-2


def test_a_vetoed_step_leaves_weights_moments_and_schedule(tmp_path: Path) -> None:
    """planted: one NaN, one spike."""
    module, callback = _module({15: math.nan, 30: 1e4}), GuardCallback()
    trainer = _fit(tmp_path, module, callback)
    assert trainer.global_step == STEPS
    assert callback.guard.step_count == _scheduled(trainer) == STEPS - 2
    assert {float(state["step"]) for state in trainer.optimizers[0].state.values()} == {STEPS - 2.0}
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_a_rewind_in_place_goes_on_with_the_loop(tmp_path: Path) -> None:
    """planted: three NaN in a row; weights, optimizer and schedule are of the snapshot, data and count go on."""
    module, callback = _module(dict.fromkeys((17, 18, 19), math.nan)), GuardCallback(snapshot_every=5)
    trainer = _fit(tmp_path, module, callback)
    assert trainer.global_step == STEPS
    assert callback.guard.step_count == _scheduled(trainer) == 15 + STEPS - 20
    assert [tuple(one)[:2] for one in callback.guard.skips.ranges] == [(17, 20)]


def _restarting(place: Path, faults: dict[int, float], **settings: Any) -> tuple[Bytes, GuardCallback, Trainer]:
    attempts, skip = settings.pop("attempts", 3), settings.pop("skip", True)
    module, callback = _module(faults), GuardCallback(mode="restart", snapshot_every=5, **settings)

    def make() -> Trainer:
        return _trainer(place, callback, ModelCheckpoint(place / "ckpt", save_top_k=-1, save_on_train_epoch_end=True))

    torch.manual_seed(1)
    loader = _loader()
    trainer = guarded_fit(make, module, train_dataloaders=loader, attempts=attempts, skip=skip)
    return module, callback, trainer


def test_stopped_rewound_and_resumed_is_as_if_uninterrupted(tmp_path: Path) -> None:
    """equivalence: the machine fails in the second epoch; with nothing skipped the run ends bit for bit as without."""
    plain = _module()
    _fit(tmp_path, plain)
    faults: dict[int, float] = dict.fromkeys((17, 18, 19), math.nan)
    module, callback, trainer = _restarting(tmp_path, faults, skip=False, folder=tmp_path / "guard")
    assert callback.stopped is None
    assert module.calls == STEPS - 1 + 8  # 12 to 19 were done twice
    assert callback.guard.step_count == callback.guard.batch_id == trainer.global_step == STEPS
    assert _same(plain, module)


def test_a_restart_leaves_the_skip_list_out(tmp_path: Path) -> None:
    """planted: the batches of the rewind give no update when they come again."""
    module, callback, trainer = _restarting(tmp_path, dict.fromkeys((17, 18, 19), math.nan))
    assert callback.guard.step_count == _scheduled(trainer) == STEPS - 3
    assert [tuple(one)[:2] for one in callback.guard.skips.ranges] == [(17, 20)]
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_restarts_are_counted(tmp_path: Path) -> None:
    """planted: a fault that stays, and one before the first checkpoint."""

    class Always(Ladder):
        def before_step(self, seen: Seen, live: Live) -> Action:
            return Rewind(seen.healthy[-1], (17, 20), "planted") if seen.batch_id == 19 else CONTINUE

    _, callback, _ = _restarting(tmp_path / "a", {}, attempts=1, skip=False, policy=Always())
    assert callback.stopped is not None
    assert "1 restarts did not help: planted" in callback.stopped.reason
    _, callback, _ = _restarting(tmp_path / "b", dict.fromkeys((2, 3, 4), math.nan))
    assert callback.stopped is not None
    assert "no checkpoint" in callback.stopped.reason


def test_a_plain_resume_takes_the_guards_state_along(tmp_path: Path) -> None:
    """round trip: another callback, Trainer and module, from the checkpoint after the second epoch."""
    first, second = GuardCallback(), GuardCallback()
    module, again = _module(), _module()
    keep = ModelCheckpoint(tmp_path, save_top_k=-1, save_on_train_epoch_end=True, filename="{epoch}")
    _fit(tmp_path, module, first, keep)
    _trainer(tmp_path, second, keep).fit(again, _loader(), ckpt_path=str(tmp_path / "epoch=1.ckpt"), weights_only=True)
    assert _same(module, again)
    assert second.guard.step_count == second.guard.batch_id == STEPS
    assert first.guard.state_dict()["watch"] == second.guard.state_dict()["watch"]


def test_the_policy_stops_training(tmp_path: Path) -> None:
    """contract: Stop ends fit()."""

    class Stops(Ladder):
        def before_step(self, seen: Seen, live: Live) -> Action:
            return Stop("enough") if seen.step == 7 else CONTINUE

    callback = GuardCallback(policy=Stops())
    trainer = _fit(tmp_path, _module(), callback)
    assert trainer.global_step == 8
    assert callback.stopped == Stop("enough")


def test_without_guarded_fit_a_restart_says_what_to_do(tmp_path: Path) -> None:
    """contract: nothing goes on silently."""

    class Back(Ladder):
        def before_step(self, seen: Seen, live: Live) -> Action:
            return Rewind(seen.healthy[-1], (6, 8), "planted") if seen.batch_id == 7 else CONTINUE

    with pytest.raises(RestartNeeded, match="planted; run this with guarded_fit"):
        _fit(tmp_path, _module(), GuardCallback(mode="restart", policy=Back()))


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    """planted: at once, or when training begins."""
    with pytest.raises(ValueError, match="takes this from the Trainer"):
        GuardCallback(scaler=None)
    with pytest.raises(ValueError, match="mode must be"):
        GuardCallback(mode="back")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="has not begun"):
        _ = GuardCallback().guard
    with pytest.raises(ValueError, match="manual optimization"):
        _fit(tmp_path, _module(manual=True), GuardCallback())
    with pytest.raises(ValueError, match="and a ModelCheckpoint"):
        guarded_fit(lambda: _trainer(tmp_path, GuardCallback(mode="restart")), _module())


# Lightning steps the scheduler after an overflow too, guard or not; it is put back, and torch cannot know that.
@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step:UserWarning")
def test_a_grad_scaler_is_seen_through(tmp_path: Path) -> None:
    """planted: a scale that overflows float16 for some steps; those are its own, and the loss is judged unscaled."""
    from lightning.pytorch.plugins import MixedPrecision

    callback = GuardCallback()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26)
    module = _module()
    _fit(tmp_path, module, callback, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
    skips = STEPS - callback.guard.step_count
    assert 3 < skips < STEPS // 2
    assert f"{skips} skip" in callback.guard.report()
    assert "rewind" not in callback.guard.report()
    assert callback.guard.recorder.rows[0].loss == pytest.approx(math.log(256), abs=0.5)  # untrained: about ln 256


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """contract: it plants a NaN and ends with the guard's report."""
    runpy.run_path(str(Path(__file__).parents[3] / "examples" / "lightning_trainer.py"), run_name="__main__")
    assert "99 steps, 1 nonfinite, 1 skip" in capsys.readouterr().out


def test_the_page_runs_as_printed() -> None:
    """contract: the block for the Trainer of docs/guard-adapters.md."""
    page = (Path(__file__).parents[3] / "docs" / "guard-adapters.md").read_text("utf-8")
    blocks = [
        block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "adapters.lightning import" in block
    ]
    assert len(blocks) == 1
    exec(compile(blocks[0], "guard-adapters.md", "exec"), {"__name__": "page"})
