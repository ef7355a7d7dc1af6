"""Interventions: functions config -> config that report what they touched. `warmup:100` is `warmup` with argument 100.

An arm of a study is one or more of them joined by `+` (`no_qk_norm+warmup:100`), or `baseline`, which touches nothing.
Definitions: Wortsman et al. 2023 (arXiv 2309.14322), sections 3 and E. Touching nothing is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from aftershock.config import leaves, nearest, override, to_dict
from aftershock.lab.recipe import RunConfig

BASELINE = "baseline"


class Touched(NamedTuple):
    """The config after an intervention, and each field it changed: dotted path to (before, after)."""

    config: RunConfig
    fields: dict[str, tuple[Any, Any]]


class Intervention(NamedTuple):
    """`changes(argument)` gives the dotted overrides; `argument` is None for an intervention that takes none."""

    summary: str
    changes: Callable[[str], Mapping[str, Any]]
    argument: str | None = None


def _set(path: str) -> Callable[[str], Mapping[str, Any]]:
    return lambda argument: {path: argument}


def _fixed(**changes: Any) -> Callable[[str], Mapping[str, Any]]:
    return lambda _: {path.replace("__", "."): value for path, value in changes.items()}


INTERVENTIONS: dict[str, Intervention] = {
    "no_qk_norm": Intervention("attention without qk-layernorm", _fixed(model__qk_norm="off")),
    "qk_norm_width": Intervention("qk-layernorm over the whole width", _fixed(model__qk_norm="width")),
    "no_z_loss": Intervention("no z-loss", _fixed(optim__z_loss=0.0)),
    "z_loss": Intervention("z-loss with this coefficient", _set("optim.z_loss"), "1e-3"),
    "no_decay": Intervention("no weight decay", _fixed(optim__weight_decay=0.0)),
    "decay": Intervention("this weight decay, in the kind that is set", _set("optim.weight_decay"), "1e-3"),
    "coupled_decay": Intervention(
        "PyTorch's AdamW decay, lr * lambda, with this lambda",
        lambda argument: {"optim.decay": "coupled", "optim.weight_decay": argument},
        "0.1",
    ),
    "warmup": Intervention("this many warm-up steps", _set("optim.warmup_steps"), "100"),
    "constant_lr": Intervention("no decay of the rate after the warm-up", _fixed(optim__schedule="constant")),
    "beta1": Intervention("this beta1", _set("optim.beta1"), "0.8"),
    "beta2": Intervention("this beta2", _set("optim.beta2"), "0.99"),
    "eps": Intervention("this AdamW eps", _set("optim.eps"), "1e-15"),
    "clip": Intervention("gradient clipping at this global norm", _set("optim.clip_norm"), "0.1"),
    "no_clip": Intervention("no gradient clipping", _fixed(optim__clip_norm=None)),
    "parameter_lr": Intervention(
        "rate times the RMS of each tensor, as AdaFactor", _fixed(optim__lr_scale="parameter_rms")
    ),
    "mup": Intervention("muParam: simple, intermediate or full", _set("model.mup"), "simple"),
    "inverse_scale": Intervention("attention scale 1/d_h", _fixed(model__attention_scale="inverse")),
    "relu2_attention": Intervention("squared ReLU in place of softmax", _fixed(model__attention="relu2")),
    "kappa": Intervention("attention logits forced to this scale", _set("model.logit_scale"), "1000"),
    "depth": Intervention("this many blocks", _set("model.depth"), "4"),
    "steps": Intervention("this many steps", _set("steps"), "600"),
    "batch": Intervention("this many sequences a batch", _set("batch_size"), "16"),
    "bf16": Intervention("the paper's bf16 layout", _fixed(precision__matmul="bfloat16")),
    "float64": Intervention(
        "float64 throughout",
        _fixed(
            precision__params="float64",
            precision__loss="float64",
            precision__matmul="params",
            precision__logits="params",
        ),
    ),
}
"""Name to intervention; `argument` holds an example, which is also what the contract test uses."""


def apply(config: RunConfig, arm: str) -> Touched:
    """Apply an arm to `config`.

    >>> apply(RunConfig(), "no_qk_norm").fields
    {'model.qk_norm': ('head', 'off')}

    Raises ValueError for an unknown name (with the nearest), a missing or needless argument, or no effect.
    """
    touched: dict[str, tuple[Any, Any]] = {}
    # A plus before a digit belongs to a number: model.rope_base=1e+4.
    for part in [] if arm == BASELINE else re.split(r"\+(?!\d)", arm):
        before = leaves(to_dict(config))
        config = override(config, _changes(part), where=f"arm {arm!r}")
        after = leaves(to_dict(config))
        # Another `kind` has other fields: one that is absent reads as None.
        pairs = {path: (before.get(path), after.get(path)) for path in before | after}
        changed = {path: pair for path, pair in pairs.items() if pair[0] != pair[1]}
        if not changed:
            raise ValueError(f"arm {arm!r}: {part!r} changes nothing in this config; drop it or change its argument")
        touched |= {path: (touched.get(path, pair)[0], pair[1]) for path, pair in changed.items()}
    touched = {path: pair for path, pair in touched.items() if pair[0] != pair[1]}
    if arm != BASELINE and not touched:
        raise ValueError(f"arm {arm!r}: its parts undo each other; write {BASELINE!r}")
    return Touched(config, touched)


def _changes(part: str) -> Mapping[str, Any]:
    name, colon, argument = part.partition(":")
    if "=" in name:  # model.rope_base=5000: any field, for what has no name of its own
        path, _, value = part.partition("=")
        return {path: value}
    intervention = INTERVENTIONS.get(name)
    if intervention is None:
        raise ValueError(f"unknown intervention {name!r}{nearest(name, [BASELINE, *INTERVENTIONS])}")
    if intervention.argument is None and colon:
        raise ValueError(f"intervention {name!r} takes no argument, got {argument!r}")
    if intervention.argument is not None and not argument:
        raise ValueError(f"intervention {name!r} needs an argument, for example {name}:{intervention.argument}")
    return intervention.changes(argument)
