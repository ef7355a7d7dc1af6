"""Early divergence on planted runs: what tells is found, what does not is not, and no run helps to forecast itself."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from aftershock.forecast.early import (
    SIGNALS,
    TRIVIAL,
    Early,
    Split,
    judge_early,
    judge_outcome,
    rows_of,
    too_little,
)
from aftershock.forecast.early_console import gain_words, print_early
from aftershock.forecast.early_runs import FEATURES, EarlyRun, EarlyRuns
from aftershock.forecast.early_scores import Scores
from aftershock.lab.sizes import parse_size

KEYS: tuple[str, ...] = ("rate", "size", "logit", "grad_norm", "loss")
SIZES, RATES = ("16x2", "32x2", "64x2", "96x2"), (0.01, 0.03, 0.1, 0.3)

Law = Callable[[dict[str, float], np.random.Generator], bool]


def plant(
    fails: Law,
    *,
    sizes: Sequence[str] = SIZES,
    seeds: Sequence[int] = (0, 1, 2),
    rates: Sequence[float] = RATES,
    draw: int = 0,
) -> EarlyRuns:
    """Runs whose signals are noise with no tie to the rate; `fails(features, generator)` says how they end."""
    generator = np.random.default_rng(draw)
    runs = []
    for size in sizes:
        num_params = parse_size(size).num_block_params
        for seed in seeds:
            for lr in rates:
                noise = generator.standard_normal(3)
                features = dict(zip(KEYS, [math.log10(lr), math.log10(num_params), *noise], strict=True))
                ends = bool(fails(features, generator))
                name = f"{size}-{seed}-{lr:g}"
                runs.append(
                    EarlyRun(name, size, num_params, lr, seed, "finished", tuple(features.values()), ends, False)
                )
    return EarlyRuns("planted", "baseline", 4, 200, tuple(FEATURES[key] for key in KEYS), tuple(runs), ())


def by_logit(features: dict[str, float], generator: np.random.Generator) -> bool:
    return features["logit"] + 0.1 * generator.standard_normal() > 0.4


def by_rate(features: dict[str, float], generator: np.random.Generator) -> bool:
    return features["rate"] + 0.1 * (features["size"] - 4) + 0.02 * generator.standard_normal() > -1.2


def by_chance(features: dict[str, float], generator: np.random.Generator) -> bool:
    return generator.random() < 0.4


@pytest.fixture(scope="module")
def told() -> Early:
    return judge_early(plant(by_logit, seeds=range(6)))


def scores_of(split: Split, predictor: str = SIGNALS) -> Scores:
    return next(score for score in split.scores if score.predictor == predictor)


def test_a_logit_that_tells_is_found(told: Early) -> None:
    """planted: on both splits an area near 1, and better than the trivial ones and than the rate beyond the luck of
    curves; the probabilities of single runs say so too."""
    fails, died = told.outcomes
    assert [split.by for split in fails.splits] == ["seeds", "sizes"]
    for split in fails.splits:
        area = scores_of(split).auc
        assert area is not None
        assert area.value > 0.95
        assert split.gain is not None
        assert split.gain.low > 0
        assert split.gain_over_rate is not None
        assert split.gain_over_rate.low > 0
        assert split.best_trivial in TRIVIAL
        assert all(words.endswith(": better") for words in gain_words(split))
    assert "diverges in 0 of the 96 runs" in died.refused
    weights = {feature.key: abs(feature.coefficient) for feature in fails.fitted}
    assert max(weights, key=lambda key: weights[key]) == "logit"
    sure = [chance for chance in told.chances if chance.probability is not None]
    assert len(sure) == 96
    means = [np.mean([c.probability or 0.0 for c in sure if c.fails is ends]) for ends in (True, False)]
    assert means[0] > 0.8
    assert means[1] < 0.2


@pytest.mark.parametrize("draw", [0, 1, 2])
def test_nothing_is_found_where_nothing_tells(draw: int) -> None:
    """planted: outcomes by coin. No area's interval lies above one half, no gain above nothing."""
    fails = judge_outcome(plant(by_chance, seeds=range(8), draw=draw), "fails")
    for split in fails.splits:
        area = scores_of(split).auc
        assert area is not None
        assert area.low < 0.5
        assert split.gain is not None
        assert split.gain.low <= 0
    sizes = scores_of(fails.splits[1]).auc
    assert sizes is not None
    assert sizes.low < 0.5 < sizes.high


def test_the_rate_alone_is_as_good_where_the_rate_decides() -> None:
    """planted: the signals are then no news, and the words say so."""
    for split in judge_outcome(plant(by_rate), "fails").splits:
        assert split.gain is not None
        assert split.gain.low > 0
        assert split.gain_over_rate is not None
        assert split.gain_over_rate.low <= 0
        assert gain_words(split)[1].endswith((": not told apart", ": worse"))


