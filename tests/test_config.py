"""config: what is saved comes back, and what a user mistypes is answered in one sentence that says what to do."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aftershock import config
from aftershock.lab.recipe import DecoderConfig, MlpConfig, ModularData, OptimConfig, RunConfig


@dataclass(frozen=True, kw_only=True)
class Left:
    kind: Literal["left"] = "left"
    width: int = 1


@dataclass(frozen=True, kw_only=True)
class Right:
    kind: Literal["right"] = "right"
    height: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Sample:
    name: str
    rate: float = 1e-3
    count: int = 1
    switch: Literal["on", "off"] = "on"
    limit: float | None = None
    side: Left | Right = field(default_factory=Left)
    rates: tuple[float, ...] = ()
    tags: dict[str, int] = field(default_factory=dict)


def _load(tmp_path: Path, text: str) -> Sample:
    path = tmp_path / "sample.yaml"
    path.write_text(text, encoding="utf-8")
    return config.load_yaml(Sample, path)


@given(
    st.builds(
        Sample,
        name=st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=0, max_size=20),
        rate=st.floats(allow_nan=False, allow_infinity=False),
        count=st.integers(-(2**40), 2**40),
        switch=st.sampled_from(["on", "off"]),
        limit=st.none() | st.floats(-1e300, 1e300),
        side=st.builds(Left, width=st.integers()) | st.builds(Right, height=st.floats(-1e9, 1e9)),
        rates=st.lists(st.floats(1e-12, 1e12)).map(tuple),
        tags=st.dictionaries(st.text("abc", min_size=1), st.integers()),
    )
)
def test_any_config_round_trip(tmp_path_factory: pytest.TempPathFactory, sample: Sample) -> None:
    """round trip: through a dict and through a YAML file, to an equal value with the same run id."""
    assert config.from_dict(Sample, config.to_dict(sample)) == sample
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.write_text(config.dump_yaml(sample), encoding="utf-8")
    again = config.load_yaml(Sample, path)
    assert again == sample
    assert config.run_id(again) == config.run_id(sample)


@pytest.mark.parametrize(
    "run",
    [
        RunConfig(),
        RunConfig(data=ModularData(operation="div"), model=MlpConfig(hidden=32)),
        RunConfig(model=DecoderConfig(qk_norm="off", logit_scale=10.0), optim=OptimConfig(clip_norm=None)),
    ],
)
def test_run_config_round_trip(tmp_path: Path, run: RunConfig) -> None:
    (tmp_path / "run.yaml").write_text(config.dump_yaml(run), encoding="utf-8")
    assert config.load_yaml(RunConfig, tmp_path / "run.yaml") == run


@pytest.mark.parametrize(
    ("text", "rate"), [("1e-3", 1e-3), ("3E-4", 3e-4), ("1.5e+2", 150.0), ("2", 2.0), ("-1e1", -10.0)]
)
def test_numbers_as_people_write_them(tmp_path: Path, text: str, rate: float) -> None:
    """planted: YAML 1.1 alone reads `1e-3` as a string."""
    loaded = _load(tmp_path, f"name: x\nrate: {text}\n").rate
    assert (type(loaded), loaded) == (float, rate)


def test_bare_on_and_off_are_switches_and_not_booleans(tmp_path: Path) -> None:
    """planted: YAML 1.1 reads a bare `off` as false."""
    assert _load(tmp_path, "name: x\nswitch: off\n").switch == "off"
    assert _load(tmp_path, "name: x\nswitch: on\n").switch == "on"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"name": "x", "ratee": 1.0}, r"cfg: unknown key 'ratee'; did you mean 'rate'\?"),
        ({"name": "x", "zzzzzz": 1.0}, r"unknown key 'zzzzzz'; known: name, rate"),
        ({"rate": 1.0}, "cfg: missing name"),
        ({"name": "x", "rate": "fast"}, "cfg.rate: expected float, got 'fast'"),
        ({"name": "x", "rate": True}, "cfg.rate: expected float, got True"),
        ({"name": "x", "rate": float("nan")}, "cfg.rate: must be a finite number, got nan"),
        ({"name": "x", "count": 1.5}, "cfg.count: expected int, got 1.5"),
        ({"name": "x", "count": True}, "cfg.count: expected int, got True"),
        ({"name": 3}, "cfg.name: expected str, got 3"),
        ({"name": "x", "switch": "offf"}, r"cfg.switch: got 'offf'; did you mean 'off'\?"),
        ({"name": "x", "side": {"kind": "rigth"}}, r"cfg.side.kind: got 'rigth'; did you mean 'right'\?"),
        ({"name": "x", "side": {"kind": "right", "width": 3}}, "cfg.side: unknown key 'width'"),
        ({"name": "x", "rates": [1.0, "b"]}, r"cfg.rates\[1\]: expected float, got 'b'"),
        ({"name": "x", "tags": {"a": "b"}}, "cfg.tags.a: expected int, got 'b'"),
        ([1, 2], "cfg: expected a mapping of settings, got list"),
    ],
)
def test_mistakes_name_the_place_and_the_remedy(data: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        config.from_dict(Sample, data, where="cfg")
    assert "\n" not in str(caught.value)


def test_whole_floats_count_and_ints_are_rates() -> None:
    sample = config.from_dict(Sample, {"name": "x", "count": 3.0, "rate": 2, "limit": 1})
    assert (type(sample.count), type(sample.rate), type(sample.limit)) == (int, float, float)


def test_unreadable_files_are_answered(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="absent.yaml: no such file"):
        config.load_yaml(Sample, tmp_path / "absent.yaml")
    with pytest.raises(ValueError, match="not readable as YAML"):
        _load(tmp_path, "name: [unclosed\n")
    with pytest.raises(ValueError, match="not readable as YAML"):
        config.load_yaml(Sample, tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(ValueError, match="not readable as YAML"):
        config.load_yaml(Sample, tmp_path / "latin.yaml")
    with pytest.raises(ValueError, match="missing name"):
        _load(tmp_path, "")


def test_override_replaces_dotted_paths_and_leaves_the_original() -> None:
    run = RunConfig()
    changed = config.override(run, {"model.width": 32, "optim.lr": "3e-2", "optim.clip_norm": "null", "seed": "7"})
    assert isinstance(changed.model, DecoderConfig)
    assert (changed.model.width, changed.optim.lr, changed.optim.clip_norm, changed.seed) == (32, 3e-2, None, 7)
    assert run == RunConfig()
    assert dataclasses.replace(changed, model=run.model, optim=run.optim, seed=0) == run


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("model.widht", "did you mean 'model.width'"),
        ("modle.width", "did you mean 'model.width'"),
        ("steps.width", "unknown key 'steps.width'"),
    ],
)
def test_override_of_nothing_is_an_error(path: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        config.override(RunConfig(), {path: 1})


def test_override_keeps_the_checks_of_the_config() -> None:
    with pytest.raises(ValueError, match="does not divide"):
        config.override(RunConfig(), {"model.heads": 5})


def test_override_of_a_kind_starts_from_its_defaults() -> None:
    """contract: in any order with its own fields, two kinds at once, and the rest of the config stays."""
    run = RunConfig(seed=3, model=DecoderConfig(width=32, heads=2))
    modular = config.override(run, {"data.kind": "modular"})
    assert modular == dataclasses.replace(run, data=ModularData())
    both = {"data.modulus": "31", "data.kind": "modular", "model.kind": "mlp", "model.hidden": 8}
    grok = config.override(run, both)
    assert grok == dataclasses.replace(run, data=ModularData(modulus=31), model=MlpConfig(hidden=8))
    assert config.override(grok, {"data.kind": "modular", "seed": 4}) == dataclasses.replace(grok, seed=4)
    assert config.override(grok, {"model.kind": "decoder", "data.kind": "language"}) == RunConfig(seed=3)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data.kind": "modualr"}, r"override: data.kind: got 'modualr'; did you mean 'modular'\?"),
        ({"data.kind": None}, "override: data.kind: got None"),
        ({"model.kind": "mlp"}, "use it with data.kind=modular"),
        ({"data.kind": "modular", "data.context": 64}, "unknown key 'data.context'"),
        ({"optim.kind": "adam"}, "unknown key 'optim.kind'"),
        ({"nothing.kind": "x"}, "unknown key 'nothing.kind'"),
        ({"data.a.kind": "x"}, "unknown key 'data.a.kind'"),
        ({"steps.kind": "x"}, "unknown key 'steps.kind'"),
        ({"optim.lr": "["}, r"override: optim.lr: '\[' is not readable as a YAML value; quote it"),
        ({"data": "modular"}, "override.data: expected a mapping of settings, got str 'modular'"),
        ({"data": None}, "override.data: expected a mapping of settings, got NoneType None"),
    ],
)
def test_override_mistakes_are_answered(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        config.override(RunConfig(), changes)
    assert "\n" not in str(caught.value)


def test_run_id_is_stable_across_processes_and_moves_with_every_setting() -> None:
    """equivalence: another process, with another hash seed, names the same run the same."""
    run = RunConfig()
    script = (
        "from aftershock.config import run_id; from aftershock.lab.recipe import RunConfig; print(run_id(RunConfig()))"
    )
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=_env())
    assert other.stdout.strip() == config.run_id(run)
    assert len(config.run_id(run)) == 12
    changed = [{"seed": 1}, {"data_seed": 1}, {"optim.lr": 2e-2}, {"model.qk_norm": "off"}, {"data.context": 64}]
    ids = {config.run_id(config.override(run, change)) for change in changed} | {config.run_id(run)}
    assert len(ids) == len(changed) + 1


def test_run_id_depends_on_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    before = config.run_id(RunConfig())
    monkeypatch.setattr(config, "__version__", "9.9.9")
    assert config.run_id(RunConfig()) != before


def test_leaves_flatten() -> None:
    assert config.leaves({"a": {"b": 1, "c": {"d": 2}}, "e": [3]}) == {"a.b": 1, "a.c.d": 2, "e": [3]}


def _env() -> dict[str, str]:
    source = str(Path(config.__file__).parents[1])
    return {"PYTHONPATH": source, "PYTHONHASHSEED": "123", "PATH": "/usr/bin:/bin"}
