"""The guard in Hugging Face's Trainer (transformers 5): a callback, and `guarded_train` for restarts.

    Trainer(model, args, train_dataset=data, callbacks=[GuardCallback(folder="runs/a/guard")]).train()

The Trainer clips before a callback can look, so the callback takes the clipping over: from the start of each step until
the gradients were judged `args.max_grad_norm` reads 0, and the guard clips to it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from aftershock.guard.adapters import needed
from aftershock.guard.adapters.seat import Clock, Seat, Seated, check_settings, log
from aftershock.guard.guard import SKIPS
from aftershock.guard.hooks import loss_of
from aftershock.guard.policy import Stop
from aftershock.guard.skiplist import SkipList

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_utils import TrainOutput
else:
    TrainerCallback = needed("transformers.trainer_callback", "TrainerCallback", install="transformers[torch]")

STATE = "guard.pt"
"""In each checkpoint folder, beside the Trainer's own files."""
SAID = {
    "in_place": "the loop's count goes on after a rewind, so the schedule ends as many steps short as were taken back",
    "restart": "a rewind stops training; run it with guarded_train(trainer), which resumes from a healthy checkpoint",
}


class GuardCallback(Seated, TrainerCallback):
    """Guards `Trainer.train()`: skips and rewinds, or stops for a restart; `settings` are those of `Guard`.

    - `mode`: "in_place": weights, optimizer and schedule go back, data and `global_step` go on. "restart": training
      stops with `restart` set, and `guarded_train` goes on from a checkpoint, data included
    - ids are steps of the Trainer (`global_step` before the step). A batch on the skip list is still computed, and
      its gradient thrown away, so that `global_step` keeps its meaning as a place in the data
    - the loss is what the model returns; with `compute_loss_func` or label smoothing the gradient alone decides

    The guard's state is `guard.pt` in each checkpoint. What the Trainer's own log shows of a NaN is said at the start.
    Raises ValueError when training begins for what cannot be guarded: DeepSpeed, DataParallel, LOMO, SageMaker.

    Example:
        trainer = Trainer(model, args, train_dataset=data, callbacks=[GuardCallback()])
        trainer.train()
    """

    _begins: ClassVar[str] = "Trainer.train()"

    def __init__(self, *, mode: Literal["in_place", "restart"] = "in_place", **settings: Any) -> None:
        check_settings(settings, "Trainer")
        if mode not in SAID:
            raise ValueError(f"mode must be 'in_place' or 'restart', got {mode!r}")
        self._mode, self._settings = mode, settings
        self._clip_norm: float | None = settings.get("clip_norm")
        self._seat: Seat | None = None
        self._hooks: list[Any] = []
        self._hidden: tuple[TrainingArguments, float] | None = None
        self._losses: list[Tensor] = []
        self._inputs: list[dict[str, Tensor]] = []
        self._summed = self._told_no_loss = False
        self._coming: tuple[Path | None, Mapping[str, Any] | None] = (None, None)
        self._given_up: Stop | None = None

    # ---- the Trainer's events

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self._leave()
        model, optimizer = kw["model"], _inner(kw["optimizer"])
        self._check(args, state, optimizer)
        per_epoch = _steps_per_epoch(kw["train_dataloader"], args)
        samples = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        limit = args.max_grad_norm if self._clip_norm is None else self._clip_norm
        self._seat = Seat(
            model,
            optimizer,
            scheduler=kw["lr_scheduler"],
            clock=Clock(state.global_step, per_epoch, samples),
            settings=self._settings | {"mode": self._mode, "clip_norm": limit or None},
            kept=self._kept(args, state),
        )
        self._coming = (None, None)
        self._hooks = [model.register_forward_hook(self._after_forward, with_kwargs=True)]
        if state.is_world_process_zero:
            log.warning("guard in Trainer, mode %s: %s; %s", self._mode, SAID[self._mode], _about_log(args))

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self._losses, self._inputs = [], []
        self._hidden = (args, args.max_grad_norm)
        args.max_grad_norm = 0.0
        self._active().open(state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        self._show()
        seat = self._active()
        inputs = self._inputs[0] if len(self._inputs) == 1 else self._inputs
        with _Scaled(kw["optimizer"]):
            seat.begin(self._loss(args), inputs or None)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        self._active().end()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self._active().finish()
        self._steer(control)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self._steer(control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if args.should_save and folder.is_dir():
            torch.save(self.guard.state_dict(), folder / STATE)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self._active().guard.close()
        self._leave()

    # ---- restarting

    def resume(self, checkpoint: Path, *, skip: bool) -> None:
        """The next `train()` goes on from `checkpoint` after this rewind; what the policy learned is kept.

        `skip=False`: the batches that the rewind would leave out are trained on again.
        """
        seat = self._active()
        assert seat.restart is not None
        before = torch.load(checkpoint / STATE, weights_only=True)
        live = seat.guard.state_dict() | {"step": before["step"]}
        if not skip:
            live["stream"] = {**live["stream"], "skips": before["stream"]["skips"]}
            if self._settings.get("folder") is not None:
                SkipList.from_state(before["stream"]["skips"]).write(Path(self._settings["folder"]) / SKIPS)
        self._coming = (checkpoint, live)

    def healthy(self, folder: str | Path) -> Path | None:
        """The newest checkpoint in `folder` from before the onset of what training was stopped for; None: there is
        none. Later ones are renamed to `distrusted-checkpoint-..`, so that nothing resumes from them."""
        assert self.restart is not None
        found: list[tuple[int, Path]] = []
        for path in Path(folder).glob("checkpoint-*"):
            number = re.fullmatch(r"checkpoint-(\d+)", path.name)
            if number is None or not (path / STATE).is_file():
                continue
            step = torch.load(path / STATE, weights_only=True)["step"]
            if int(number[1]) <= self.restart.skip[0] and step <= self.restart.to_step:
                found.append((int(number[1]), path))
            elif int(number[1]) > self.restart.skip[0]:
                _distrust(path)
        return max(found)[1] if found else None

    def give_up(self, reason: str) -> None:
        """No restart is left."""
        self._given_up = Stop(reason)
        log.warning("guard: %s", reason)

    # ---- inside

    def _active(self) -> Seat:
        assert self._seat is not None, "on_train_begin comes first"
        return self._seat

    def _check(self, args: TrainingArguments, state: TrainerState, optimizer: Optimizer) -> None:
        if args.deepspeed is not None:
            raise ValueError(
                "DeepSpeed's engine holds gradients and steps itself: it cannot be vetoed; use FSDP2 or DDP"
            )
        if args.n_gpu > 1:
            raise ValueError("DataParallel copies the model for each batch; start one process per GPU with torchrun")
        if type(optimizer).__name__ in ("Lomo", "AdaLomo"):
            raise ValueError(
                "LOMO updates the weights within backward, before anything can be judged; use another optim"
            )
        if state.is_hyper_param_search:
            raise ValueError("a hyper-parameter search has a run for each trial; guard a single run")
        if self._mode == "restart" and (args.save_strategy == "no" or args.save_only_model or args.ignore_data_skip):
            raise ValueError(
                "mode='restart' goes back to checkpoints of the whole run: set save_strategy='steps' and save_steps, "
                "save_only_model=False and ignore_data_skip=False"
            )

    def _kept(self, args: TrainingArguments, state: TrainerState) -> Mapping[str, Any] | None:
        """The guard's state for where the Trainer stands: given by `resume`, or in the checkpoint it came from."""
        if self._coming[1] is not None or not state.global_step:
            return self._coming[1]
        given = args.resume_from_checkpoint
        tried = [Path(given)] if isinstance(given, str) else []
        tried += [self._coming[0] or Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"]
        for path in tried:
            if (path / STATE).is_file():
                return torch.load(path / STATE, weights_only=True)
        log.warning("guard: no %s in %s: it starts anew and learns what is normal", STATE, tried[-1])
        return None

    def _after_forward(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        if not model.training or not torch.is_grad_enabled():
            return
        self._inputs.append({name: value for name, value in kwargs.items() if isinstance(value, Tensor)})
        loss = loss_of(output)
        if loss is not None:
            self._losses.append(loss.detach().reshape(()))
            # A model that was told how many tokens the step has divides by them: its micro-batches add up.
            self._summed = kwargs.get("num_items_in_batch") is not None

    def _loss(self, args: TrainingArguments) -> Tensor | None:
        if not self._losses:
            if not self._told_no_loss:
                log.warning("guard: the model returned no loss (compute_loss_func?): the gradient norm alone decides")
            self._told_no_loss = True
            return None
        losses = torch.stack(self._losses)
        if not self._summed:
            return losses.mean()
        return losses.sum() * (args.world_size if args.average_tokens_across_devices else 1)

    def _steer(self, control: TrainerControl) -> None:
        seat = self._active()
        if seat.restart is not None:
            # What is in memory now belongs to no step of the Trainer: no checkpoint may hold it.
            control.should_training_stop, control.should_save, control.should_evaluate = True, False, False
        elif seat.guard.stopped is not None:
            control.should_training_stop = True

    def _show(self) -> None:
        """The Trainer's clipping as its user set it."""
        if self._hidden is not None:
            args, limit = self._hidden
            args.max_grad_norm = limit
        self._hidden = None

    def _leave(self) -> None:
        self._show()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def guarded_train(
    trainer: Trainer, *, resume_from_checkpoint: str | Path | bool | None = None, attempts: int = 3, skip: bool = True
) -> TrainOutput:
    """`trainer.train()`, gone on from the last healthy checkpoint each time its guard stopped it for a rewind.

    - `attempts`: restarts at most; then the last output is returned and `callback.stopped` says why
    - `skip`: leave out the batches from the onset to the rewind. False: take the same data again, for faults of the
      machine; the run then ends with the bits of one that was never disturbed

    The other callbacks see `on_train_end` and `on_train_begin` at each restart. Raises ValueError unless the Trainer
    has one GuardCallback with mode="restart".

    Example:
        trainer = Trainer(model, args, train_dataset=data, callbacks=[GuardCallback(mode="restart")])
        guarded_train(trainer)
    """
    from transformers.trainer_utils import get_last_checkpoint

    found = [one for one in trainer.callback_handler.callbacks if isinstance(one, GuardCallback)]
    if len(found) != 1 or found[0]._mode != "restart":
        raise ValueError("guarded_train needs a Trainer with one GuardCallback(mode='restart') among its callbacks")
    if attempts < 1:
        raise ValueError(f"attempts must be at least 1, got {attempts}")
    callback, folder = found[0], str(trainer.args.output_dir)
    at = get_last_checkpoint(folder) if resume_from_checkpoint is True else resume_from_checkpoint
    callback._coming = (Path(at) if at else None, None)
    used = 0
    while True:
        output = trainer.train(resume_from_checkpoint=str(at) if at else None)
        if callback.restart is None:
            return output
        at = callback.healthy(folder)
        if at is None:
            callback.give_up(f"no checkpoint in {folder} from before {callback.restart}; save more often (save_steps)")
            return output
        if used == attempts:
            callback.give_up(f"{attempts} restarts did not help: {callback.restart.reason}")
            return output
        used += 1
        callback.resume(at, skip=skip)
        log.warning("guard: restart %d of %d from %s", used, attempts, at)


class _Scaled:
    """Tells the guard, while it judges, that a GradScaler is at work: the first overflows are its own business.

    The gradients are unscaled already, so the scale that a fused optimizer would be told is 1.
    """

    def __init__(self, optimizer: Any) -> None:
        scaler = getattr(optimizer, "scaler", None)
        self._own: dict[str, Any] | None = (
            vars(_inner(optimizer)) if scaler is not None and scaler.is_enabled() else None
        )

    def __enter__(self) -> None:
        if self._own is not None:
            self._own["grad_scale"] = torch.ones(())

    def __exit__(self, *error: object) -> None:
        if self._own is not None:
            self._own.pop("grad_scale", None)


def _inner(optimizer: Any) -> Optimizer:
    """The optimizer inside Accelerate's wrapper."""
    from accelerate.optimizer import AcceleratedOptimizer

    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def _steps_per_epoch(loader: Any, args: TrainingArguments) -> int:
    """As the Trainer counts them; a stream without a length has one epoch of `max_steps`."""
    from transformers.trainer_utils import has_length

    if not has_length(loader):
        return max(1, args.max_steps)
    return max(1, -(-len(loader) // args.gradient_accumulation_steps))


def _about_log(args: TrainingArguments) -> str:
    """Either way the Trainer's own log tells a NaN wrong; which way it is."""
    if args.logging_nan_inf_filter:
        return "logging_nan_inf_filter=True shows a NaN loss as a finite one in the Trainer's log, not in the guard's"
    # It empties its running sum by `tr_loss -= tr_loss`, and nan - nan is nan.
    return "logging_nan_inf_filter=False leaves the Trainer's logged loss NaN for good after one NaN, skipped or not"


def _distrust(path: Path) -> None:
    import shutil

    new = path.with_name(f"distrusted-{path.name}")
    if new.exists():
        shutil.rmtree(new)
    path.rename(new)
    log.warning("guard: %s was saved after the onset and is now %s", path, new.name)
