"""A fleet: K replicas of one architecture, each with its own hyper-parameters, seed and data, trained in lockstep.

Legend: K replicas, B batch, T positions, N = B*T tokens, P parameters of one replica, V vocabulary.
A step is (state, batch) -> (state, record), the state updated in place. Replicas never meet in an operation, so one
that goes non-finite leaves the others bitwise unchanged: it is retired, its row frozen at its last healthy value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from aftershock.config import leaves, to_dict
from aftershock.lab.data import Batches, build_batches
from aftershock.lab.models import Probe, build_model
from aftershock.lab.models.layout import Layout
from aftershock.lab.models.ops import token_loss
from aftershock.lab.optim import AdamW, OptimState
from aftershock.lab.recipe import RunConfig, fleet_key


class FleetState(NamedTuple):
    """All that changes. `step` is the next to take; `retired_at_K` the step a replica died at, or -1."""

    optim: OptimState
    retired_at_K: Tensor
    step: int


class StepRecord(NamedTuple):
    """What a step measured, per replica and still on the device: losses, gradient norm before clipping, signals."""

    ce_K: Tensor
    total_K: Tensor
    grad_norm_K: Tensor
    alive_K: Tensor
    signals: Mapping[str, Tensor]


class Fleet:
    """Everything fixed about K replicas: model, layout, optimizer, data. The state is passed in and out.

    Raises ValueError if the configs differ in more than optimizer settings and seeds, naming the fields.
    """

    def __init__(
        self,
        configs: Sequence[RunConfig],
        *,
        batches: Batches | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        check_same(configs)
        self.configs = list(configs)
        self.device = torch.device(device)
        shared = configs[0]
        self.batches = build_batches(shared.data) if batches is None else batches
        self.model = build_model(
            shared.model,
            vocab_size=self.batches.vocab_size,
            context=self.batches.context,
            precision=shared.precision,
            device=self.device,
        )
        self.layout = Layout(self.model.specs())
        self.optimizer = AdamW([c.optim for c in configs], self.layout, num_steps=shared.steps)
        self.data_seeds_K = np.array([c.data_seed for c in configs], dtype=np.uint64)
        self.z_K = torch.tensor([c.optim.z_loss for c in configs], dtype=self.model.dtypes.loss, device=self.device)
        self._grads_KP: Tensor | None = None
        self._work_KM: Tensor | None = None

    @property
    def size(self) -> int:
        return len(self.configs)

    @property
    def tokens_a_step(self) -> int:
        """Tokens one replica sees in a step: a batch larger than a small training split is that split."""
        batch = self.batches.train(self.data_seeds_K[:1], 0, self.configs[0].batch_size)
        return batch.inputs_KBT[0].numel()

    def init(self) -> FleetState:
        """Step-0 state: row k drawn from `configs[k].seed` alone."""
        params_KP = self.layout.init([c.seed for c in self.configs], dtype=self.model.dtypes.params, device=self.device)
        retired_at_K = torch.full((self.size,), -1, dtype=torch.int64, device=self.device)
        return FleetState(OptimState.fresh(params_KP), retired_at_K, 0)

    def step(self, state: FleetState, *, measure: bool = False) -> tuple[FleetState, StepRecord]:
        """One optimizer step of every living replica, on its own batch `state.step`."""
        batch = self.batches.train(self.data_seeds_K, state.step, self.configs[0].batch_size)
        probe = Probe(self.size) if measure else None
        ce_K, total_K, grads_KP = self._gradients(state, batch.inputs_KBT, batch.targets_KBT, probe)
        grad_norm_K = torch.linalg.vector_norm(grads_KP, dim=1)
        healthy_K = torch.isfinite(total_K) & torch.isfinite(grad_norm_K)
        dies_K = (state.retired_at_K < 0) & ~healthy_K
        retired_at_K = torch.where(dies_K, state.step, state.retired_at_K)
        alive_K = retired_at_K < 0
        divide_K = self.optimizer.clip_scales(grad_norm_K)
        signals = {} if probe is None else dict(probe.values)
        if probe is not None:
            signals |= self._named("grad", self.layout.rms(grads_KP))
        veto_K = (~alive_K).to(torch.float32)
        self.optimizer.step(state.optim, grads_KP, step=state.step, divide_K=divide_K, veto_K=veto_K)
        if probe is not None:
            signals |= self._named("grad_clipped", self.layout.rms(grads_KP))
            signals |= self._named("param", self.layout.rms(state.optim.params_KP))
            signals |= self._named(
                "update", self.layout.rms(self.optimizer.unscaled_update(state.optim, step=state.step))
            )
        record = StepRecord(ce_K, total_K, grad_norm_K, alive_K, signals)
        return FleetState(state.optim, retired_at_K, state.step + 1), record

    @torch.no_grad()
    def evaluate(self, state: FleetState) -> dict[str, Tensor]:
        """Held-out cross-entropy (nats a token) and accuracy of every replica, each [K], on the same sequences."""
        batch = self.batches.eval(self.configs[0].eval_sequences)
        params = self._leaves(state)
        sums = {"loss/eval/ce": torch.zeros(self.size, dtype=torch.float64, device=self.device)}
        sums["accuracy/eval/mean"] = sums["loss/eval/ce"].clone()
        # Sequences go through in chunks the size of a training batch, so that evaluation never needs more memory.
        num_targets = 0
        for start in range(0, batch.inputs_KBT.shape[1], self.configs[0].batch_size):
            rows = slice(start, start + self.configs[0].batch_size)
            inputs_KBT = batch.inputs_KBT[:, rows].to(self.device).expand(self.size, -1, -1)
            targets_KN = batch.targets_KBT[:, rows].to(self.device).reshape(1, -1).expand(self.size, -1)
            logits_KNV = self.model(params, inputs_KBT)
            count = int((targets_KN[0] >= 0).sum())
            loss = token_loss(logits_KNV, targets_KN, self.z_K, dtype=self.model.dtypes.loss)
            right_KN = (logits_KNV.argmax(-1) == targets_KN) & (targets_KN >= 0)
            sums["loss/eval/ce"] += loss.ce_K.double() * count
            sums["accuracy/eval/mean"] += right_KN.sum(1).double()
            num_targets += count
        return {name: total_K / num_targets for name, total_K in sums.items()}

    def _gradients(
        self, state: FleetState, inputs_KBT: Tensor, targets_KBT: Tensor, probe: Probe | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        params = {name: leaf.requires_grad_() for name, leaf in self._leaves(state).items()}
        inputs_KBT, targets_KN = inputs_KBT.to(self.device), targets_KBT.to(self.device).flatten(1)
        with torch.enable_grad():
            logits_KNV = self.model(params, inputs_KBT, probe)
            tap = None if probe is None else probe.logits
            loss = token_loss(logits_KNV, targets_KN, self.z_K, dtype=self.model.dtypes.loss, tap=tap)
            grads = torch.autograd.grad(loss.total_K.sum(), list(params.values()))
        if self._grads_KP is None:
            self._grads_KP = torch.empty_like(state.optim.params_KP)
        into = self.layout.views(self._grads_KP)
        torch._foreach_copy_([into[name] for name in params], list(grads))
        return loss.ce_K.detach(), loss.total_K.detach(), self._grads_KP

    def _leaves(self, state: FleetState) -> dict[str, Tensor]:
        """Named tensors the model computes with: views of the parameters, or their copies in the matmul dtype."""
        params_KP = state.optim.params_KP.detach()
        named = self.layout.views(params_KP)
        if self.model.dtypes.matmul != self.model.dtypes.params:
            master_KM = params_KP[:, : self.layout.matmul_size]
            if self._work_KM is None:
                self._work_KM = torch.empty(master_KM.shape, dtype=self.model.dtypes.matmul, device=self.device)
            self._work_KM.copy_(master_KM)
            named |= self.layout.views(self._work_KM)
        if self.model.dtypes.logits != self.model.dtypes.params:
            for place in self.layout.places:
                if place.spec.role == "logits":
                    named[place.spec.name] = named[place.spec.name].to(self.model.dtypes.logits)
        return {name: tensor.detach() for name, tensor in named.items()}

    def _named(self, kind: str, rms_KX: Tensor) -> dict[str, Tensor]:
        return {f"{kind}/{name}/rms": rms_K for name, rms_K in zip(self.layout.names, rms_KX.unbind(1), strict=True)}


def check_same(configs: Sequence[RunConfig]) -> None:
    """Raises ValueError if these runs cannot train in lockstep, naming the fields that differ."""
    if not configs:
        raise ValueError("a fleet needs at least one run")
    first = leaves(to_dict(fleet_key(configs[0])))
    for config in configs[1:]:
        other = leaves(to_dict(fleet_key(config)))
        differ = sorted(key for key in first.keys() | other.keys() if first.get(key) != other.get(key))
        if differ:
            names = ", ".join(differ)
            raise ValueError(
                f"runs of one fleet may differ only in optimizer settings and seeds; these differ in {names}"
            )
