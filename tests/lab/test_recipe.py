"""recipe: each value that makes no sense has its sentence, and a fleet's key keeps what must be equal."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest

from aftershock.config import leaves, override, to_dict
from aftershock.lab.recipe import (
    PAPER_LRS,
    DecoderConfig,
    LanguageData,
    MlpConfig,
    ModularData,
    OptimConfig,
    RunConfig,
    fleet_key,
)

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("config", "setting", "says"),
    [
        (LanguageData, {"context": 1}, "data.context must be at least 2 tokens, got 1"),
        (LanguageData, {"eval_frac": 0.0}, "data.eval_frac must lie between 0 and 1, got 0.0"),
        (LanguageData, {"eval_frac": 1.0}, "data.eval_frac must lie between 0 and 1, got 1.0"),
        (LanguageData, {"eval_frac": NAN}, "data.eval_frac must lie between 0 and 1, got nan"),
        (LanguageData, {"vocab_size": 1}, "data.vocab_size must be at least 2, got 1"),
        (ModularData, {"modulus": 2}, "data.modulus must be at least 3, got 2"),
        (ModularData, {"train_frac": 0.0}, "data.train_frac must lie between 0 and 1, got 0.0"),
        (ModularData, {"train_frac": 1.5}, "data.train_frac must lie between 0 and 1, got 1.5"),
        (ModularData, {"modulus": 9, "operation": "div"}, "data.operation div needs a prime modulus, got 9"),
        (DecoderConfig, {"width": 0}, "model.width must be at least 2, got 0"),
        (DecoderConfig, {"depth": -1}, r"model.depth must be 0 \(the bigram network\) or more, got -1"),
        (DecoderConfig, {"heads": 0}, "model.heads must be at least 1, got 0"),
        (DecoderConfig, {"heads": 5}, "model.heads=5 does not divide model.width=64; choose a divisor of the width"),
        (DecoderConfig, {"width": 6, "heads": 2}, r"head dimension 3 \(= width 6 / heads 2\) must be even for rotary"),
        (DecoderConfig, {"mlp_ratio": 0}, "model.mlp_ratio must be at least 1, got 0"),
        (DecoderConfig, {"mup_base_width": 0}, "model.mup_base_width must be at least 1, got 0"),
        (
            DecoderConfig,
            {"logit_scale": 0.0},
            r"model.logit_scale \(kappa\) must be above 0, or null for none, got 0.0",
        ),
        (DecoderConfig, {"logit_scale": INF}, "model.logit_scale must be a finite number, got inf"),
        (DecoderConfig, {"rope_base": 0.0}, "model.rope_base must be above 0, got 0"),
        (DecoderConfig, {"norm_eps": 0.0}, "model.norm_eps must be above 0, got 0"),
        (DecoderConfig, {"norm_eps": NAN}, "model.norm_eps must be a finite number, got nan"),
        (MlpConfig, {"embed": 0}, "model.embed must be at least 1, got 0"),
        (MlpConfig, {"hidden": -3}, "model.hidden must be at least 1, got -3"),
        (OptimConfig, {"lr": 0.0}, "optim.lr must be above 0, got 0"),
        (OptimConfig, {"lr": -0.1}, "optim.lr must be above 0, got -0.1"),
        (OptimConfig, {"lr": NAN}, "optim.lr must be a finite number, got nan"),
        (OptimConfig, {"lr": INF}, "optim.lr must be a finite number, got inf"),
        (OptimConfig, {"min_lr": -1e-5}, "optim.min_lr must be at least 0, got -1e-05"),
        (OptimConfig, {"lr": 1e-6}, "optim.min_lr=1e-05 is above the peak optim.lr=1e-06; lower it"),
        (OptimConfig, {"warmup_steps": -1}, "optim.warmup_steps must be at least 0, got -1"),
        (OptimConfig, {"beta1": 1.0}, r"optim.beta1 must lie in \[0, 1\), got 1.0"),
        (OptimConfig, {"beta2": -0.1}, r"optim.beta2 must lie in \[0, 1\), got -0.1"),
        (OptimConfig, {"eps": 0.0}, "optim.eps must be above 0, got 0"),
        (OptimConfig, {"weight_decay": -1.0}, "optim.weight_decay must be at least 0, got -1"),
        (OptimConfig, {"weight_decay": INF}, "optim.weight_decay must be a finite number, got inf"),
        (OptimConfig, {"clip_norm": 0.0}, "optim.clip_norm must be above 0, or null for no clipping, got 0.0"),
        (OptimConfig, {"z_loss": -1e-4}, "optim.z_loss must be at least 0, got -0.0001"),
        (RunConfig, {"steps": 0}, "steps must be at least 1, got 0"),
        (RunConfig, {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        (RunConfig, {"log_every": 0}, "log_every must be at least 1, got 0"),
        (RunConfig, {"measure_every": -1}, r"measure_every must be at least 0 \(0 = never\), got -1"),
        (RunConfig, {"eval_every": -1}, r"eval_every must be at least 0 \(0 = never\), got -1"),
        (RunConfig, {"snapshot_every": -1}, r"snapshot_every must be at least 0 \(0 = never\), got -1"),
        (RunConfig, {"eval_sequences": 0}, "eval_sequences must be at least 1, got 0"),
        (RunConfig, {"seed": -1}, r"seed must lie in \[0, 2\^32\), got -1"),
        (RunConfig, {"seed": 2**32}, r"seed must lie in \[0, 2\^32\), got 4294967296"),
        (RunConfig, {"data_seed": -1}, r"data_seed must lie in \[0, 2\^63\), got -1"),
        (RunConfig, {"steps": 10}, "optim.warmup_steps=25 exceeds steps=10; shorten it or train longer"),
        (RunConfig, {"model": MlpConfig()}, "the mlp model has no notion of a sequence: use it with data.kind=modular"),
    ],
    ids=str,
)
def test_nonsense_has_its_sentence(config: type[Any], setting: dict[str, Any], says: str) -> None:
    """contract: what was got and what is possible, on one line, and the field by the name a user writes."""
    with pytest.raises(ValueError, match=says) as caught:
        config(**setting)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "setting"),
    [
        (DecoderConfig, {"depth": 0}),
        (DecoderConfig, {"width": 2, "heads": 1}),
        (OptimConfig, {"lr": 1e-6, "schedule": "constant"}),
        (OptimConfig, {"min_lr": 1e-2, "lr": 1e-2}),
        (OptimConfig, {"beta1": 0.0, "beta2": 0.0, "clip_norm": None, "weight_decay": 0.0, "z_loss": 0.0}),
        (ModularData, {"modulus": 9, "operation": "mul"}),
        (RunConfig, {"steps": 25, "seed": 2**32 - 1, "data_seed": 2**63 - 1}),
        (RunConfig, {"measure_every": 0, "eval_every": 0, "snapshot_every": 0}),
    ],
    ids=str,
)
def test_the_edges_of_sense_are_allowed(config: type[Any], setting: dict[str, Any]) -> None:
    """contract: taken as given, neither refused nor moved."""
    made = config(**setting)
    assert {name: getattr(made, name) for name in setting} == setting


def test_defaults_are_the_papers() -> None:
    """contract: section 2.1 of arXiv 2309.14322, lengths and sizes aside; the ladder is log-spaced."""
    optim, model = OptimConfig(), DecoderConfig()
    assert (optim.beta1, optim.beta2, optim.eps, optim.clip_norm) == (0.9, 0.95, 1e-8, 1.0)
    assert (optim.decay, optim.weight_decay, optim.z_loss, optim.min_lr) == ("independent", 1e-4, 1e-4, 1e-5)
    assert (model.qk_norm, model.attention, model.mup, model.mlp_ratio) == ("head", "softmax", "off", 4)
    assert (model.norm_eps, model.rope_base, model.activation) == (1e-6, 10_000.0, "gelu_tanh")
    assert (len(PAPER_LRS), PAPER_LRS[0], PAPER_LRS[-1]) == (7, 3e-4, 3e-1)
    assert all(2.99 <= b / a <= 3.34 for a, b in itertools.pairwise(PAPER_LRS))


def test_the_fleet_key_forgets_optimizer_and_seeds_and_nothing_else() -> None:
    """contract: field by field over the whole config."""
    free = {"seed", "data_seed", *(f"optim.{f.name}" for f in dataclasses.fields(OptimConfig))} - {"optim.lr_scale"}
    base = RunConfig()
    for path, value in leaves(to_dict(base)).items():
        if path.endswith("kind"):
            continue
        other = override(base, {path: OTHER[path] if path in OTHER else value + 1})
        assert (fleet_key(other) == fleet_key(base)) == (path in free), path


OTHER: dict[str, Any] = {
    "data.source": "elsewhere",
    "data.eval_frac": 0.1,
    "data.token_dtype": "uint32",
    "model.width": 128,
    "model.heads": 2,
    "model.qk_norm": "off",
    "model.attention": "relu2",
    "model.attention_scale": "inverse",
    "model.logit_scale": 3.0,
    "model.mup": "full",
    "model.activation": "gelu",
    "optim.min_lr": 1e-6,
    "optim.schedule": "constant",
    "optim.beta1": 0.5,
    "optim.beta2": 0.5,
    "optim.decay": "coupled",
    "optim.lr_scale": "parameter_rms",
    "precision.params": "float64",
    "precision.matmul": "bfloat16",
    "precision.logits": "float64",
    "precision.loss": "float64",
}
"""Another value for each field where adding one makes no sense."""
