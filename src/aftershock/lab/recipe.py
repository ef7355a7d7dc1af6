"""What a run is made of: the frozen configs, their checks, and which of their fields may differ inside one fleet.

`RunConfig` is the whole of a run: two equal ones give equal bits. Defaults are those of Wortsman et al. 2023
(arXiv 2309.14322, section 2) except the lengths and sizes, which are a CPU's.
Holds no torch: a sweep of a thousand runs is planned without loading it.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

PAPER_LRS: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
"""The 7-rate ladder (arXiv 2309.14322, section 2.1)."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_finite(section: str, config: object) -> None:
    for name, value in vars(config).items():
        if isinstance(value, float):
            _require(math.isfinite(value), f"{section}.{name} must be a finite number, got {value}")


@dataclass(frozen=True, kw_only=True)
class LanguageData:
    """Next-token prediction on text. `source`: `stdlib` (the interpreter's own library), a file, folder or `.bin`."""

    kind: Literal["language"] = "language"
    source: str = "stdlib"
    context: int = 128
    eval_frac: float = 0.05
    token_dtype: Literal["uint16", "uint32"] = "uint16"
    vocab_size: int = 256

    def __post_init__(self) -> None:
        _require(self.context >= 2, f"data.context must be at least 2 tokens, got {self.context}")
        _require(0 < self.eval_frac < 1, f"data.eval_frac must lie between 0 and 1, got {self.eval_frac}")
        _require(self.vocab_size >= 2, f"data.vocab_size must be at least 2, got {self.vocab_size}")