def test_no_run_helps_to_forecast_its_own_seed() -> None:
    """property: other outcomes of seed 2 leave the probabilities of seed 2 as they were, and move the others."""
    found = plant(by_logit)
    turned = found._replace(
        runs=tuple(run._replace(fails=not run.fails) if run.seed == 2 else run for run in found.runs)
    )
    one, other = judge_early(found), judge_early(turned)
    for before, after in zip(one.chances, other.chances, strict=True):
        assert (before.probability == after.probability) is (before.seed == 2)


def test_no_large_size_helps_to_forecast_itself() -> None:
    """property: the larger sizes' outcomes change the scores, not what was claimed of them."""
    found = plant(by_logit)
    large = SIZES[2:]
    turned = found._replace(
        runs=tuple(run._replace(fails=not run.fails) if run.size in large else run for run in found.runs)
    )
    one, other = (judge_outcome(each, "fails").splits[1] for each in (found, turned))
    assert (one.fitted, one.scored) == ("16x2, 32x2", "64x2, 96x2")
    before, after = scores_of(one), scores_of(other)
    assert [row.claimed for row in before.reliability] == [row.claimed for row in after.reliability]
    assert before.auc is not None
    assert after.auc is not None
    assert after.auc.value == pytest.approx(1 - before.auc.value)


def test_unfinished_runs_get_a_probability_from_all_others() -> None:
    """contract: open outcomes are not scored; a run that was not seen at the step gets none."""
    found = plant(by_logit, seeds=(0, 1, 2, 3))
    runs = [
        run._replace(fails=None, diverged=None, status="running") if (run.size, run.seed) == ("96x2", 3) else run
        for run in found.runs
    ]
    runs[0] = runs[0]._replace(features=None)
    early = judge_early(found._replace(runs=tuple(runs)))
    assert early.outcomes[0].num_runs == 59
    assert early.chances[0].probability is None
    new = [chance for chance in early.chances if chance.fails is None]
    logits = {run.run_id: run.features[2] for run in found.runs if run.features is not None}
    assert len(new) == 4
    assert all(chance.probability is not None for chance in new)
    order = sorted(new, key=lambda chance: chance.probability or 0)
    assert order[0].run_id == min(order, key=lambda chance: logits[chance.run_id]).run_id


def test_the_base_rate_is_that_of_the_fitted_sizes(told: Early) -> None:
    """oracle: one probability for all, the share of the smaller sizes."""
    rows = rows_of(plant(by_logit, seeds=range(6)), "fails")
    share = float(rows.y_N[rows.size_N < 2].mean())
    base = scores_of(told.outcomes[0].splits[1], "base rate")
    assert [row.claimed for row in base.reliability] == [pytest.approx(share)]
    assert base.features == ()
    assert base.auc is not None
    assert base.auc.value == 0.5


@pytest.mark.parametrize(
    ("sizes", "seeds", "words"),
    [
        (("16x2",), (0, 1), "held-out seeds: 2 seeds, .*; held-out sizes: one size, 16x2: add"),
        (SIZES, (0,), "held-out seeds: 1 seeds, where leaving 2 out takes 3.*held-out sizes: 1 seeds"),
        (("16x2", "32x2"), (0, 1), "held-out sizes: 2 curves .* to score, needs 3: add seeds"),
    ],
)
def test_too_few_runs_are_refused(sizes: Sequence[str], seeds: Sequence[int], words: str) -> None:
    """contract: where neither split can be scored, each says what to add."""
    with pytest.raises(ValueError, match=words):
        judge_early(plant(lambda features, generator: features["rate"] > -1.2, sizes=sizes, seeds=seeds))


def test_one_outcome_only_is_refused() -> None:
    """contract: all fail, none fails, and one outcome only once two seeds are left out."""
    with pytest.raises(ValueError, match="the run fails in 48 of the 48 runs .* add lower rates"):
        judge_early(plant(lambda features, generator: True))
    with pytest.raises(ValueError, match="the run fails in 0 of the 48 runs .* add higher rates"):
        judge_early(plant(lambda features, generator: False))
    found = plant(by_logit)
    lone = found._replace(runs=tuple(run._replace(fails=bool(run.fails) and run.seed == 0) for run in found.runs))
    assert "without seeds 0, 1 all runs have one outcome" in too_little(rows_of(lone, "fails"), leave=2)


def test_everything_is_printed(told: Early) -> None:
    """contract: every predictor, both splits, the refused outcome, and a cell for each run."""
    from rich.console import Console

    out = Console(file=io.StringIO(), width=200)
    print_early(told, console=out)
    assert isinstance(out.file, io.StringIO)
    text = out.file.getvalue()
    for score in told.outcomes[0].splits[0].scores:
        assert text.count(f"{score.predictor} ") >= 2
    assert "Held-out seeds: fitted on all other seeds" in text
    assert "Held-out sizes: fitted on 16x2, 32x2; scored on 64x2, 96x2, 48 runs of 12 curves" in text
    assert "the run diverges: not scored" in text
    assert text.count("!") == sum(bool(chance.fails) for chance in told.chances) + 1  # and once in the legend
