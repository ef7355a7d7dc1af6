"""A run of the lab as a plain PyTorch workload, built from its config alone: what a replay trains again.

Legend: K replicas (here 1), B sequences, T positions, N = B*T tokens, D width, P parameters, V vocabulary.
The fleet's own functions on the fleet's own numbers, so that a plain loop has the losses of a run that trained alone,
bit for bit. Must not import the fleet's loop nor the replay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from aftershock.lab.data import IGNORE, Batches
from aftershock.lab.models import Model, build_model
from aftershock.lab.models.decoder import Decoder, _lookup
from aftershock.lab.models.layout import Layout, ParamSpec
from aftershock.lab.models.ops import token_loss
from aftershock.lab.optim import MIN_PARAMETER_RMS, AdamW, OptimState, schedule
from aftershock.lab.recipe import OptimConfig, RunConfig
from aftershock.workload import Workload

CPU = torch.device("cpu")


def workload_of(config: RunConfig, batches: Batches) -> Workload:
    """The run of `config` before its first step, on the CPU; `batches` are those of `config.data`.

    The loss is the one that is trained: cross-entropy and z term, nats a token. Parameters have the fleet's names, with
    `.weight` behind. Past the last step the rate stays at its last value, and batches go on. Gradients are clipped as
    the fleet does it, when the optimizer steps, so `clip_norm` is None.

    Example:
        workload = workload_of(config, build_batches(config.data))
    """
    model = Replica(config, batches)
    seed_K = np.array([config.data_seed], dtype=np.uint64)
    z_K = torch.tensor([config.optim.z_loss], dtype=model.loss_dtype)

    def batch(index: int) -> tuple[Tensor, Tensor]:
        found = batches.train(seed_K, index, config.batch_size)
        return found.inputs_KBT[0], found.targets_KBT[0]

    def loss(model: nn.Module, pair: tuple[Tensor, Tensor]) -> Tensor:
        inputs_BT, targets_BT = pair
        logits_NV = model(inputs_BT).flatten(0, 1)
        targets_N = targets_BT.flatten()
        with torch.no_grad():
            # The fleet's loss is one operation that nothing sees into. Who looks for logits (a z-loss, a wider loss)
            # looks for this call.
            F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORE)
        return token_loss(logits_NV[None], targets_N[None], z_K, dtype=z_K.dtype).total_K[0]

    optimizer = _optimizer(config.optim, model, num_steps=config.steps)
    return Workload(
        model=model,
        optimizer=optimizer,
        scheduler=LambdaLR(optimizer, lambda step: schedule(config.optim, min(step, config.steps), config.steps)),
        batch=batch,
        loss=loss,
        held_out=_held_out(config, batches),
    )


def put_snapshot(workload: Workload, snapshot: Mapping[str, Tensor]) -> int:
    """Make a fresh workload what the fleet's replica was when `train.snapshot` took this; the step it stands before.

    Raises ValueError when it is of another number of parameters.
    """
    model, optimizer, scheduler = workload.model, workload.optimizer, workload.scheduler
    assert isinstance(model, Replica)
    assert isinstance(scheduler, LambdaLR)
    if snapshot["params_KP"].numel() != model.layout.size:
        raise ValueError("a snapshot has another number of parameters than its config gives; was the config edited?")
    step = int(snapshot["step"])
    rows = [model.layout.views(snapshot[name][None]) for name in OptimState._fields]
    with torch.no_grad():
        for name, parameter in model.tensors.items():
            weights, exp_avg, exp_avg_sq = (row[name][0] for row in rows)
            parameter.copy_(weights)
            moments = {"exp_avg": exp_avg.clone(), "exp_avg_sq": exp_avg_sq.clone()}
            optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
    scheduler.last_epoch = step
    for group, base, rate in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group["lr"] = base * rate(step)
    return step


# ---------------------------------------------------------------------------------------------------------- the model


class _Holder(nn.Module):
    """One tensor of the replica. The classes' names are how a replay's edits tell what is what."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(value)


class Embedding(_Holder):
    """A table of tokens."""


class Norm(_Holder):
    """Gains of a LayerNorm."""


class Conv1D(_Holder):
    """Weights [in, out], as in GPT-2's class of this name."""


class Vector(_Holder):
    """Anything else."""


class Attention(nn.Module):
    """The attention of one block; a module, so that its softmax can be seen and its arithmetic widened."""

    def __init__(self, decoder: Decoder, block: int) -> None:
        super().__init__()
        self._decoder, self._block = decoder, block

    def forward(self, params: Mapping[str, Tensor], x_KND: Tensor, B: int, T: int) -> Tensor:
        return self._decoder._attention(self._block, params, x_KND, B, T, None)