@dataclass(frozen=True, kw_only=True)
class ModularData:
    """Modular arithmetic `a op b = c (mod p)`, the grokking task (Power et al. 2022, arXiv 2201.02177, A.1)."""

    kind: Literal["modular"] = "modular"
    modulus: int = 97
    operation: Literal["add", "sub", "mul", "div"] = "add"
    train_frac: float = 0.5
    split_seed: int = 0

    def __post_init__(self) -> None:
        _require(self.modulus >= 3, f"data.modulus must be at least 3, got {self.modulus}")
        _require(0 < self.train_frac < 1, f"data.train_frac must lie between 0 and 1, got {self.train_frac}")
        prime = all(self.modulus % d for d in range(2, int(self.modulus**0.5) + 1))
        _require(prime or self.operation != "div", f"data.operation div needs a prime modulus, got {self.modulus}")


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The paper's decoder (section 2.1) with every knob of sections 3 and E. `depth=0` is the bigram network.

    Sizes: `width` d, `depth` L, `heads` H; head dimension d/H. Parameter count without embedding and head: 12 L d^2.
    """

    kind: Literal["decoder"] = "decoder"
    width: int = 64
    depth: int = 3
    heads: int = 4
    mlp_ratio: int = 4
    qk_norm: Literal["head", "width", "off"] = "head"
    attention: Literal["softmax", "relu2"] = "softmax"
    attention_scale: Literal["inverse_sqrt", "inverse"] = "inverse_sqrt"
    logit_scale: float | None = None
    mup: Literal["off", "simple", "intermediate", "full"] = "off"
    mup_base_width: int = 256
    activation: Literal["gelu_tanh", "gelu"] = "gelu_tanh"
    rope_base: float = 10_000.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        _require_finite("model", self)
        _require(self.width >= 2, f"model.width must be at least 2, got {self.width}")
        _require(self.depth >= 0, f"model.depth must be 0 (the bigram network) or more, got {self.depth}")
        _require(self.heads >= 1, f"model.heads must be at least 1, got {self.heads}")
        _require(
            self.width % self.heads == 0,
            f"model.heads={self.heads} does not divide model.width={self.width}; choose a divisor of the width",
        )
        _require(
            self.head_dim % 2 == 0,
            f"head dimension {self.head_dim} (= width {self.width} / heads {self.heads}) must be even for rotary "
            "positions; choose other heads",
        )
        _require(self.mlp_ratio >= 1, f"model.mlp_ratio must be at least 1, got {self.mlp_ratio}")
        _require(self.mup_base_width >= 1, f"model.mup_base_width must be at least 1, got {self.mup_base_width}")
        _require(
            self.logit_scale is None or self.logit_scale > 0,
            f"model.logit_scale (kappa) must be above 0, or null for none, got {self.logit_scale}",
        )
        _require(self.rope_base > 0, f"model.rope_base must be above 0, got {self.rope_base:g}")
        _require(self.norm_eps > 0, f"model.norm_eps must be above 0, got {self.norm_eps:g}")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


@dataclass(frozen=True, kw_only=True)
class MlpConfig:
    """Learned embeddings of the inputs, concatenated, then one hidden layer: the fast grokking model."""

    kind: Literal["mlp"] = "mlp"
    embed: int = 128
    hidden: int = 256

    def __post_init__(self) -> None:
        for name in ("embed", "hidden"):
            _require(getattr(self, name) >= 1, f"model.{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, its schedule and the loss's z term (sections 2.1, 3.1.2, 3.2).

    `decay="independent"`: theta -= s_t (lr Delta + weight_decay theta); `"coupled"`: theta -= s_t lr (Delta +
    weight_decay theta), with s_t = lr_t / lr. `lr` is the peak rate and `min_lr` an absolute floor.
    """

    lr: float = 1e-2
    min_lr: float = 1e-5
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = 25
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    decay: Literal["independent", "coupled"] = "independent"
    weight_decay: float = 1e-4
    clip_norm: float | None = 1.0
    z_loss: float = 1e-4
    lr_scale: Literal["none", "parameter_rms"] = "none"

    def __post_init__(self) -> None:
        _require_finite("optim", self)
        _require(self.lr > 0, f"optim.lr must be above 0, got {self.lr:g}")
        _require(0 <= self.min_lr, f"optim.min_lr must be at least 0, got {self.min_lr:g}")
        _require(
            self.schedule == "constant" or self.min_lr <= self.lr,
            f"optim.min_lr={self.min_lr:g} is above the peak optim.lr={self.lr:g}; lower it",
        )
        _require(self.warmup_steps >= 0, f"optim.warmup_steps must be at least 0, got {self.warmup_steps}")
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            _require(0 <= beta < 1, f"optim.{name} must lie in [0, 1), got {beta}")
        _require(self.eps > 0, f"optim.eps must be above 0, got {self.eps:g}")
        _require(self.weight_decay >= 0, f"optim.weight_decay must be at least 0, got {self.weight_decay:g}")
        _require(
            self.clip_norm is None or self.clip_norm > 0,
            f"optim.clip_norm must be above 0, or null for no clipping, got {self.clip_norm}",
        )
        _require(self.z_loss >= 0, f"optim.z_loss must be at least 0, got {self.z_loss:g}")


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Dtypes of the parameters (and optimizer state, residual stream), block matmuls, head logits, and loss.

    The paper's layout is `matmul="bfloat16"` with the rest float32.
    """

    params: Literal["float32", "float64"] = "float32"
    matmul: Literal["params", "bfloat16"] = "params"
    logits: Literal["params", "float32", "float64", "bfloat16"] = "params"
    loss: Literal["float32", "float64"] = "float32"


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything a run depends on. `seed` draws the weights, `data_seed` the batches; `steps` optimizer steps."""

    data: LanguageData | ModularData = field(default_factory=LanguageData)
    model: DecoderConfig | MlpConfig = field(default_factory=DecoderConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    steps: int = 300
    batch_size: int = 8
    seed: int = 0
    data_seed: int = 0
    log_every: int = 1
    measure_every: int = 10
    eval_every: int = 0
    eval_sequences: int = 64
    snapshot_every: int = 0

    def __post_init__(self) -> None:
        _require(self.steps >= 1, f"steps must be at least 1, got {self.steps}")
        _require(self.batch_size >= 1, f"batch_size must be at least 1, got {self.batch_size}")
        _require(self.log_every >= 1, f"log_every must be at least 1, got {self.log_every}")
        for name in ("measure_every", "eval_every", "snapshot_every"):
            _require(getattr(self, name) >= 0, f"{name} must be at least 0 (0 = never), got {getattr(self, name)}")
        _require(self.eval_sequences >= 1, f"eval_sequences must be at least 1, got {self.eval_sequences}")
        # torch's CPU generator reads 32 bits of a seed: 0 and 2^32 would be one run under two names.
        _require(0 <= self.seed < 2**32, f"seed must lie in [0, 2^32), got {self.seed}")
        _require(0 <= self.data_seed < 2**63, f"data_seed must lie in [0, 2^63), got {self.data_seed}")
        _require(
            self.optim.warmup_steps <= self.steps,
            f"optim.warmup_steps={self.optim.warmup_steps} exceeds steps={self.steps}; shorten it or train longer",
        )
        _require(
            isinstance(self.data, ModularData) or isinstance(self.model, DecoderConfig),
            "the mlp model has no notion of a sequence: use it with data.kind=modular",
        )


def fleet_key(config: RunConfig) -> RunConfig:
    """`config` with all that may differ from replica to replica set to one value.

    Runs with equal keys have the same tensors and the same step count, so they can train in lockstep in one fleet.
    """
    optim = dataclasses.replace(OptimConfig(), warmup_steps=0, lr_scale=config.optim.lr_scale)
    return dataclasses.replace(config, optim=optim, seed=0, data_seed=0)
