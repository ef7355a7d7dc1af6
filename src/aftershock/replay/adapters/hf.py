"""The workload that Hugging Face's Trainer (transformers 5) trains, for replaying its runs step by step.

    trainer = Trainer(model, args, train_dataset=data)
    subject = Subject.from_incident("runs/a/guard/incidents/812-spike", workload_from_trainer(trainer))

A step of the workload is a step of the Trainer: the same micro-batches in the same order, the loss from
`trainer.compute_loss` with the same `num_items_in_batch`, the same clipping, optimizer and schedule, and between steps
the same random numbers taken by loaders. So losses come out bit for bit as the Trainer's, dropout included.
Transformers is imported when a workload is made. Must not import the guard's adapters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from aftershock.replay.adapters.loader import Epochs, draw
from aftershock.replay.edits.data import num_rows, take_rows
from aftershock.workload import Workload

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import Trainer

ITEMS, PARTS = "num_items_in_batch", "num_micro_batches"
"""Keys of a micro-batch beside the collator's: what the Trainer tells the loss of the whole step."""

ACTING = (
    *("on_train_begin", "on_epoch_begin", "on_step_begin", "on_substep_end", "on_pre_optimizer_step"),
    *("on_optimizer_step", "on_step_end", "on_epoch_end"),
)
"""Events at which a callback can change how training goes on; at the others it can only look."""


def workload_from_trainer(
    trainer: Trainer, *, held_out: Callable[[nn.Module], float] | None = None, harmless: Collection[str] = ()
) -> Workload:
    """The workload of `trainer.train()`, which is not called.

    Of a Trainer that has not trained it stands where `train()` would begin, random numbers included; of one that has,
    where that ended, to be taken back to a snapshot. It shares the Trainer's model; optimizer and schedule are made by
    the Trainer's own methods, and a fresh Trainer keeps none of them.

    - `batch(i)`: the list of micro-batches of step i, or the one where nothing is accumulated, as dicts. A step that
      ends an epoch with fewer is filled up with micro-batches of no rows, whose loss is 0
    - `loss`: such that the mean over the micro-batches is what the Trainer adds up (to rounding where their number is
      no power of two). Where rows are taken out of a batch, the others keep their weight
    - `harmless`: names of callback classes that act between steps, yet change nothing about them

    Data that cannot be asked for by index (a stream, an order or a collator that draws from the process's random
    numbers) is refused when the first batch is: a subject from an incident then replays the copies that the guard kept.
    Random numbers that an evaluation takes are taken too, as far as they are its loaders'. Activation checkpointing is
    not switched on, which changes no bit. Raises ValueError, with what to do, for what no plain loop can do: several
    processes or GPUs, DeepSpeed, FSDP, fp16, a loss or a step outside `compute_loss`, and callbacks that may act.

    Example:
        workload = workload_from_trainer(Trainer(model, args, train_dataset=data))
        subject = record(workload, steps=1000)
    """
    _check(trainer, harmless)
    trained = _is_trained(trainer)
    steps = _Steps(trainer)  # first: a fresh order begins with the seed that torch has now, as in train()
    model = trainer.accelerator.prepare(trainer.model)
    if model is not trainer.model:
        raise ValueError("the Trainer wraps its model (torch_compile?); replays need it plain: set torch_compile=False")
    optimizer, scheduler = _as_ended(trainer) if trained else _as_begun(trainer, steps.total)
    _check_optimizer(optimizer, scheduler)
    model.train()
    return Workload(
        model=model,
        optimizer=optimizer,
        batch=steps.batch,
        loss=steps.loss,
        scheduler=scheduler,
        clip_norm=trainer.args.max_grad_norm or None,
        accumulate=trainer.args.gradient_accumulation_steps,
        held_out=held_out,
    )


