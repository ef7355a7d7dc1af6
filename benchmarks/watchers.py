"""Those that watch a training step, each as a context: ours, and rivals as their users would set them up.

Nothing here is a requirement of the project: a rival whose package is missing is `Missing`, and said so in the table.
`Hooks.gradients` is called between backward and clipping, `Hooks.end` after the optimizer's step, with loss and index.
"""

from __future__ import annotations

import importlib.util
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aftershock.signals.tap import TensorTap
from benchmarks.machine import Clock


class Hooks(NamedTuple):
    """What the loop calls; `whole`: all of the watcher's work is in there, or on the clock, so that it can be timed."""

    gradients: Callable[[Tensor], object]
    end: Callable[[Tensor, int], object]
    whole: bool = True


class Missing(Exception):
    """The rival's package is not installed."""


Watcher = Callable[[nn.Module, torch.optim.Optimizer, Clock], AbstractContextManager[Hooks]]


def _nothing(*_: Any) -> None:
    pass


@contextmanager
def bare(*_: Any) -> Iterator[Hooks]:
    """Nobody watches."""
    yield Hooks(_nothing, _nothing)


@contextmanager
def tensor_tap(model: nn.Module, optimizer: torch.optim.Optimizer, clock: Clock) -> Iterator[Hooks]:
    """Ours: all default groups (parameter, gradient, update, RMS_t) of every tensor, every step, read one step late."""
    tap = TensorTap(model, optimizer, gradients="call")
    # Hooks run in the order of their registration: the clock runs while the tap's own do.
    handles = [optimizer.register_step_pre_hook(clock.start), optimizer.register_step_post_hook(clock.start)]
    with tap:
        handles += [optimizer.register_step_pre_hook(clock.stop), optimizer.register_step_post_hook(clock.stop)]
        yield Hooks(lambda _: tap.measure_gradients(), lambda *_: tap.read())
    for handle in handles:
        handle.remove()


@contextmanager
def lightning(*_: Any) -> Iterator[Hooks]:
    """Lightning's SpikeDetection, the real one, on the loss alone: a mean of ten, a barrier, a reduced decision."""
    _need("lightning")
    from lightning.fabric import Fabric  # pyright: ignore[reportMissingImports]
    from lightning.fabric.utilities.spike import SpikeDetection  # pyright: ignore[reportMissingImports]

    fabric, rule = Fabric(accelerator="auto", devices=1), SpikeDetection()
    yield Hooks(_nothing, lambda loss, index: rule.on_train_batch_end(fabric, loss, None, index))


@contextmanager
def trainscope(model: nn.Module, optimizer: torch.optim.Optimizer, _: Clock) -> Iterator[Hooks]:
    """trainscope with its default settings, called where its documentation says: before the optimizer's step."""
    _need("trainscope")
    from trainscope import TrainScope, TrainScopeConfig  # pyright: ignore[reportMissingImports]

    with tempfile.TemporaryDirectory() as folder:
        scope = TrainScope(model, optimizer, TrainScopeConfig(run_dir=folder)).attach()
        yield Hooks(lambda loss: scope.step(loss.item()), _nothing, whole=False)
        scope.detach()


def wandb_watch(**settings: Any) -> Watcher:
    """`wandb.watch(model, log="all")` in an offline run, with `run.log` of the loss each step."""

    @contextmanager
    def watch(model: nn.Module, *_: Any) -> Iterator[Hooks]:
        _need("wandb")
        import wandb  # pyright: ignore[reportMissingImports]

        with tempfile.TemporaryDirectory() as folder:
            run = wandb.init(mode="offline", dir=folder, settings=wandb.Settings(silent=True))
            run.watch(model, log="all", **settings)
            yield Hooks(_nothing, lambda loss, _: run.log({"loss": loss.item()}), whole=False)
            run.unwatch(model)
            run.finish()

    return watch


@contextmanager
def item_monitor(model: nn.Module, optimizer: torch.optim.Optimizer, _: Clock) -> Iterator[Hooks]:
    """What Composer's OptimizerMonitor logs for its AdamW: four norms per tensor, each brought over by `.item()`.

    Gradient, first moment, parameter, and the update as Adam's formula gives it again, without weight decay.
    """

    def measure(*_: Any) -> dict[str, float]:
        rows: dict[str, float] = {}
        group = optimizer.param_groups[0]
        (beta1, beta2), eps, lr = group["betas"], group["eps"], group["lr"]
        with torch.no_grad():
            for name, p in model.named_parameters():
                state = optimizer.state[p]
                taken = float(state["step"])
                root = state["exp_avg_sq"].sqrt().div_(math.sqrt(1 - beta2**taken)).add_(eps)
                update = state["exp_avg"].div(root).mul_(-lr / (1 - beta1**taken))
                rows[f"l2_norm/moment/{name}"] = torch.linalg.vector_norm(state["exp_avg"]).item()
                rows[f"l2_norm/param/{name}"] = torch.linalg.vector_norm(p).item()
                rows[f"l2_norm/update/{name}"] = torch.linalg.vector_norm(update).item()
                assert p.grad is not None, name
                rows[f"l2_norm/grad/{name}"] = torch.linalg.vector_norm(p.grad).item()
        return rows

    yield Hooks(_nothing, measure)


WATCHERS: dict[str, Watcher] = {
    "bare": bare,
    "Aftershock TensorTap, default groups": tensor_tap,
    "Lightning SpikeDetection (loss only)": lightning,
    "Composer-style OptimizerMonitor, `.item()` per metric": item_monitor,
    "trainscope, default settings": trainscope,
    'wandb.watch(log="all"), default log_freq': wandb_watch(),
    'wandb.watch(log="all", log_freq=1)': wandb_watch(log_freq=1),
}


def _need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise Missing(package)
