from __future__ import annotations

import pytest

from aftershock.report import words


@pytest.mark.parametrize(
    ("value", "text"), [(3e-4, "3e-4"), (1e-3, "1e-3"), (2.5e-5, "2.5e-5"), (0.01, "0.01"), (0.3, "0.3"), (1.0, "1")]
)
def test_rate(value: float, text: str) -> None:
    assert words.rate(value) == text
    assert float(text) == value


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.0, "0"), (7.0, "7.00"), (9.996, "10.0"), (14.32, "14.3"), (412.4, "412"), (6990.7, "6991"),
     (31234.0, "3.1e4"), (-25000.0, "-2.5e4"), (0.25, "0.25"), (2e-8, "2.0e-8")],
)  # fmt: skip
def test_number(value: float | None, text: str) -> None:
    assert words.number(value) == text


def test_count_and_duration() -> None:
    assert [words.count(v) for v in (950, 24576, 4_833_000, 1.21e9, None)] == ["950", "24.6k", "4.83M", "1.21B", "-"]
    assert [words.duration(v) for v in (4.25, 42.0, 200.0, 7500.0, None)] == [
        "4.2 s",
        "42 s",
        "3 min 20 s",
        "2 h 5 min",
        "-",
    ]


def test_listed() -> None:
    assert [words.listed(list("abc")[:n]) for n in range(4)] == ["", "a", "a and b", "a, b and c"]


def test_two_arms_with_one_switch_are_with_and_without() -> None:
    arms = {"base": {"model.qk_norm": "head"}, "bare": {"model.qk_norm": "off"}}
    assert words.arm_words(arms)["bare"] == ("without qk-layernorm", "without it")
    assert words.arm_words(arms)["base"] == ("with qk-layernorm", "with it")
    z = words.arm_words({"z": {"optim.z_loss": 1e-4}, "no": {"optim.z_loss": 0.0}})
    assert z["no"].full == "without z-loss"


@pytest.mark.parametrize(
    "arms",
    [
        {"a": {"model.qk_norm": "head"}},
        {"a": {"model.qk_norm": "head"}, "b": {"model.qk_norm": "width"}},
        {"a": {"model.qk_norm": "off", "optim.eps": 1e-8}, "b": {"model.qk_norm": "head", "optim.eps": 1e-6}},
        {"a": {"optim.eps": 1e-8}, "b": {"optim.eps": 1e-15}},
        {"a": {}, "b": {}},
        {"a": {"optim.clip_norm": 1.0}, "b": {"optim.clip_norm": None}, "c": {"optim.clip_norm": 2.0}},
    ],
)
def test_other_arms_keep_their_names(arms: dict[str, dict[str, object]]) -> None:
    """contract: nothing is claimed about a setting that the data does not isolate."""
    assert all(said.full == f"in arm {arm}" for arm, said in words.arm_words(arms).items())
