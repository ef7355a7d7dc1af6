"""AdamW for K replicas in lockstep: each row with its own rate, betas, eps, decay, clip, and its own veto.

Legend: K replicas, P parameters of one replica, C columns of one section (tensors sharing a learning-rate factor).
The arithmetic is PyTorch's fused AdamW kernel, called once per row and section; this file decides what it is told.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from aftershock.lab.models.layout import Layout
from aftershock.lab.recipe import OptimConfig

MIN_PARAMETER_RMS = 1e-3
"""Floor of the parameter-scale factor (Shazeer & Stern 2018, section 8; Wortsman et al. 2023, figure E.14)."""


def schedule(config: OptimConfig, step: int, num_steps: int) -> float:
    """Learning rate of 0-based `step`: linear from 0 in the warm-up, then cosine to the absolute `min_lr`, or constant.

    lr(t) = lr * t / W for t < W; then min_lr + (lr - min_lr) * (1 + cos(pi (t - W) / (num_steps - W))) / 2.
    """
    if step < config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * progress)) / 2


class OptimState(NamedTuple):
    """Parameters and Adam moments, each [K, P] in the parameter dtype; updated in place by `AdamW.step`."""

    params_KP: Tensor
    exp_avg_KP: Tensor
    exp_avg_sq_KP: Tensor

    @classmethod
    def fresh(cls, params_KP: Tensor) -> OptimState:
        return cls(params_KP, torch.zeros_like(params_KP), torch.zeros_like(params_KP))


class AdamW:
    """AdamW (Loshchilov & Hutter 2019) with independent or coupled decay; see `OptimConfig` for the two formulas."""

    def __init__(self, configs: Sequence[OptimConfig], layout: Layout, *, num_steps: int) -> None:
        scales = {config.lr_scale for config in configs}
        assert len(scales) == 1, "lr_scale is part of the fleet key"
        self.configs, self.layout, self.num_steps = list(configs), layout, num_steps
        self.by_rms = scales == {"parameter_rms"}
        self.sections = layout.sections(per_tensor=self.by_rms)

    def clip_scales(self, grad_norm_K: Tensor) -> Tensor:
        """What each row's gradient is divided by: max(1, (norm + 1e-6) / clip), 1 where clipping is off."""
        clip_K = torch.tensor(
            [math.inf if c.clip_norm is None else c.clip_norm for c in self.configs],
            dtype=grad_norm_K.dtype,
            device=grad_norm_K.device,
        )
        # 1e-6 as in torch.nn.utils.clip_grad_norm_, so that a run here matches a run there.
        return ((grad_norm_K + 1e-6) / clip_K).clamp(min=1)

    def step(self, state: OptimState, grads_KP: Tensor, *, step: int, divide_K: Tensor, veto_K: Tensor) -> None:
        """Update `state` in place at 0-based `step` from `grads_KP`, which is divided by `divide_K` in place.

        A row whose `veto_K` is 1.0 is left untouched to the bit, moments included. No value is read by the host, but
        for the parameter RMS where that scales the rate.
        """
        if grads_KP.dtype == torch.float64:  # the kernel takes its divisor in float32 only
            grads_KP.div_(divide_K[:, None])
            divide_K = torch.ones_like(veto_K)
        rms_by_row = self.layout.rms(state.params_KP).tolist() if self.by_rms else None
        count = torch.tensor(float(step + 1), device=grads_KP.device)
        for k, config in enumerate(self.configs):
            lr = schedule(config, step, self.num_steps)
            for i, (start, stop, factor) in enumerate(self.sections):
                if rms_by_row is not None:
                    factor *= max(MIN_PARAMETER_RMS, rms_by_row[k][i])
                torch._fused_adamw_(
                    [state.params_KP[k, start:stop]],
                    [grads_KP[k, start:stop]],
                    [state.exp_avg_KP[k, start:stop]],
                    [state.exp_avg_sq_KP[k, start:stop]],
                    [],
                    [count],
                    lr=lr * factor,
                    beta1=config.beta1,
                    beta2=config.beta2,
                    weight_decay=_kernel_decay(config, lr, factor),
                    eps=config.eps,
                    amsgrad=False,
                    maximize=False,
                    grad_scale=divide_K[k],
                    found_inf=veto_K[k],
                )

    def unscaled_update(self, state: OptimState, *, step: int) -> Tensor:
        """Delta [K, P] of the step just taken: m_hat / (sqrt(v_hat) + eps), without learning rate and without decay."""
        # In Python's float64: in float32, 1 - beta2^t of a beta2 near 1 keeps few digits.
        m_scale_K1 = self._column(state, [1 - c.beta1 ** (step + 1) for c in self.configs])
        v_scale_K1 = self._column(state, [math.sqrt(1 - c.beta2 ** (step + 1)) for c in self.configs])
        eps_K1 = self._column(state, [c.eps for c in self.configs])
        denominator_KP = state.exp_avg_sq_KP.sqrt().div_(v_scale_K1).add_(eps_K1)
        return (state.exp_avg_KP / denominator_KP).div_(m_scale_K1)

    def _column(self, state: OptimState, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=state.params_KP.dtype, device=state.params_KP.device)[:, None]


def _kernel_decay(config: OptimConfig, lr: float, factor: float) -> float:
    """The kernel multiplies by 1 - lr_group * decay; independent decay wants 1 - s_t * lambda at any group's rate."""
    if config.decay == "coupled":
        return config.weight_decay
    return config.weight_decay / (config.lr * factor) if lr > 0 else 0.0