class _Steps:
    """The Trainer's data by step, and its loss."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._args = trainer, trainer.args
        self._loader: Any = trainer.get_train_dataloader()
        self._epochs = Epochs(self._loader, set_epoch=self._loader.set_epoch)
        self._accumulate = trainer.args.gradient_accumulation_steps
        self._coming = 0

    @property
    def total(self) -> int:
        """Steps of the whole run, which the schedule needs."""
        if self._args.max_steps > 0:
            return self._args.max_steps
        return math.ceil(self._args.num_train_epochs * self._per_epoch)

    def batch(self, index: int) -> Any:
        """The micro-batches of a step, told what the Trainer counts over all of them."""
        from accelerate.utils import send_to_device

        if index < 0:
            raise ValueError(f"there is no step {index}; steps are counted from 0")
        self._coming = 0
        num = self._epochs.num_batches  # a stream is refused here, before its length is asked for
        epoch, step = divmod(index, self._per_epoch)
        loaded = self._epochs.fetch(epoch, range(step * self._accumulate, min((step + 1) * self._accumulate, num)))
        if not all(isinstance(part, Mapping) for part in loaded):
            raise ValueError(f"a batch is a {type(loaded[0]).__name__}; let the collator give dicts, as models take")
        device = self._args.device
        parts, items = self._trainer.get_batch_samples(
            iter([send_to_device(part, device) for part in loaded]), len(loaded), device
        )
        told = {} if items is None else {ITEMS: items}
        if len(parts) < self._accumulate and not self._is_scaled(items):
            told[PARTS] = torch.tensor(len(parts))
        filled = [{**part, **told} for part in parts]
        filled += [take_rows(filled[0], []) for _ in range(self._accumulate - len(parts))]
        self._coming = (self._epochs.draws if step == 0 else 0) + self._evaluations(index)
        return filled if self._accumulate > 1 else filled[0]

    def loss(self, model: nn.Module, part: Mapping[str, Any]) -> Tensor:
        """The Trainer's loss of a micro-batch times their number, since a workload takes the mean of them."""
        # Before the first forward pass of a step, as when the Trainer begins an epoch or has evaluated.
        coming, self._coming = self._coming, 0
        draw(coming)
        inputs = dict(part)
        items, parts = inputs.pop(ITEMS, None), inputs.pop(PARTS, None)
        if num_rows(inputs) == 0:
            return torch.zeros((), device=self._args.device, requires_grad=True)
        with self._trainer.compute_loss_context_manager():
            inputs = self._trainer._prepare_inputs(inputs)
            loss = self._trainer.compute_loss(model, inputs, num_items_in_batch=items)
        assert isinstance(loss, Tensor)
        if self._is_scaled(items):
            return loss * self._accumulate
        return loss if parts is None else loss * (self._accumulate / int(parts))

    @property
    def _per_epoch(self) -> int:
        """As the Trainer counts them."""
        return max(1, -(-len(self._loader) // self._accumulate))

    def _is_scaled(self, items: Any) -> bool:
        """Whether the loss is a part of the step's, not the mean of its own micro-batch; as in `training_step`."""
        own = getattr(self._trainer, "loss_is_scaled_for_ga", None)  # not in every 5.x
        return own if own is not None else self._trainer.model_accepts_loss_kwargs and items is not None

    def _evaluations(self, index: int) -> int:
        """Loaders that the Trainer has evaluated on between the step before and this one."""
        args = self._args
        every = args.eval_steps or math.inf
        every = math.ceil(self.total * every) if every < 1 else every
        if index == 0:
            due = args.eval_on_start
        elif args.eval_strategy == "steps":
            due = index % every == 0 and args.eval_delay <= index
        else:
            epoch, step = divmod(index, self._per_epoch)
            due = args.eval_strategy == "epoch" and step == 0 and args.eval_delay <= epoch
        data = self._trainer.eval_dataset
        return (len(data) if isinstance(data, dict) else 1) if due else 0


# ------------------------------------------------------------------------------------------ optimizer and schedule


def _is_trained(trainer: Trainer) -> bool:
    from accelerate.optimizer import AcceleratedOptimizer

    return isinstance(trainer.optimizer, AcceleratedOptimizer)


def _as_ended(trainer: Trainer) -> tuple[Optimizer, Any]:
    outer: Any = trainer.optimizer
    return outer.optimizer, trainer.lr_scheduler


def _as_begun(trainer: Trainer, total: int) -> tuple[Optimizer, Any]:
    """What `train()` would make; the Trainer is left without, to make its own."""
    before = (trainer.optimizer, trainer.lr_scheduler, trainer._created_lr_scheduler)
    try:
        trainer.create_optimizer_and_scheduler(num_training_steps=total)
        optimizer: Any = trainer.optimizer
        return optimizer, trainer.lr_scheduler
    finally:
        trainer.optimizer, trainer.lr_scheduler, trainer._created_lr_scheduler = before


# -------------------------------------------------------------------------------------------- what is not to be had


def _check(trainer: Trainer, harmless: Collection[str]) -> None:
    from transformers import Trainer as Plain

    args = trainer.args
    faults = {
        "several processes or GPUs share this run's batches; build the Trainer in one process with one device": (
            args.world_size > 1 or args.n_gpu > 1
        ),
        "DeepSpeed and FSDP take the steps themselves; build the Trainer without them, as far as one device holds it": (
            trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
        ),
        "fp16 scales the loss by a state that a workload does not have; train in bf16 or float32": (
            trainer.accelerator.scaler is not None
        ),
        "a label smoother or compute_loss_func takes the labels away from the model, so the guard sees no loss and "
        "keeps batches without labels; override compute_loss instead": (
            trainer.label_smoother is not None or trainer.compute_loss_func is not None
        ),
        "neftune_noise_alpha adds noise only within train(); set it to None, or add the noise in the model": (
            trainer.neftune_noise_alpha is not None
        ),
        "this Trainer overrides training_step, which a workload does not call; override compute_loss instead": (
            type(trainer).training_step is not Plain.training_step
        ),
        "model_init makes another model when training begins; give the Trainer that model itself": (
            trainer.model_init is not None and not _is_trained(trainer)
        ),
        "use_liger_kernel changes the model when training begins; apply the kernel to the model yourself": (
            args.use_liger_kernel and not _is_trained(trainer)
        ),
    }
    for words, there in faults.items():
        if there:
            raise ValueError(f"no workload can be made of this Trainer: {words}")
    _check_callbacks(trainer, harmless)


def _check_callbacks(trainer: Trainer, harmless: Collection[str]) -> None:
    from transformers import TrainerCallback

    for callback in trainer.callback_handler.callbacks:
        kind = type(callback)
        if kind.__module__.split(".")[0] in ("transformers", "aftershock") or kind.__name__ in harmless:
            continue
        acting = [event for event in ACTING if getattr(kind, event) is not getattr(TrainerCallback, event)]
        if acting:
            raise ValueError(
                f"the callback {kind.__name__} may change training in {', '.join(acting)}, and a workload has no "
                f"callbacks; if it only looks, pass harmless=[{kind.__name__!r}], else move what it does into the "
                "model, the data or compute_loss"
            )


def _check_optimizer(optimizer: Optimizer, scheduler: Any) -> None:
    name = type(optimizer).__name__
    if name in ("Lomo", "AdaLomo", "LayerWiseDummyOptimizer"):
        raise ValueError(f"{name} updates the weights within backward; use an optim that steps afterwards")
    if callable(getattr(optimizer, "train", None)):
        raise ValueError(f"{name} has weights of its own for training (schedule-free); use an optim without that mode")
    if isinstance(scheduler, ReduceLROnPlateau) or type(scheduler).__name__ == "GreedyLR":
        raise ValueError(
            f"{type(scheduler).__name__} steps with a metric of the evaluation, which a workload does not have; use a "
            "schedule of the step alone (lr_scheduler_type)"
        )
