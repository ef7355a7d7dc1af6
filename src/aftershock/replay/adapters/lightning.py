"""The workload that Lightning's Trainer (lightning 2.6) fits, for replaying its runs step by step.

    trainer = Trainer(max_epochs=3, gradient_clip_val=1.0)
    workload = workload_from_lightning(module, loader, trainer=trainer)
    subject = Subject.from_incident("runs/a/guard/incidents/812-spike", workload)

A step of the workload is one optimizer step with all its batches; the loss is that of `training_step`, optimizer and
schedule are those of `configure_optimizers`. Lightning is imported when a workload is made. Must not import the guard's
adapters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader

from aftershock.replay.adapters.loader import Epochs, draw, drawing_nothing, generators
from aftershock.replay.edits.data import num_rows, take_rows
from aftershock.workload import Workload

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

ACTING = (
    *("on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_before_zero_grad"),
    *("on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_train_batch_end"),
    *("on_train_epoch_end",),
)
"""Hooks of a module or callback that can change how training goes on."""
STEPPING = (*("optimizer_step", "optimizer_zero_grad", "backward", "configure_gradient_clipping", "lr_scheduler_step"),)
"""Hooks of a module that take a part of the step out of the trainer's hands."""
CHANGING = (
    *("BackboneFinetuning", "BatchSizeFinder", "GradientAccumulationScheduler", "LambdaCallback"),
    *("LearningRateFinder", "ModelPruning", "StochasticWeightAveraging", "WeightAveraging"),
)
"""Lightning's own callbacks that do more than look."""


def workload_from_lightning(
    module: LightningModule,
    data: DataLoader[Any] | LightningDataModule | None = None,
    *,
    trainer: Trainer,
    held_out: Callable[[nn.Module], float] | None = None,
    harmless: Collection[str] = (),
) -> Workload:
    """The workload of `trainer.fit(module, data)`, which is not called.

    Of a Trainer that has not fitted it stands where the first step would begin, random numbers included: module and
    data are set up, and `trainer` is for this use only from then on. Of one that has fitted this module it stands where
    that ended, to be taken back to a snapshot; `data` is then by default what it was fitted on.

    - `batch(i)`: the list of batches of step i, or the one where nothing is accumulated. A step that ends an epoch with
      fewer is filled up with batches of no rows, whose loss is 0
    - `loss`: of `training_step`; `self.log` says nothing there, and `self.global_step` stands still
    - `harmless`: names of callback classes, and of the module's own hooks, that change nothing about a step

    Data that cannot be asked for by index is refused when the first batch is: a stream, and `shuffle=True` without a
    `generator`, whose order no index tells. A subject from an incident then replays the copies that the guard kept; a
    schedule by epochs stays as it is over them. Random numbers that a validation takes are not taken: with dropout, a
    loss is bit for bit the Trainer's up to the first validation only.
    Raises ValueError, with what to do, for what no plain loop can do: manual optimization, several optimizers, a
    strategy for several devices, fp16, hooks that take part in a step, clipping by value.

    Example:
        workload = workload_from_lightning(module, loader, trainer=Trainer(max_epochs=3))
        subject = record(workload, steps=1000)
    """
    _check(module, trainer, harmless)
    fresh = not trainer.optimizers
    if fresh:
        _begin(module, data, trainer)
    loader = _loader(None if fresh else data, trainer)
    if not fresh and data is None and generators(loader):
        raise ValueError("the loader's generator has moved on while fitting; pass data= made anew, seeded as then")
    if len(trainer.optimizers) != 1 or isinstance(trainer.optimizers[0], LBFGS):
        raise ValueError(
            f"a workload has one optimizer that steps once on a gradient, got {trainer.optimizers}; give "
            "configure_optimizers one such optimizer with a group for each part"
        )
    length = trainer.num_training_batches
    limit = int(length) if math.isfinite(length) else None
    epochs = Epochs(loader, set_epoch=partial(_set_epoch, loader), begun=fresh, limit=limit)
    steps = _Steps(module, trainer, epochs)
    return Workload(
        model=module,
        optimizer=trainer.optimizers[0],
        batch=steps.batch,
        loss=steps.loss,
        scheduler=_schedule(trainer, steps),
        clip_norm=trainer.gradient_clip_val or None,
        accumulate=trainer.accumulate_grad_batches,
        held_out=held_out,
    )


