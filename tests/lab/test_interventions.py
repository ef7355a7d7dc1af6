"""interventions: each touches the fields it names and no others, any two compose, and no effect is an error."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest

from aftershock.config import leaves, override, to_dict
from aftershock.lab.interventions import BASELINE, INTERVENTIONS, apply
from aftershock.lab.recipe import MlpConfig, ModularData, RunConfig

BASE = RunConfig()

TOUCHES: dict[str, dict[str, Any]] = {
    "no_qk_norm": {"model.qk_norm": "off"},
    "qk_norm_width": {"model.qk_norm": "width"},
    "no_z_loss": {"optim.z_loss": 0.0},
    "z_loss": {"optim.z_loss": 1e-3},
    "no_decay": {"optim.weight_decay": 0.0},
    "decay": {"optim.weight_decay": 1e-3},
    "coupled_decay": {"optim.decay": "coupled", "optim.weight_decay": 0.1},
    "warmup": {"optim.warmup_steps": 100},
    "constant_lr": {"optim.schedule": "constant"},
    "beta1": {"optim.beta1": 0.8},
    "beta2": {"optim.beta2": 0.99},
    "eps": {"optim.eps": 1e-15},
    "clip": {"optim.clip_norm": 0.1},
    "no_clip": {"optim.clip_norm": None},
    "parameter_lr": {"optim.lr_scale": "parameter_rms"},
    "mup": {"model.mup": "simple"},
    "inverse_scale": {"model.attention_scale": "inverse"},
    "relu2_attention": {"model.attention": "relu2"},
    "kappa": {"model.logit_scale": 1000.0},
    "depth": {"model.depth": 4},
    "steps": {"steps": 600},
    "batch": {"batch_size": 16},
    "bf16": {"precision.matmul": "bfloat16"},
    "float64": {"precision.params": "float64", "precision.loss": "float64"},
}
"""What each does to the default config with its example as argument. A new intervention is one line here."""


def arm(name: str) -> str:
    argument = INTERVENTIONS[name].argument
    return name if argument is None else f"{name}:{argument}"


def changed(before: RunConfig, after: RunConfig) -> dict[str, tuple[Any, Any]]:
    a, b = leaves(to_dict(before)), leaves(to_dict(after))
    return {path: (a[path], b[path]) for path in a if a[path] != b[path]}


def test_every_intervention_is_tested() -> None:
    assert set(TOUCHES) == set(INTERVENTIONS)
    assert all(entry.summary for entry in INTERVENTIONS.values())


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_it_touches_its_fields_and_reports_them(name: str) -> None:
    """contract: exactly these, with the values before and after; the config given is left alone."""
    touched = apply(BASE, arm(name))
    old = leaves(to_dict(RunConfig()))
    assert touched.fields == {path: (old[path], value) for path, value in TOUCHES[name].items()}
    assert touched.fields == changed(BASE, touched.config)
    assert RunConfig() == BASE


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_twice_is_an_error(name: str) -> None:
    """contract: the second one changes nothing, in one arm or on a config that has it already."""
    with pytest.raises(ValueError, match="changes nothing in this config"):
        apply(BASE, f"{arm(name)}+{arm(name)}")
    with pytest.raises(ValueError, match="changes nothing in this config"):
        apply(apply(BASE, arm(name)).config, arm(name))


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(INTERVENTIONS, 2)))
def test_every_pair_composes(first: str, second: str) -> None:
    """contract: both orders of every pair; on different fields they commute, on a shared one the later wins."""
    touched = apply(BASE, f"{arm(first)}+{arm(second)}")
    assert touched.fields == changed(BASE, touched.config)
    wanted = TOUCHES[first] | TOUCHES[second]
    # float64 also takes back what a bf16 before it has set; the other way round, bf16 matmuls on float64 parameters.
    if (first, second) == ("bf16", "float64"):
        wanted = TOUCHES["float64"]
    assert {path: after for path, (_, after) in touched.fields.items()} == wanted
    if not TOUCHES[first].keys() & TOUCHES[second].keys() and {first, second} != {"bf16", "float64"}:
        assert apply(BASE, f"{arm(second)}+{arm(first)}").config == touched.config


def test_baseline_touches_nothing() -> None:
    touched = apply(BASE, BASELINE)
    assert touched.config is BASE
    assert touched.fields == {}


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("model.rope_base=5000", "model.rope_base", 5000.0),
        ("model.rope_base=1e+3", "model.rope_base", 1000.0),
        ("optim.clip_norm=null", "optim.clip_norm", None),
        ("data.source=s3://bucket/text", "data.source", "s3://bucket/text"),
    ],
)
def test_any_field_can_be_set_by_its_path(text: str, path: str, value: Any) -> None:
    """contract: also where the value holds a plus or a colon, which separate elsewhere."""
    touched = apply(BASE, f"no_qk_norm+{text}")
    assert touched.fields[path][1] == value
    assert len(touched.fields) == 2


def test_another_kind_of_data_and_model() -> None:
    """contract: fields that only one of the kinds has read as None on the other side."""
    touched = apply(BASE, "data.kind=modular+model.kind=mlp+data.modulus=11")
    assert touched.config == dataclasses.replace(BASE, data=ModularData(modulus=11), model=MlpConfig())
    assert touched.fields["data.kind"] == ("language", "modular")
    assert touched.fields["data.modulus"] == (None, 11)
    assert touched.fields["model.width"] == (64, None)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("no_qk_nrom", r"unknown intervention 'no_qk_nrom'; did you mean 'no_qk_norm'\?"),
        ("basline", r"unknown intervention 'basline'; did you mean 'baseline'\?"),
        ("zzzz", "unknown intervention 'zzzz'; known: baseline, no_qk_norm,"),
        ("", "unknown intervention ''"),
        ("no_qk_norm+", "unknown intervention ''"),
        ("warmup", "intervention 'warmup' needs an argument, for example warmup:100"),
        ("warmup:", "intervention 'warmup' needs an argument, for example warmup:100"),
        ("no_clip:1", "intervention 'no_clip' takes no argument, got '1'"),
        ("no_clip:", "intervention 'no_clip' takes no argument"),
        ("warmup:soon", "arm 'warmup:soon'.optim.warmup_steps: expected int, got 'soon'"),
        ("warmup:[", r"arm 'warmup:\[': optim.warmup_steps: '\[' is not readable as a YAML value"),
        ("warmup:1000", "optim.warmup_steps=1000 exceeds steps=300"),
        ("mup:halve", "model.mup: got 'halve'; known: off, simple, intermediate, full"),
        ("model.widht=3", "did you mean 'model.width'"),
        ("no_qk_norm+model.qk_norm=head", "its parts undo each other; write 'baseline'"),
    ],
)
def test_mistakes_are_answered(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        apply(BASE, text)
    assert "\n" not in str(caught.value)


def test_an_intervention_on_the_decoder_is_refused_for_another_model() -> None:
    grok = override(BASE, {"data.kind": "modular", "model.kind": "mlp"})
    with pytest.raises(ValueError, match="unknown key 'model.qk_norm'"):
        apply(grok, "no_qk_norm")
    assert apply(grok, "no_decay").fields == {"optim.weight_decay": (1e-4, 0.0)}
