"""The guard in Lightning's Trainer (lightning 2.6): a callback, and `guarded_fit` for restarts.

    Trainer(callbacks=[GuardCallback(folder="runs/a/guard")]).fit(module, loader)

It judges in `on_before_optimizer_step`, which Lightning calls before it clips. Not for `pytorch_lightning`, which is
another package with other classes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from aftershock.guard.adapters import needed
from aftershock.guard.adapters.seat import Clock, Seat, Seated, check_settings, log
from aftershock.guard.guard import SKIPS
from aftershock.guard.policy import Stop
from aftershock.guard.skiplist import SkipList

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
else:
    Callback = needed("lightning.pytorch", "Callback", install="lightning")

SAID = {
    "in_place": "global_step goes on after a rewind, so a schedule by steps ends as many short as were taken back",
    "restart": "a rewind raises RestartNeeded; run it with guarded_fit, which goes on with a new Trainer from a "
    "healthy checkpoint. Inside an epoch only a loader with a state goes back to its batch: else save at epoch ends",
}


class RestartNeeded(Exception):
    """Training must go on from an earlier checkpoint: `guarded_fit` does that, and nobody else should catch it."""


class GuardCallback(Seated, Callback):
    """Guards `Trainer.fit()` with automatic optimization and one optimizer; `settings` are those of `Guard`.

    - `mode`: "in_place": weights, optimizer and schedule go back, data and `global_step` go on. "restart": `fit`
      raises `RestartNeeded`, and `guarded_fit` goes on from a checkpoint
    - ids are optimizer steps: epoch * steps per epoch + index. A batch on the skip list is still computed, and its
      gradient thrown away
    - the guard's state, and on a single process the random numbers, are in each checkpoint

    Raises ValueError when training begins for manual optimization (use `Guard` in `training_step`), several
    optimizers, DeepSpeed, and loaders without a length.

    Example:
        Trainer(max_epochs=1, callbacks=[GuardCallback()]).fit(module, loader)
    """

    _begins: ClassVar[str] = "Trainer.fit()"

    def __init__(self, *, mode: Literal["in_place", "restart"] = "in_place", **settings: Any) -> None:
        check_settings(settings, "Trainer")
        if mode not in SAID:
            raise ValueError(f"mode must be 'in_place' or 'restart', got {mode!r}")
        self._mode, self._settings = mode, settings
        self._seat: Seat | None = None
        self._hook: Any = None
        self._losses: list[Tensor] = []
        self._batches: list[Any] = []
        self._loaded: Mapping[str, Any] | None = None
        self._live: Mapping[str, Any] | None = None
        self._given_up: Stop | None = None
        self._stepped = False

    # ---- Lightning's moments

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave()
        _check(trainer, pl_module)
        optimizer = trainer.optimizers[0]
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        if len(schedulers) > 1:
            raise ValueError(f"{len(schedulers)} schedulers on one optimizer; chain them (torch's ChainedScheduler)")
        kept = None if self._loaded is None else {**self._loaded["guard"], **(self._live or {})}
        self._seat = Seat(
            pl_module,
            optimizer,
            scheduler=schedulers[0] if schedulers else None,
            clock=Clock(_at(trainer), _steps_per_epoch(trainer), None),
            settings=self._settings | {"mode": self._mode},
            kept=kept,
        )
        self._hook = optimizer.register_step_post_hook(self._after_step)
        if self._loaded is not None and trainer.world_size == 1:
            _set_rng(self._loaded["rng"], late=_drew_early(trainer))
        self._loaded = self._live = None
        if trainer.is_global_zero:
            log.warning("guard in Lightning, mode %s: %s", self._mode, SAID[self._mode])

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._losses, self._batches = [], []
            self._active().open(trainer.current_epoch * _steps_per_epoch(trainer) + _index(trainer, batch_idx))
        self._stepped = False
        self._batches.append(batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        # A GradScaler has scaled it by now; Lightning has divided it by accumulate_grad_batches.
        scaler = _scaler(trainer)
        value = loss.detach().reshape(())
        self._losses.append(value if scaler is None else value / scaler.get_scale())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        loss = torch.stack(self._losses).sum() if self._losses else None
        scaler = _scaler(trainer)
        if scaler is not None:  # an overflow is its own business; the gradients are unscaled, so its scale is 1
            vars(optimizer)["grad_scale"] = torch.ones(())
        try:
            self._active().begin(loss, self._batches[0] if len(self._batches) == 1 else self._batches)
        finally:
            if scaler is not None:
                vars(optimizer).pop("grad_scale", None)
        self._stepped = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._stepped:
            return
        seat = self._active()
        seat.finish()
        if seat.restart is not None:
            raise RestartNeeded(f"{seat.restart.reason}; run this with guarded_fit, which goes on from a checkpoint")
        if seat.guard.stopped is not None:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._leave()

    def state_dict(self) -> dict[str, Any]:
        return {} if self._seat is None else {"guard": self._seat.guard.state_dict(), "rng": _get_rng()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict or None

    # ---- restarting

    def resume(self, checkpoint: Path, *, skip: bool) -> None:
        """The next `fit(ckpt_path=checkpoint)` goes on after this rewind; what the policy learned is kept."""
        before = _state_in(checkpoint)
        assert before is not None
        live = self.guard.state_dict() | {"step": before["step"]}
        if not skip:
            live["stream"] = {**live["stream"], "skips": before["stream"]["skips"]}
            if self._settings.get("folder") is not None:
                SkipList.from_state(before["stream"]["skips"]).write(Path(self._settings["folder"]) / SKIPS)
        self._live = live

    def healthy(self, checkpoints: list[Path]) -> Path | None:
        """The newest of these from before the onset of what training was stopped for; None: there is none. Later ones
        are renamed to `..distrusted`, so that nothing resumes from them."""
        assert self.restart is not None
        found: list[tuple[int, Path]] = []
        for path in checkpoints:
            state = _state_in(path)
            if state is None:
                continue
            at = state["stream"]["next_id"]
            if at <= self.restart.skip[0] and state["step"] <= self.restart.to_step:
                found.append((at, path))
            elif at > self.restart.skip[0]:
                path.rename(path.with_name(f"{path.name}.distrusted"))
                log.warning("guard: %s was saved after the onset and is now %s.distrusted", path, path.name)
        return max(found)[1] if found else None

    def give_up(self, reason: str) -> None:
        """No restart is left."""
        self._given_up = Stop(reason)
        log.warning("guard: %s", reason)

    # ---- inside

    def _active(self) -> Seat:
        assert self._seat is not None, "on_train_start comes first"
        return self._seat

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._active().end()

    def _leave(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._active().guard.close()
        self._hook = None


def guarded_fit(
    make_trainer: Callable[[], Trainer],
    module: LightningModule,
    *,
    ckpt_path: str | Path | None = None,
    attempts: int = 3,
    skip: bool = True,
    **data: Any,
) -> Trainer:
    """`make_trainer().fit(module, **data)`, gone on with a new Trainer from the last healthy checkpoint of its
    ModelCheckpoints each time its guard stopped it for a rewind; the last Trainer is returned.

    - `make_trainer`: gives a new Trainer each time, with the same GuardCallback(mode="restart") object and a
      ModelCheckpoint with `save_top_k=-1`, or `save_last` at least
    - `data`: `train_dataloaders`, `val_dataloaders`, `datamodule`
    - `attempts`, `skip`: as in the Trainer of Hugging Face: restarts at most; whether to leave the batches out

    Raises ValueError when the Trainer lacks either callback.

    Example:
        guard = GuardCallback(mode="restart")
        guarded_fit(lambda: Trainer(callbacks=[guard, ModelCheckpoint("ckpt", save_top_k=-1)]), module,
                    train_dataloaders=loader)
    """
    if attempts < 1:
        raise ValueError(f"attempts must be at least 1, got {attempts}")
    at = None if ckpt_path is None else Path(ckpt_path)
    used = 0
    while True:
        trainer = make_trainer()
        guard = _guard_of(trainer)
        try:
            # Our own checkpoint of a moment ago may hold the module's hyper-parameters as objects.
            trainer.fit(module, ckpt_path=at, weights_only=None if at is None else False, **data)
            return trainer
        except RestartNeeded as request:
            reason = str(request)
        folders = {Path(one.dirpath) for one in _model_checkpoints(trainer) if one.dirpath is not None}
        at = guard.healthy([path for folder in folders for path in sorted(folder.glob("*.ckpt")) if path.is_file()])
        if at is None:
            guard.give_up(f"no checkpoint in {sorted(map(str, folders))} from before {guard.restart}; save more often")
            return trainer
        if used == attempts:
            guard.give_up(f"{attempts} restarts did not help: {reason}")
            return trainer
        used += 1
        guard.resume(at, skip=skip)
        log.warning("guard: restart %d of %d from %s", used, attempts, at)


def _model_checkpoints(trainer: Trainer) -> list[ModelCheckpoint]:
    from lightning.pytorch.callbacks import ModelCheckpoint

    return [one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)]


def _guard_of(trainer: Trainer) -> GuardCallback:
    callbacks: list[Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue] - set by a connector
    found = [one for one in callbacks if isinstance(one, GuardCallback)]
    if len(found) != 1 or found[0]._mode != "restart" or not _model_checkpoints(trainer):
        raise ValueError("guarded_fit needs Trainers with one GuardCallback(mode='restart') and a ModelCheckpoint")
    return found[0]


def _check(trainer: Trainer, module: LightningModule) -> None:
    if not module.automatic_optimization:
        raise ValueError(
            "with manual optimization the module steps the optimizer itself: make a Guard in on_fit_start and call "
            "guard.step(loss) in training_step"
        )
    if len(trainer.optimizers) != 1:
        raise ValueError(f"the guard needs one optimizer, configure_optimizers gave {len(trainer.optimizers)}")
    if "deepspeed" in type(trainer.strategy).__name__.lower():
        raise ValueError("DeepSpeed's engine holds gradients and steps itself: it cannot be vetoed; use FSDP2 or DDP")
    if not math.isfinite(trainer.num_training_batches):
        raise ValueError("the train loader has no length, so steps have no stable ids; set limit_train_batches")


def _steps_per_epoch(trainer: Trainer) -> int:
    return -(-int(trainer.num_training_batches) // trainer.accumulate_grad_batches)


def _index(trainer: Trainer, batch_idx: int) -> int:
    return batch_idx // trainer.accumulate_grad_batches


def _at(trainer: Trainer) -> int:
    """Where training begins: in the middle of an epoch after such a checkpoint."""
    done = 0 if _between_epochs(trainer) else trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return trainer.current_epoch * _steps_per_epoch(trainer) + _index(trainer, done)


def _between_epochs(trainer: Trainer) -> bool:
    done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return done == 0 or done >= trainer.num_training_batches


def _scaler(trainer: Trainer) -> Any:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def _state_in(path: Path) -> dict[str, Any] | None:
    """The guard's state in a checkpoint file; its tensors stay on the disk."""
    file = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    states = [s["guard"] for name, s in file.get("callbacks", {}).items() if "GuardCallback" in name and "guard" in s]
    return states[0] if states else None