class Replica(nn.Module):
    """One replica of a fleet: logits [B, T, V] of token ids [B, T].

    `tensors`: its parameters by the fleet's names, in the layout's order. They lie in one row, as in the fleet.
    """

    def __init__(self, config: RunConfig, batches: Batches) -> None:
        super().__init__()
        self._model: Model = build_model(
            config.model,
            vocab_size=batches.vocab_size,
            context=batches.context,
            precision=config.precision,
            device=CPU,
        )
        self.layout = Layout(self._model.specs())
        self.loss_dtype = self._model.dtypes.loss
        row_KP = self.layout.init([config.seed], dtype=self._model.dtypes.params, device=CPU)
        views = self.layout.views(row_KP)
        self._roles = {place.spec.name: place.spec.role for place in self.layout.places}
        for spec in self._model.specs():
            path, _, last = spec.name.rpartition(".")
            self._home(path).add_module(last, _holder(spec, views[spec.name][0]))

    @property
    def tensors(self) -> dict[str, nn.Parameter]:
        return {name: self.get_parameter(f"{name}.weight") for name in self.layout.names}

    def forward(self, ids_BT: Tensor) -> Tensor:
        B, T = ids_BT.shape
        dtypes = self._model.dtypes
        wanted = {"matmul": dtypes.matmul, "logits": dtypes.logits, "params": None}
        params: dict[str, Tensor] = {}
        for name, parameter in self.tensors.items():
            dtype = wanted[self._roles[name]]
            params[name] = parameter[None] if dtype is None else parameter[None].to(dtype)
        if isinstance(self._model, Decoder):
            logits_KNV = self._decoded(self._model, params, ids_BT)
        else:
            logits_KNV = self._model(params, ids_BT[None])
        return logits_KNV.view(B, T, -1)

    def _decoded(self, decoder: Decoder, params: Mapping[str, Tensor], ids_BT: Tensor) -> Tensor:
        """As `Decoder.__call__`, with the attention in modules of its own."""
        B, T = ids_BT.shape
        x_KND = _lookup(params["embed"], ids_BT.reshape(1, B * T))
        for i in range(decoder.config.depth):
            x_KND = x_KND + self.get_submodule(f"blocks.{i}.attn")(params, x_KND, B, T)
            x_KND = x_KND + decoder._mlp(i, params, x_KND)
        return torch.bmm(decoder._norm(x_KND, params["final_norm"], decoder.dtypes.logits), params["head"])

    def _home(self, path: str) -> nn.Module:
        """The module at `path`, made where there is none."""
        home: nn.Module = self
        for depth, part in enumerate(path.split(".") if path else []):
            if part not in dict(home.named_children()):
                child = nn.Module()
                if part == "attn" and isinstance(self._model, Decoder):
                    child = Attention(self._model, int(path.split(".")[depth - 1]))
                home.add_module(part, child)
            home = home.get_submodule(part)
        return home


def _holder(spec: ParamSpec, value: Tensor) -> _Holder:
    last = spec.name.rpartition(".")[2]
    if spec.name.startswith("embed"):
        return Embedding(value)
    if "norm" in last or "gain" in last:
        return Norm(value)
    return Conv1D(value) if len(spec.shape) == 2 else Vector(value)


# ------------------------------------------------------------------------------------------------------ the optimizer


def _optimizer(config: OptimConfig, model: Replica, *, num_steps: int) -> torch.optim.AdamW:
    """One group for each learning-rate factor; the schedule, not the group, holds the rate itself."""
    rule = AdamW([config], model.layout, num_steps=num_steps)
    parameters = list(model.tensors.values())
    starts = [place.start for place in model.layout.places]
    groups: list[dict[str, Any]] = []
    for start, stop, factor in rule.sections:
        inside = [p for p, at in zip(parameters, starts, strict=True) if start <= at < stop]
        decay = config.weight_decay
        if config.decay == "independent":  # the kernel's is lr * decay, and lr is the peak's share of the peak
            decay = config.weight_decay / (config.lr * factor)
        groups.append({"params": inside, "lr": factor, "weight_decay": decay})
    optimizer = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
    step = _FleetStep(rule, parameters)
    optimizer.register_step_pre_hook(step.before)
    optimizer.register_step_post_hook(step.after)
    return optimizer


class _FleetStep:
    """What the fleet does around the kernel: clip by the norm of the whole row, and scale rates by tensors' RMS."""

    def __init__(self, rule: AdamW, parameters: Sequence[nn.Parameter]) -> None:
        self._rule, self._parameters = rule, parameters
        self._own: list[tuple[dict[str, Any], float, float]] = []

    @torch.no_grad()
    def before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        grads = [p.grad for p in self._parameters if p.grad is not None]
        if grads:
            norm_K = torch.linalg.vector_norm(torch.cat([grad.flatten() for grad in grads])[None], dim=1)
            torch._foreach_div_(grads, self._rule.clip_scales(norm_K)[0])
        if not self._rule.by_rms:
            return
        for group in optimizer.param_groups:
            (parameter,) = group["params"]
            self._own.append((group, group["lr"], group["weight_decay"]))
            # On one row, and divided as a tensor: the fleet's rounding.
            rms_1 = torch.linalg.vector_norm(parameter.flatten()[None], dim=1) / math.sqrt(parameter.numel())
            factor = max(MIN_PARAMETER_RMS, rms_1.item())
            group["lr"] *= factor
            if self._rule.configs[0].decay == "independent":
                group["weight_decay"] /= factor

    def after(self, *_: Any) -> None:
        for group, lr, decay in self._own:
            group["lr"], group["weight_decay"] = lr, decay
        self._own.clear()


def _held_out(config: RunConfig, batches: Batches) -> Any:
    """Cross-entropy on held-out data, nats a token, as `Fleet.evaluate`."""

    @torch.no_grad()
    def read(model: nn.Module) -> float:
        batch = batches.eval(config.eval_sequences)
        total, count = 0.0, 0
        for start in range(0, batch.inputs_KBT.shape[1], config.batch_size):
            rows = slice(start, start + config.batch_size)
            targets_KN = batch.targets_KBT[:, rows].flatten(1)
            logits_NV = model(batch.inputs_KBT[0, rows]).flatten(0, 1)
            here = int((targets_KN >= 0).sum())
            dtype = getattr(torch, config.precision.loss)
            loss = token_loss(logits_NV[None], targets_KN, torch.zeros(1, dtype=dtype), dtype=dtype)
            total, count = total + float(loss.ce_K) * here, count + here
        return total / count

    return read
