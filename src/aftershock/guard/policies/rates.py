"""The rates that a step was really taken with: after it, a scheduler or the guard may already have changed them.

Must not import a policy.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer


class StepRates:
    """Reads every group's rate as the optimizer steps, through its own step hook; nothing is changed."""

    def __init__(self) -> None:
        self._optimizer: Optimizer | None = None
        self._rates: dict[Tensor, float] = {}

    def watch(self, optimizer: Optimizer) -> None:
        """Call before each step; the hook is registered once per optimizer."""
        if optimizer is not self._optimizer:
            self._optimizer = optimizer
            optimizer.register_step_pre_hook(self._read)

    def of(self, param: Tensor) -> float:
        """The rate of the group of `param` in the step just taken."""
        return self._rates[param]

    def _read(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        rates = [(group["params"], float(group["lr"])) for group in optimizer.param_groups]
        self._rates = {param: rate for params, rate in rates for param in params}
