"""Models for fleets: each maps (named parameters [K, ...], token ids [K, B, T]) to logits [K, B*T, V]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from aftershock.lab.models.decoder import Decoder, Dtypes
from aftershock.lab.models.layout import ParamSpec
from aftershock.lab.models.mlp import Mlp
from aftershock.lab.models.probe import Probe
from aftershock.lab.recipe import DecoderConfig, MlpConfig, PrecisionConfig


class Model(Protocol):
    """What the fleet needs of a model. To add one: a config in `recipe`, a file here, a line in `build_model`."""

    dtypes: Dtypes

    def specs(self) -> list[ParamSpec]: ...

    def __call__(self, params: Mapping[str, Tensor], inputs_KBT: Tensor, probe: Probe | None = None) -> Tensor: ...


def build_model(
    config: DecoderConfig | MlpConfig,
    *,
    vocab_size: int,
    context: int,
    precision: PrecisionConfig,
    device: torch.device,
) -> Model:
    """The model of a config, its constant tables on `device`."""
    kinds = {DecoderConfig: Decoder, MlpConfig: Mlp}
    return kinds[type(config)](config, vocab_size=vocab_size, context=context, precision=precision, device=device)  # pyright: ignore[reportArgumentType]
