"""Criteria on incidents and on counted spikes: each verdict from planted lines."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from aftershock.claims.catalog import find_claim
from aftershock.claims.claim import Judgement, Line, LineTrial, Verdict
from aftershock.claims.counted_criteria import FAMILIES
from aftershock.claims.incident import Answer, Belief, Counted, FirstPlace, Incident, Level, Mind
from aftershock.claims.incident_criteria import CORNERS, DECAYS
from aftershock.store.folder import to_json

VERDICTS: tuple[Verdict, ...] = ("supported", "contradicted", "inconclusive")

Plant = Callable[[int], Line]

# ------------------------------------------------------------------------------------------------ planted incidents


def spike(
    seed: int,
    *,
    cause: str = "C7",
    removed: Sequence[str] = (),
    peaks: Mapping[str, float] | None = None,
    cells: Sequence[str] = (),
    place: str | None = None,
    layers: int = 4,
    belief: str = "",
    lasts: int = 10,
) -> Line:
    """An incident whose controls all spike, with height 2; `removed` are the cells that do not spike."""
    heights = dict.fromkeys([*cells, *removed], 2.0) | (dict(peaks) if peaks else {})
    families = {name: "sham" if name.startswith("sham") else "edit" for name in heights}
    for name in ("control", "control#2", "control#3"):
        heights.setdefault(name, 2.0)
        families[name] = "control"
    answers = {
        name: Answer(
            family=families[name],
            present=name not in removed,
            peak_excess=0.1 if name in removed else height,
            peak_step=105,
            duration=5,
            stopped="spike",
        )
        for name, height in heights.items()
    }
    mind = Mind(entropy=1.0, from_unigram=1.0, from_bigram=1.0, agreement=0.5, by_frequency={"10 to 99": 2.0})
    made = Incident(
        id=f"planted{cause}-{seed}#0",
        name=f"planted{cause}",
        cause=cause,
        kind="planted",
        seed=seed,
        share=1.0,
        clip=1.0,
        num_params=100,
        steps=800,
        seconds=1.0,
        window=(60, 100, 105, 100 + lasts),
        ended=True,
        height=2.0,
        band=0.1,
        threshold=1.0,
        unit="log",
        recovery=4,
        controls="deterministic",
        answers=answers,
        first={"layer": FirstPlace(place, layers, 4, 4, True)} if place is not None else {},
        belief=Belief(belief, {"before": mind, "peak": mind}) if belief else None,
    )
    return json.loads(to_json(made.to_line()))


SHAMS = ("sham:skip#1", "sham:skip#2", "sham:skip#3", "sham:ulp#1", "sham:ulp#2", "sham:permute#1")
DATA = ("skip", *SHAMS)


def data(*removed: str, cause: str = "C7") -> Plant:
    return lambda seed: spike(seed, cause=cause, cells=DATA, removed=removed)


def corners(*spiking: str) -> Plant:
    """All four corners; those not named have no spike. The first of them is the control, which must have it."""
    return lambda seed: spike(
        seed, cells=list(CORNERS.values())[1:], removed=[c for c in list(CORNERS.values())[1:] if c not in spiking]
    )


def decays(*heights: float) -> Plant:
    """Peak excess at decay x 0, 0.1, 0.25, 0.5 and 1."""
    return lambda seed: spike(seed, peaks=dict(zip(DECAYS.values(), heights, strict=True)))


def settings(*removed: str) -> Plant:
    return lambda seed: spike(seed, cells=("beta1=0.5", "beta2=0.9:recompute", "dropout=0.1", *SHAMS), removed=removed)


def at(*places: str) -> Plant:
    return lambda seed: spike(seed, place=places[seed % len(places)])


def believing(*kinds: str) -> Plant:
    return lambda seed: spike(seed, belief=kinds[seed % len(kinds)])


def two(one: Plant, other: Plant) -> Plant:
    """Seeds 0 to 3 of the one, those from 4 on of the other."""
    return lambda seed: one(seed) if seed < 4 else other(seed)


# -------------------------------------------------------------------------------------------------- planted counts


def run(family: str, setting: str, seed: int, *, num_params: int, spikes: int, sharpness: float = 1.0) -> Line:
    made = Counted(
        id=f"{family} {setting}-{seed}",
        family=family,
        setting=setting,
        cause="C1",
        seed=seed,
        num_params=num_params,
        depth=1,
        batch=100,
        half_life=1000.0,
        clip=None,
        steps=1000,
        samples=100_000,
        finite=True,
        seconds=1.0,
        spikes=tuple((400 + 50 * i, 405 + 50 * i, 410 + 50 * i) for i in range(spikes)),
        clipped=(False,) * spikes,
        levels={"0.3": Level(50, 1.0), "0.1": Level(100, sharpness)},
    )
    return json.loads(to_json(made.to_line()))


def clipped(cause: str, spikes: int, bound: bool) -> Plant:
    def line(seed: int) -> Line:
        plain: dict[str, Any] = dict(run("clipped", cause, seed, num_params=100, spikes=spikes))
        return plain | {"cause": cause, "clip": 1.0, "clipped": [bound] * spikes}

    return line


def widths(spikes: Callable[[int, int], int], sharpness: Callable[[int, int], float] = lambda n, s: 1.0) -> Plant:
    """Three widths a seed, at most 10 apart in N; both functions of N and seed. Seeds from 3 on repeat the first."""

    def lines(seed: int) -> Any:
        return [
            run(family, setting, seed, num_params=n, spikes=spikes(n, seed), sharpness=sharpness(n, seed))
            for family in FAMILIES
            for setting, n in (("width=10", 100), ("base", 1000), ("width=1000", 10_000))
        ]

    return lines


def decade(n: int) -> int:
    return round(math.log10(n)) - 2


def up(n: int, seed: int) -> int:
    return 1 + 2 * decade(n)


def down(n: int, seed: int) -> int:
    return 5 - 2 * decade(n)


def either(n: int, seed: int) -> int:
    return up(n, seed) if seed % 2 else down(n, seed)


def sharper(n: int, seed: int) -> float:
    return 10.0 ** (0.5 * decade(n) + 0.01 * seed)


def softer(n: int, seed: int) -> float:
    return 10.0 ** (-0.5 * decade(n) + 0.01 * seed)


PLANTED: list[tuple[str, Verdict, Plant]] = [
    ("S0", "supported", data()),
    ("S0", "supported", data(*DATA)),
    ("S0", "contradicted", data("skip")),
    ("S0", "contradicted", data("skip", *SHAMS[:3])),  # other batches do as well, 1 ulp does not
    ("S0", "inconclusive", lambda seed: data(*(("skip",) if seed % 4 == 0 else ()))(seed)),
    ("S0", "inconclusive", two(data("skip"), data(cause="C4"))),
    ("S1", "supported", data("skip")),
    ("S1", "supported", two(data("skip"), data("skip", cause="C4"))),
    ("S1", "contradicted", data(*SHAMS)),
    ("S1", "inconclusive", data()),
    ("S1", "inconclusive", data(*DATA)),  # S0's rates are equal
    ("S1", "inconclusive", data("skip", *SHAMS[3:5])),  # 1 ulp does as well
    ("S1", "inconclusive", two(data("skip"), data(cause="C4"))),
    ("S2", "supported", corners("control")),
    ("S2", "contradicted", corners("control", "earlier")),
    ("S2", "contradicted", corners("control", "replace")),
    ("S2", "inconclusive", two(corners("control"), corners("control", "earlier"))),
    ("H1", "supported", decays(0.2, 0.4, 0.8, 1.0, 2.0)),
    ("H1", "contradicted", decays(2.0, 2.0, 2.0, 2.0, 2.0)),
    ("H1", "contradicted", decays(math.inf, 4.0, 3.0, 2.5, 2.0)),
    ("H1", "contradicted", decays(1.99, 1.99, 1.99, 1.99, 2.0)),  # by less than a tenth
    ("H1", "inconclusive", decays(0.2, 1.9, 0.8, 1.0, 2.0)),  # not monotone
    ("H1", "inconclusive", two(decays(0.2, 0.4, 0.8, 1.0, 2.0), decays(3.0, 3.0, 3.0, 3.0, 2.0))),
    ("H2", "supported", settings("beta1=0.5", "dropout=0.1")),
    ("H2", "contradicted", settings("dropout=0.1", *SHAMS)),
    ("H2", "inconclusive", settings("beta1=0.5")),
    ("H2", "inconclusive", settings("beta1=0.5", "dropout=0.1", *SHAMS)),
    ("H3", "supported", at("blocks.0")),
    ("H3", "contradicted", at("blocks.0", "blocks.1", "embed", "head")),
    ("H3", "inconclusive", at("blocks.0", "embed")),
    ("H4", "inconclusive", lambda seed: spike(seed, lasts=5 + seed)),
    ("H8", "supported", believing("something else")),
    ("H8", "contradicted", believing("nothing")),
    ("H8", "contradicted", believing("much the same")),
    ("H8", "inconclusive", believing("something else", "nothing")),
    ("S3", "supported", clipped("C1", 1, bound=True)),
    ("S3", "supported", two(clipped("C4", 0, bound=False), clipped("C1", 1, bound=True))),
    ("S3", "contradicted", clipped("C1", 0, bound=False)),
    ("S3", "contradicted", clipped("C1", 1, bound=False)),  # clipping had nothing to do
    ("S3", "inconclusive", lambda seed: clipped("C1", int(seed % 8 < 3), bound=True)(seed)),
    ("S4", "supported", widths(up)),
    ("S4", "contradicted", widths(down)),
    ("S4", "inconclusive", widths(either)),
    ("S4", "inconclusive", widths(lambda n, seed: 0)),  # nothing spiked
    ("H7", "supported", widths(up, sharper)),
    ("H7", "contradicted", widths(up, softer)),
    ("H7", "contradicted", widths(down, sharper)),
    ("H7", "inconclusive", widths(either, sharper)),
]


def judged(claim_id: str, plant: Plant, seeds: int | None = None) -> Judgement:
    """By default 8 incidents a claim, and 4 seeds where seeds are resampled."""
    trial = find_claim(claim_id).trial
    assert isinstance(trial, LineTrial)
    lines: list[Line] = []
    for seed in range((4 if claim_id in ("S4", "H7") else 8) if seeds is None else seeds):
        planted: Any = plant(seed)
        lines += planted if isinstance(planted, list) else [planted]
    return trial.criterion(lines)


@pytest.mark.parametrize(("claim_id", "verdict", "plant"), PLANTED, ids=[f"{p[0]}-{p[1]}" for p in PLANTED])
def test_planted_verdicts(claim_id: str, verdict: Verdict, plant: Plant) -> None:
    """planted."""
    result = judged(claim_id, plant)
    assert result.verdict == verdict, result
    low, high = result.interval
    assert not low > high  # both nan where nothing was measured
    if not math.isnan(result.effect):
        assert low - 1e-12 <= result.effect <= high + 1e-12  # sums in another order
    assert result.meaning
    json.dumps(result.detail)


def test_every_criterion_has_all_three() -> None:
    """contract: but H4, which is a question."""
    found = {(claim_id, verdict) for claim_id, verdict, _ in PLANTED}
    ids = ("S0", "S1", "S2", "S3", "S4", "H1", "H2", "H3", "H7", "H8")
    assert found == {*itertools.product(ids, VERDICTS), ("H4", "inconclusive")}


@pytest.mark.parametrize("claim_id", ["S0", "S1", "S2", "H1", "H2", "H3", "H4", "H8"])
def test_no_spike_at_all_is_inconclusive(claim_id: str) -> None:
    """planted: recordings without a spike measure nothing, nor do no recordings."""
    for seeds in (8, 0):
        result = judged(claim_id, _calm, seeds=seeds)
        assert (result.verdict, math.isnan(result.effect)) == ("inconclusive", True)


@pytest.mark.parametrize("claim_id", ["S3", "S4", "H7"])
def test_no_run_at_all_is_inconclusive(claim_id: str) -> None:
    """planted."""
    result = judged(claim_id, _calm, seeds=0)
    assert (result.verdict, math.isnan(result.effect)) == ("inconclusive", True)


def _calm(seed: int) -> Line:
    plain = dict(spike(seed))
    return plain | {"window": None, "answers": {}, "first": {}, "belief": None, "height": "nan"}


def test_a_spike_that_does_not_come_back_counts_for_nothing() -> None:
    """planted: the same removals, of incidents that one control lost."""
    lines: list[Line] = []
    for seed in range(8):
        line: dict[str, Any] = dict(data("skip")(seed))
        answers: dict[str, Any] = dict(line["answers"])
        answers["control#3"] = answers["control#3"] | {"present": False}
        lines.append(line | {"answers": answers})
    trial = find_claim("S1").trial
    assert isinstance(trial, LineTrial)
    assert trial.criterion(lines).verdict == "inconclusive"
    assert math.isnan(trial.criterion(lines).effect)


def test_planted_numbers() -> None:
    """planted: what the tables and effects say is what was planted."""
    skipped = judged("S1", data("skip", "sham:skip#1"))
    assert skipped.effect == 1.0
    assert skipped.detail["removed by draws of sham:skip"] == {"C7": pytest.approx(1 / 3)}
    assert skipped.detail["spikes"] == {"C7": 8.0}
    shrunk = judged("H1", decays(0.5, 0.6, 0.7, 0.8, 2.0))
    assert shrunk.effect == pytest.approx(0.75)  # (2 - 0.5) / 2
    lasting = judged("H4", lambda seed: spike(seed, lasts=5 + seed))
    assert lasting.effect == 8.5  # the median of 5 .. 12
    assert lasting.detail["duration, C7"]["most"] == 12
    assert lasting.detail["recovery, C7"]["median"] == 4
    rates = judged("S4", widths(up))
    assert rates.effect == pytest.approx(2 / 3)  # 1, 3, 5 spikes: 2 more a decade, 3 on average
    assert rates.detail["spikes per 1e6 samples, curve"]["base"] == pytest.approx(30)  # 3 in 1e5
    sharp = judged("H7", widths(up, sharper))
    assert sharp.effect == pytest.approx(0.5)
    assert sharp.detail["equal loss"] == {"curve": 0.1, "language": 0.1}


def test_sharpness_counts_before_the_first_spike_only() -> None:
    """planted: one run reached the lower level after it had spiked, so the higher one is where all are compared."""

    def late(seed: int) -> Any:
        lines: Any = widths(up, sharper)(seed)
        if seed == 0:
            lines[0]["levels"]["0.1"]["step"] = 450
        return lines

    result = judged("H7", late)
    assert result.detail["equal loss"] == {"curve": 0.3, "language": 0.1}
    assert result.effect == pytest.approx(0.25)  # of the curve, 0, and of the text, 0.5
