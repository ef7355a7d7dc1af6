"""The guard in a loop written with Accelerate: the same `Guard`, on what lies inside Accelerate's wrappers.

    guard = guard_accelerate(accelerator, model, optimizer, scheduler=scheduler)
    for batch in guard.batches(plain_loader(loader)):
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            guard.step(loss / accelerator.gradient_accumulation_steps)

`optimizer.step`, `scheduler.step`, `zero_grad` and `accelerator.clip_grad_norm_` are the guard's (`clip_norm=`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.data import DataLoader

from aftershock.guard.adapters import needed
from aftershock.guard.adapters.seat import check_settings
from aftershock.guard.guard import Guard

if TYPE_CHECKING:
    from accelerate import Accelerator


def guard_accelerate(
    accelerator: Accelerator, model: nn.Module, optimizer: Any, *, scheduler: Any = None, **settings: Any
) -> Guard:
    """A `Guard` for what `accelerator.prepare` gave; `settings` are its own.

    It steps the inner optimizer with the accelerator's GradScaler, and the prepared scheduler, which counts processes.
    `accumulate` is the accelerator's `gradient_accumulation_steps`. `accelerator.register_for_checkpointing(guard)`
    takes it into `save_state` and `load_state`.
    Raises ValueError for what is not prepared, for DeepSpeed and Megatron, and for an accumulation that Accelerate cuts
    short at the end of an epoch: the guard counts micro-batches on.

    Example:
        guard = guard_accelerate(accelerator, model, optimizer, clip_norm=1.0)
    """
    wrapper: type[Any] = needed("accelerate.optimizer", "AcceleratedOptimizer", install="accelerate")
    check_settings({name: None for name in settings if name != "scheduler"}, "Accelerator")
    if not isinstance(optimizer, wrapper):
        raise ValueError(
            f"guard_accelerate needs the optimizer that accelerator.prepare gave, got {type(optimizer).__name__}"
        )
    engine = accelerator.distributed_type.value
    if engine in ("DEEPSPEED", "MEGATRON_LM", "XLA"):
        raise ValueError(f"{engine}'s engine holds gradients and steps itself: it cannot be vetoed; use FSDP2 or DDP")
    if accelerator.gradient_accumulation_steps > 1 and accelerator.gradient_state.sync_with_dataloader:
        raise ValueError(
            "Accelerate ends an accumulation early at the end of each epoch, the guard does not; build the Accelerator "
            "with gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=.., sync_with_dataloader=False)"
        )
    return Guard(
        model,
        optimizer.optimizer,
        scheduler=scheduler,
        scaler=accelerator.scaler,
        accumulate=accelerator.gradient_accumulation_steps,
        **settings,
    )


def plain_loader(loader: Any) -> Any:
    """A prepared loader as `Guard.batches` can read it: without a state where it has none.

    Accelerate's loaders all have `state_dict`, which fails unless they were made with `use_stateful_dataloader=True`;
    those are given back as they are.
    """
    return loader if getattr(loader, "use_stateful_dataloader", False) else _Plain(loader)


class _Plain(DataLoader[Any]):
    """Only what iterates and what tells the order: a DataLoader in type, the prepared one in deed."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self.generator, self.sampler, self.dataset = loader.generator, loader.sampler, loader.dataset
        vars(self).update(batch_sampler=loader.batch_sampler, batch_size=loader.batch_size)

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride] - torch's own type is private
        return iter(self._loader)

    def __len__(self) -> int:
        return len(self._loader)