class _Steps:
    """The Trainer's data by step, and the module's loss."""

    def __init__(self, module: LightningModule, trainer: Trainer, epochs: Epochs) -> None:
        self._module, self._trainer, self._epochs = module, trainer, epochs
        self._accumulate = trainer.accumulate_grad_batches
        self._coming = self._part = 0
        self.place: range | None = None
        """The numbers in the epoch of the batches that were asked for last."""
        self.epoch = 0

    def batch(self, index: int) -> Any:
        """The batches of a step, as `training_step` gets them."""
        if index < 0:
            raise ValueError(f"there is no step {index}; steps are counted from 0")
        self._coming, self._part = 0, 0
        num = self._epochs.num_batches
        self.epoch, step = divmod(index, -(-num // self._accumulate))
        self.place = range(step * self._accumulate, min((step + 1) * self._accumulate, num))
        parts = [self._moved(part) for part in self._epochs.fetch(self.epoch, self.place)]
        # The first epoch's iterator is made before the first step, so its number is taken already.
        self._coming = self._epochs.draws if step == 0 and index > 0 else 0
        if self._accumulate == 1:
            return parts[0]
        return parts + [take_rows(parts[0], []) for _ in range(self._accumulate - len(parts))]

    def loss(self, model: nn.Module, part: Any) -> Tensor:
        from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

        coming, self._coming = self._coming, 0
        draw(coming)
        number = (self.place.start if self.place else 0) + self._part
        self._part += 1
        if self._accumulate > 1 and num_rows(part) == 0:
            return torch.zeros((), device=self._module.device, requires_grad=True)
        takes_number = is_param_in_hook_signature(self._module.training_step, "batch_idx", min_args=2)
        with _silent(model), self._trainer.precision_plugin.train_step_context():
            output: Any = model.training_step(part, *([number] if takes_number else []))  # pyright: ignore[reportCallIssue]
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise ValueError(f"training_step gave {type(output).__name__} without a loss; a replay takes every step")
        return loss

    def _moved(self, batch: Any) -> Any:
        """On the device, through the module's own hooks."""
        with drawing_nothing(
            "a batch hook of the module draws from the process's random numbers, so the same index gives another batch "
            "each time; draw in training_step instead"
        ):
            given = self._trainer.precision_plugin.convert_input(batch)
            given = self._module._on_before_batch_transfer(given, dataloader_idx=0)
            return self._trainer.strategy.batch_to_device(given, dataloader_idx=0)


class _Sometimes:
    """A schedule that is not stepped with every step: once an epoch, or every few batches."""

    def __init__(self, inner: Any, due: Callable[[], bool]) -> None:
        self._inner, self._due = inner, due

    def step(self) -> None:
        if self._due():
            self._inner.step()

    def state_dict(self) -> Any:
        return self._inner.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        self._inner.load_state_dict(state_dict)


def _schedule(trainer: Trainer, steps: _Steps) -> Any:
    """The scheduler, to be stepped after every step. Raises ValueError where one cannot be."""
    configs = trainer.lr_scheduler_configs
    if not configs:
        return None
    config = configs[0]
    if len(configs) > 1 or isinstance(config.scheduler, ReduceLROnPlateau):
        raise ValueError(
            "a workload has one schedule of the step alone: chain several (torch's ChainedScheduler), and replace one "
            "that steps with a metric"
        )
    if config.interval == "step" and config.frequency == 1:
        return config.scheduler

    def due() -> bool:
        if steps.place is None:  # kept copies are replayed: nothing tells where in the epoch they lie
            return False
        if config.interval == "step":
            return steps.place.stop % config.frequency == 0
        return steps.place.stop == trainer.num_training_batches and (steps.epoch + 1) % config.frequency == 0

    return _Sometimes(config.scheduler, due)


# ------------------------------------------------------------------------------------------------------- setting up


def _begin(module: LightningModule, data: Any, trainer: Trainer) -> None:
    """All that `fit` does before the first step, but for callbacks, checkpoints and the sanity check."""
    from lightning.pytorch import LightningDataModule
    from lightning.pytorch.loops.utilities import _parse_loop_limits
    from lightning.pytorch.trainer.states import TrainerFn

    datamodule = data if isinstance(data, LightningDataModule) else None
    trainer.state.fn = TrainerFn.FITTING
    loop = trainer.fit_loop
    loop.min_epochs, loop.max_epochs = _parse_loop_limits(
        trainer.min_steps, trainer.max_steps, trainer.min_epochs, trainer.max_epochs, trainer
    )
    trainer._data_connector.attach_data(
        module, train_dataloaders=None if datamodule else data, val_dataloaders=None, datamodule=datamodule
    )
    trainer.strategy.connect(module)
    parts = [module] if datamodule is None else [datamodule, module]
    for part in parts:
        part.prepare_data()
    for part in parts:
        part.setup("fit")
    module.configure_model()
    try:
        trainer.strategy.setup(trainer)
    except RuntimeError as error:  # several optimizers
        raise ValueError(f"configure_optimizers cannot be used: {error}") from error
    loop.setup_data()


def _loader(data: Any, trainer: Trainer) -> DataLoader[Any]:
    from lightning.pytorch import LightningDataModule

    found = trainer.train_dataloader if data is None else data
    if isinstance(found, LightningDataModule):
        found = found.train_dataloader()
    if not isinstance(found, DataLoader):
        raise ValueError(f"a workload is made of one DataLoader, got {type(found).__name__}; give the one to replay")
    return found


def _set_epoch(loader: DataLoader[Any], epoch: int) -> None:
    """As Lightning does: for samplers whose order depends on it."""
    inner = getattr(loader.batch_sampler, "sampler", None)
    for sampler in {id(one): one for one in (loader.sampler, inner)}.values():
        set_epoch = getattr(sampler, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)


@contextmanager
def _silent(model: nn.Module) -> Iterator[None]:
    """`self.log` needs the trainer's loop around it, and there is none."""
    own = vars(model)
    before = own.get("log")
    own["log"] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        if before is None:
            del own["log"]
        else:
            own["log"] = before


# -------------------------------------------------------------------------------------------- what is not to be had


def _check(module: LightningModule, trainer: Trainer, harmless: Collection[str]) -> None:
    from lightning.pytorch.utilities.model_helpers import is_overridden

    faults = {
        "with manual optimization training_step takes the step itself; give the pieces to Workload by hand": (
            not module.automatic_optimization
        ),
        "replays run in one process on one device; build it with devices=1 and without a strategy": (
            type(trainer.strategy).__name__ != "SingleDeviceStrategy"
        ),
        "only float32 and bf16-mixed are replayed; convert the module itself and use precision='32-true'": (
            trainer.precision not in ("32-true", "bf16-mixed")
        ),
        "gradients are clipped by value; a workload clips their norm (gradient_clip_algorithm='norm')": (
            bool(trainer.gradient_clip_val) and trainer.gradient_clip_algorithm == "value"
        ),
        "reload_dataloaders_every_n_epochs makes other data on the way; set it to 0": (
            vars(trainer)["reload_dataloaders_every_n_epochs"] > 0  # set by a connector
        ),
    }
    for words, there in faults.items():
        if there:
            raise ValueError(f"no workload can be made of this Trainer: {words}")
    own = [name for name in (*STEPPING, *ACTING) if name not in harmless and is_overridden(name, module)]
    if own:
        raise ValueError(
            f"{type(module).__name__} overrides {', '.join(own)}, which a workload does not call; pass "
            "harmless=[names] for those that change nothing, and move what the others do into training_step"
        )
    callbacks: list[Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue] - set by a connector
    for callback in callbacks:
        _check_callback(callback, harmless)


def _check_callback(callback: Callback, harmless: Collection[str]) -> None:
    from lightning.pytorch import Callback as Plain

    kind = type(callback)
    names = {one.__name__ for one in kind.__mro__}
    if kind.__name__ in harmless:
        return
    if kind.__module__.split(".")[0] in ("lightning", "aftershock") and not names & set(CHANGING):
        return
    acting = [hook for hook in ACTING if getattr(kind, hook) is not getattr(Plain, hook)]
    if acting:
        raise ValueError(
            f"the callback {kind.__name__} may change training in {', '.join(acting)}, and a workload has no "
            f"callbacks; if it only looks, pass harmless=[{kind.__name__!r}], else move what it does into the module"
        )
