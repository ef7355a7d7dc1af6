"""A tiny training loop that does what an action says: enough of a guard to try policies on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aftershock.guard.policy import Action, Continue, Live, Policy, Rewind, ScaleLR, Seen
from aftershock.signals.detect.rule import Verdict

Fault = Callable[[int, nn.Module], None]


class Net(nn.Module):
    """Embedding, linear, norm, head: two and one axes; `embed` can be found by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.inner = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.inner(self.embed(tokens)))))


class Loop:
    """`run(policy, steps)` trains and books each action; `fault(batch, model)` may edit the gradients of a batch."""

    def __init__(
        self, *, optimizer: str = "adamw", seed: int = 0, lr: float = 1e-2, cooling: float = 1.0, **settings: Any
    ) -> None:
        torch.manual_seed(seed)
        self.model = Net()
        kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer]
        self.optimizer = kind(self.model.parameters(), lr=lr, **settings)
        self.lr, self.cooling = lr, cooling
        self.step = self.batch = 0
        self.actions: list[Action] = []
        self.update_norms: list[float] = []
        self.grad_norms: list[float] = []
        self._snapshot = self._state()
        self._at = 0

    @property
    def live(self) -> Live:
        return Live(self.model, self.optimizer, dict(self.model.named_parameters()))

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def is_finite(self) -> bool:
        tensors = [*self.model.parameters()]
        for state in self.optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, Tensor)]
        return all(bool(tensor.isfinite().all()) for tensor in tensors)

    def run(
        self,
        policy: Policy | None,
        steps: int,
        *,
        fault: Fault | None = None,
        verdicts: Mapping[int, Mapping[str, Verdict]] | None = None,
    ) -> Loop:
        for _ in range(steps):
            data = torch.Generator().manual_seed(1000 + self.batch)
            tokens = torch.randint(11, (8,), generator=data)
            self.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.model(tokens), (tokens * 3 + 1) % 11)
            loss.backward()
            if fault is not None:
                fault(self.batch, self.model)
            self._one(policy, loss.item(), (verdicts or {}).get(self.batch, {}))
            self.batch += 1
        return self

    def _one(self, policy: Policy | None, loss: float, verdicts: Mapping[str, Verdict]) -> None:
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = _norm(grads)
        seen = Seen(self.step, self.batch, loss, norm, float("nan"), self.lr, verdicts, None, (self._at,))
        action = policy.before_step(seen, self.live) if policy else Continue()
        self.actions.append(action)
        if policy and isinstance(action, Rewind):
            self._restore()
            policy.after_rewind(self._at)
        if not isinstance(action, (Continue, ScaleLR)):
            return
        params = [p.detach() for p in self.model.parameters()]
        before = [p.clone() for p in params]
        self.grad_norms.append(_norm(grads))
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * (action.factor if isinstance(action, ScaleLR) else 1.0)
        self.optimizer.step()
        self.lr *= self.cooling  # the schedule moves on before the update is judged
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        if policy:
            moved = _norm(torch._foreach_sub(params, before))
            self.actions.append(policy.after_step(seen._replace(update_norm=moved), self.live))
        self.update_norms.append(_norm(torch._foreach_sub(params, before)))
        self.step += 1

    def _state(self) -> dict[str, Any]:
        return copy.deepcopy({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()})

    def _restore(self) -> None:
        self.model.load_state_dict(self._snapshot["model"])
        self.optimizer.load_state_dict(copy.deepcopy(self._snapshot["optimizer"]))
        self.step = self._at


def _norm(tensors: Sequence[Tensor]) -> float:
    return torch.stack(torch._foreach_norm(list(tensors), 2)).norm().item()


def spike(at: int, factor: float = 1000.0) -> Fault:
    """All gradients of one batch times `factor`."""

    def fault(batch: int, model: nn.Module) -> None:
        if batch == at:
            for param in model.parameters():
                if param.grad is not None:
                    param.grad.mul_(factor)

    return fault


def poison(at: int, value: float) -> Fault:
    """One element of one gradient of one batch is `value`."""

    def fault(batch: int, model: nn.Module) -> None:
        if batch == at:
            grad = next(model.parameters()).grad
            assert grad is not None
            grad.view(-1)[3] = value

    return fault


class Kit:
    """What the tests of policies share."""

    Loop = Loop
    spike = staticmethod(spike)
    poison = staticmethod(poison)


@pytest.fixture
def kit() -> type[Kit]:
    return Kit
