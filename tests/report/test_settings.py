from __future__ import annotations

from typing import Any

from aftershock.report.settings import compare_settings


def _compare(rows: list[tuple[str, str, dict[str, Any]]]) -> Any:
    configs = {f"r{i}": config for i, (_, _, config) in enumerate(rows)}
    labels = {f"r{i}": {"arm": arm, "size": size, "rate": 0.1, "seed": 0} for i, (arm, size, _) in enumerate(rows)}
    return compare_settings(configs, labels)


def test_common_and_differing() -> None:
    found = _compare([
        ("on", "s", {"model": {"width": 8, "qk": "head"}, "steps": 10}),
        ("on", "m", {"model": {"width": 16, "qk": "head"}, "steps": 10}),
        ("off", "s", {"model": {"width": 8, "qk": "off"}, "steps": 10}),
        ("off", "m", {"model": {"width": 16, "qk": "off"}, "steps": 10}),
    ])  # fmt: skip
    assert found.common == {"steps": 10}
    assert found.by_arm == {"on": {"model.qk": "head"}, "off": {"model.qk": "off"}}
    assert found.differing["model.width"] == {
        "varies_with": "size",
        "values": [{"value": 8, "runs": 2, "labels": ["s"]}, {"value": 16, "runs": 2, "labels": ["m"]}],
    }
    assert found.by_run["r3"] == {"model.width": 16, "model.qk": "off"}


def test_a_setting_that_no_label_explains() -> None:
    """planted: the kind of accident this table is there to show."""
    found = _compare([("a", "s", {"eps": 1e-8}), ("a", "s", {"eps": 1e-6})])
    assert found.differing["eps"]["varies_with"] == ""
    assert found.by_arm == {"a": {}}


def test_missing_true_and_one_are_three_values() -> None:
    found = _compare([("a", "s", {"x": True}), ("b", "s", {"x": 1}), ("c", "s", {"y": 0})])
    assert len(found.differing["x"]["values"]) == 3
    assert found.by_arm["c"]["x"] == "(not set)"


def test_no_runs() -> None:
    assert compare_settings({}, {}).common == {}
