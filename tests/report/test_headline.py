from __future__ import annotations

from collections.abc import Mapping

from aftershock.report.groups import RunFacts, judge
from aftershock.report.headline import Headline, write_headline
from aftershock.report.words import ArmWords

WORDS = {"on": ArmWords("with qk-layernorm", "with it"), "off": ArmWords("without qk-layernorm", "without it")}
RATES = (1e-3, 1e-2, 1e-1)
DIVERGED = None


def _headline(losses: Mapping[tuple[str, str], tuple[float | str | None, ...]], **more: float) -> Headline:
    """Losses per (size, arm) over RATES; None = diverged, text = that status."""
    runs = [
        RunFacts(
            run_id=f"{size}-{arm}-{lr}", size=size, arm=arm, lr=lr, seed=0,
            status=loss if isinstance(loss, str) else "diverged" if loss is None else "finished",
            final_loss=loss if isinstance(loss, float) else None,
            initial_loss=None if isinstance(loss, str) else 6.0, num_block_params={"s": 10, "m": 20}[size], **more,  # pyright: ignore[reportArgumentType]
        )
        for (size, arm), row in losses.items()
        for lr, loss in zip(RATES, row, strict=True)
    ]  # fmt: skip
    judged = judge(runs)
    arms = dict.fromkeys(arm for _, arm in losses)
    words = {arm: WORDS[arm] if len(arms) == 2 else ArmWords(f"in arm {arm}", f"in {arm}") for arm in arms}
    return write_headline(judged.groups, runs, judged.outcomes, words)


def test_one_arm_fails_the_other_trains() -> None:
    """planted: the result this tool is for."""
    said = _headline({("s", "on"): (2.2, 2.0, 2.1), ("s", "off"): (2.2, 2.0, DIVERGED)})
    assert (
        said.main == "Without qk-layernorm, training fails from learning rate 0.1 up at s; with it every rate trains."
    )
    # (2.2 + 2.0 + 6.0) / 3 - 2.0 and (2.2 + 2.0 + 2.1) / 3 - 2.0
    assert said.details[0] == "LR sensitivity is 1.40 without qk-layernorm against 0.10 with it."
    assert "Of 6 runs that ended, 1 diverged." in said.details


def test_sizes_that_fail_from_different_rates() -> None:
    said = _headline({
        ("s", "on"): (2.2, 2.0, 2.1), ("s", "off"): (2.2, 2.0, DIVERGED),
        ("m", "on"): (2.2, 2.0, 2.1), ("m", "off"): (2.2, DIVERGED, DIVERGED),
    })  # fmt: skip
    assert "from learning rate 0.1 up at s and from 0.01 up at m; with it" in said.main
    assert said.details[0].startswith("LR sensitivity at m is")


def test_sizes_that_fail_from_the_same_rate_are_named_together() -> None:
    said = _headline({("s", "off"): (2.2, 2.0, DIVERGED), ("m", "off"): (2.2, 2.0, DIVERGED)})
    assert said.main == "Training fails from learning rate 0.1 up at s and m."


def test_an_arm_with_an_open_run_is_not_called_healthy() -> None:
    said = _headline({("s", "on"): (2.2, 2.0, "running"), ("s", "off"): (2.2, 2.0, DIVERGED)})
    assert said.main == "Without qk-layernorm, training fails from learning rate 0.1 up at s."
    assert said.details[-1] == "1 run of 6 has no result (1 running); these numbers may still move."


def test_both_arms_fail() -> None:
    said = _headline({("s", "on"): (2.2, 2.0, DIVERGED), ("s", "off"): (2.2, DIVERGED, DIVERGED)})
    assert said.main == (
        "With qk-layernorm, training fails from learning rate 0.1 up at s; "
        "without qk-layernorm, training fails from learning rate 0.01 up at s."
    )


def test_nothing_fails() -> None:
    """planted: a clean study must not be given a failure."""
    said = _headline({("s", "on"): (2.2, 2.0, 2.1), ("s", "off"): (2.2, 2.0, 2.3)})
    assert said.main == "No run fails: every finished learning rate trains (from 1e-3 to 0.1, in both arms)."
    assert not any("diverged" in detail for detail in said.details)


def test_a_lone_failure_below_is_told() -> None:
    said = _headline({("s", "on"): (DIVERGED, 2.0, 2.1)})
    assert said.main == "Training fails at learning rate 1e-3 (s, on), but not above."
    assert any("s on at 1e-3, seed 0" in detail for detail in said.details)


def test_nothing_has_finished() -> None:
    said = _headline({("s", "on"): ("running", "missing", "missing")})
    assert said == Headline("No run has finished yet: 1 running and 2 missing.", [])


def test_every_run_diverged() -> None:
    said = _headline({("s", "on"): (DIVERGED, DIVERGED, DIVERGED)})
    assert said.main == "Training fails from learning rate 1e-3 up, the lowest tried, at s."
    assert said.details[0] == "LR sensitivity cannot be given: every run diverged."


def test_broken_runs_are_told_apart_from_diverged_ones() -> None:
    said = _headline({("s", "on"): (2.2, 2.0, 4.5)})
    assert said.main == "Training fails from learning rate 0.1 up at s."
    assert "1 stayed finite but failed to train" in said.details[-1]


def test_attention_logits() -> None:
    said = _headline({("s", "on"): (2.2, 2.0, 2.1), ("s", "off"): (2.2, 2.0, DIVERGED)}, peak_logit=31234.0)
    assert "Block-0 attention logits reach 3.1e4" in said.details[1]