def _drew_early(trainer: Trainer) -> bool:
    """Whether the coming epoch's iterator was made, and drew its seed, before the random numbers were loaded."""
    loader = trainer.train_dataloader
    return _between_epochs(trainer) and isinstance(loader, DataLoader) and loader.generator is None


def _get_rng() -> dict[str, Any]:
    """Random numbers of python, numpy, torch and CUDA, as types that `weights_only` loads."""
    version, words, gauss = random.getstate()
    own = np.random.get_state(legacy=False)  # noqa: NPY002 - the user's code may draw from it
    state = own["state"]  # pyright: ignore[reportArgumentType, reportCallIssue]
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "python": [version, list(words), gauss],
        "numpy": {**own, "state": {"key": state["key"].tolist(), "pos": int(state["pos"])}},
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def _set_rng(rng: Mapping[str, Any], *, late: bool) -> None:
    """`late`: the seed that the coming epoch's iterator would have drawn from them is drawn now."""
    version, words, gauss = rng["python"]
    random.setstate((version, tuple(words), gauss))
    key = np.array(rng["numpy"]["state"]["key"], dtype=np.uint32)
    np.random.set_state({**rng["numpy"], "state": {**rng["numpy"]["state"], "key": key}})  # noqa: NPY002 - see above
    torch.set_rng_state(rng["torch"])
    for device, state in enumerate(rng["cuda"]):
        torch.cuda.set_rng_state(state, device)
    if late:
        torch.empty((), dtype=torch.int64).random_()
