"""The policies by name: each one way to treat instability, behind the one interface of `guard.policy`.

`Ladder` is the default. Must not import the guard.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from aftershock.config import nearest
from aftershock.guard.policies.adagc import AdaGC
from aftershock.guard.policies.adaptive_lr import AdaptiveLR
from aftershock.guard.policies.backoff import BackOff, RatioBackOff
from aftershock.guard.policies.chain import Chain
from aftershock.guard.policies.embedding import EmbeddingShrink
from aftershock.guard.policies.ladder import Ladder
from aftershock.guard.policies.qk_clip import QKClip
from aftershock.guard.policies.rewind import Backtrack, RewindAndSkip
from aftershock.guard.policies.skip import Skip
from aftershock.guard.policies.spam import MomentumReset, Spam, StableSpam
from aftershock.guard.policies.switches import BetaSwitch, DecaySwitch, EpsSwitch, PrecisionSwitch, ZLossSwitch
from aftershock.guard.policies.tensor_clip import RelativeClip, TensorClip, UnitClip
from aftershock.guard.policies.update_clip import RmsClip, StableAdamW, UpdateClip
from aftershock.guard.policies.zclip import ZClip
from aftershock.guard.policy import Policy

POLICIES: dict[str, type[Policy]] = {
    "ladder": Ladder,
    "skip": Skip,
    "rewind_and_skip": RewindAndSkip,
    "backtrack": Backtrack,
    "zclip": ZClip,
    "adagc": AdaGC,
    "tensor_clip": TensorClip,
    "unit_clip": UnitClip,
    "relative_clip": RelativeClip,
    "spam": Spam,
    "stable_spam": StableSpam,
    "momentum_reset": MomentumReset,
    "update_clip": UpdateClip,
    "rms_clip": RmsClip,
    "stable_adamw": StableAdamW,
    "back_off": BackOff,
    "ratio_back_off": RatioBackOff,
    "qk_clip": QKClip,
    "embedding_shrink": EmbeddingShrink,
    "beta_switch": BetaSwitch,
    "eps_switch": EpsSwitch,
    "decay_switch": DecaySwitch,
    "zloss_switch": ZLossSwitch,
    "precision_switch": PrecisionSwitch,
    "adaptive_lr": AdaptiveLR,
    "chain": Chain,
}
"""Every policy there is."""


def policy(name: str, **settings: Any) -> Policy:
    """The policy `name` with `settings`. Raises ValueError for an unknown name or setting, with the nearest one.

    >>> policy("zclip", max_norm=0.5).max_norm
    0.5
    """
    if name not in POLICIES:
        raise ValueError(f"unknown policy {name!r}{nearest(name, POLICIES)}")
    kind = POLICIES[name]
    fields = [field.name for field in dataclasses.fields(kind) if field.init]  # pyright: ignore[reportArgumentType]
    for setting in settings:
        if setting not in fields:
            raise ValueError(f"policy {name} has no setting {setting!r}{nearest(setting, fields)}")
    return kind(**settings)
