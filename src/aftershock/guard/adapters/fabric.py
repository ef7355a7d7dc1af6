"""The guard in a loop written with Lightning Fabric: the same `Guard`, on what lies inside Fabric's wrappers.

    guard = guard_fabric(fabric, model, optimizer)
    for batch in guard.batches(loader):
        loss = model(batch)
        fabric.backward(loss)
        guard.step(loss)

`optimizer.step`, `zero_grad`, the scheduler's `step` and `fabric.clip_gradients` are the guard's (`clip_norm=`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aftershock.guard.adapters import needed
from aftershock.guard.guard import Guard

if TYPE_CHECKING:
    from lightning.fabric import Fabric


def guard_fabric(fabric: Fabric, model: Any, optimizer: Any, **settings: Any) -> Guard:
    """A `Guard` for what `fabric.setup` gave; `settings` are its own, the GradScaler is that of Fabric's precision.

    Build the scheduler on the optimizer before `fabric.setup`: on the wrapper torch would warn that it never stepped.
    The guard's state goes with yours: `fabric.save(path, {"model": model, "optimizer": optimizer, "guard": guard})`.
    Raises ValueError for what was not set up, and for strategies whose engine steps itself (DeepSpeed, XLA).

    Example:
        guard = guard_fabric(fabric, model, optimizer, scheduler=scheduler, clip_norm=1.0)
    """
    module_type: type[Any] = needed("lightning.fabric.wrappers", "_FabricModule", install="lightning")
    optimizer_type: type[Any] = needed("lightning.fabric.wrappers", "_FabricOptimizer", install="lightning")
    if "scaler" in settings or "driven" in settings:
        raise ValueError("scaler, driven: the guard takes this from Fabric; leave it out")
    if not isinstance(model, module_type) or not isinstance(optimizer, optimizer_type):
        raise ValueError(
            f"guard_fabric needs what fabric.setup(model, optimizer) gave, got {type(model).__name__} and "
            f"{type(optimizer).__name__}"
        )
    engine = type(fabric.strategy).__name__
    if engine.startswith(("DeepSpeed", "XLA")):
        raise ValueError(f"{engine} holds gradients and steps itself: it cannot be vetoed; use FSDP2 or DDP")
    return Guard(
        model.module, optimizer.optimizer, scaler=getattr(fabric.strategy.precision, "scaler", None), **settings
    )
