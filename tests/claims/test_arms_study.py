"""The study of arms: which runs it takes, that it goes on where it stopped, and what H5 and H6 make of its lines."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from aftershock.claims import arms_study
from aftershock.claims.arms_study import (
    PLANS,
    ArmsLine,
    ArmsPlan,
    arms_core_seconds,
    arms_of,
    judge_h5,
    judge_h6,
    run_arms_study,
)
from aftershock.claims.claim import Line
from aftershock.claims.lines import LINES
from aftershock.lab.zoo.registry import specimen
from aftershock.replay.arms import ARMS
from aftershock.replay.paired import LIMIT, Arm
from aftershock.store.folder import to_json

FEW = (
    ArmsPlan(specimen="lag_99", cause="C1", share=0.9, steps=50, part=0.5, core_s=2.0),
    ArmsPlan(specimen="edge_of_stability", cause="C3", share=0.5, steps=50, part=1.0, core_s=1.0, nths=(0, 1)),
)


def arm(loss: float, *, spiked: bool = False, again: int | None = None) -> Arm:
    return Arm(steps=300, spiked=spiked, again=again, loss=loss, training=loss, distance=loss)


def spike(
    plan: ArmsPlan, seed: int, nth: int = 0, *, never: float = 1.0, skip: float = 1.0, back: bool = True
) -> ArmsLine:
    """One whose push ends at a loss of 1, and again spikes where the seed is even."""
    end = 150 if back else 400
    again = None if seed % 2 else 200
    return ArmsLine(
        id=f"{plan.specimen}-{seed}#{nth}",
        name=plan.specimen,
        cause=plan.cause,
        share=plan.share,
        seed=seed,
        nth=nth,
        steps=plan.steps,
        seconds=1.5,
        window=(100, 140, 141, 150),
        last=400,
        cure=("lr*0.5", 138, end),
        arms={
            "push": arm(1.0, spiked=True, again=again),
            "skip": arm(skip),
            "sham_skip": arm(1.0, spiked=True),
            "never": arm(never),
        },
    )


def lines(plan: ArmsPlan, number: int, *, never: float = 1.0, skip: float = 1.0) -> list[Line]:
    """One spike of each of so many runs, whose losses differ a little."""
    noise = [math.exp(0.01 * (seed % 5 - 2)) for seed in range(number)]
    return [spike(plan, seed, never=never * x, skip=skip * x).to_line() for seed, x in enumerate(noise)]


class TestLine:
    def test_there_and_back(self) -> None:
        """round trip: also what is not finite, and a run without a spike."""
        found = dataclasses.replace(
            spike(FEW[0], 3), arms={"push": arm(math.inf)._replace(distance=math.nan)}, left_out={"skip": "no"}
        )
        read = ArmsLine.from_line(json.loads(to_json(found.to_line() | {"code": "abc"})))
        assert math.isnan(read.arms["push"].distance)
        nowhere = {"push": read.arms["push"]._replace(distance=0.0)}
        assert dataclasses.replace(read, arms=nowhere) == dataclasses.replace(
            found, arms={"push": found.arms["push"]._replace(distance=0.0)}
        )
        assert read.taken_back
        assert read.run == "lag_99-3"
        none = ArmsLine(
            id="a-0#0", name="a", cause="C1", share=1.0, seed=0, nth=0, steps=9, seconds=0.1, problem="no spike"
        )
        assert ArmsLine.from_line(json.loads(to_json(none.to_line()))) == none
        with pytest.raises(ValueError, match="a-0#0 has other fields.*window"):
            ArmsLine.from_line({key: value for key, value in none.to_line().items() if key != "window"})


class TestStudy:
    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """The runs that were asked for; odd seeds of lag_99 never spike."""
        asked: list[str] = []

        def made(plan: ArmsPlan, seed: int, nth: int) -> ArmsLine:
            found = spike(plan, seed, nth)
            asked.append(found.id)
            if plan.specimen == "lag_99" and seed % 2:
                return dataclasses.replace(found, window=None, cure=None, arms={}, problem="no spike")
            return found

        monkeypatch.setattr(arms_study, "arms_of", made)
        return asked

    def test_seeds_without_a_spike_are_made_up_for(self, tmp_path: Path, asked: list[str]) -> None:
        """contract: the next seeds in order, up to twice as many as spikes are wanted."""
        found = run_arms_study(tmp_path, spikes_per_class=4, processes=1, plans=FEW)
        assert [line["id"] for line in found] == [
            *("lag_99-0#0", "lag_99-1#0"),
            *("edge_of_stability-0#0", "edge_of_stability-0#1", "edge_of_stability-1#0", "edge_of_stability-1#1"),
            "lag_99-2#0",
        ]
        assert asked == [line["id"] for line in found]
        assert sum(bool(line["arms"]) for line in found if line["cause"] == "C1") == 2
        hopeless = dataclasses.replace(FEW[0], part=1.0)
        asked.clear()
        found = run_arms_study(tmp_path / "more", spikes_per_class=3, processes=1, plans=[hopeless])
        assert asked == [f"lag_99-{seed}#0" for seed in range(5)]
        assert sum(bool(line["arms"]) for line in found) == 3

    def test_a_specimen_that_never_spikes_is_given_up(
        self, tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """contract."""
        monkeypatch.setattr(
            arms_study, "arms_of", lambda plan, seed, nth: dataclasses.replace(spike(plan, seed, nth), arms={})
        )
        found = run_arms_study(tmp_path, spikes_per_class=4, processes=1, plans=FEW[:1])
        assert [line["seed"] for line in found] == [0, 1, 2, 3]

    def test_it_goes_on_where_it_stopped(
        self, tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """round trip: interrupted in the middle of the third spike; only that and later ones are made again."""
        made = arms_study.arms_of

        def interrupted(plan: ArmsPlan, seed: int, nth: int) -> ArmsLine:
            if len(asked) == 2:
                raise KeyboardInterrupt
            return made(plan, seed, nth)

        monkeypatch.setattr(arms_study, "arms_of", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_arms_study(tmp_path, spikes_per_class=4, processes=1, plans=FEW)
        assert len((tmp_path / LINES).read_text().splitlines()) == 2
        first = list(asked)
        monkeypatch.setattr(arms_study, "arms_of", made)
        seen: list[tuple[int, int]] = []
        found = run_arms_study(
            tmp_path, spikes_per_class=4, processes=1, plans=FEW, on_progress=lambda done, of: seen.append((done, of))
        )
        assert not set(first) & set(asked[2:])
        assert [line["id"] for line in found] == asked
        assert seen[0] == (2, 6)
        assert seen[-1] == (7, 7)
        asked.clear()
        assert run_arms_study(tmp_path, spikes_per_class=4, processes=1, plans=FEW) == found
        assert asked == []

    def test_what_it_costs(self) -> None:
        """oracle: 2 and 4 spikes at 2 and 1 seconds; the whole study is less than half an hour of one core."""
        assert arms_core_seconds(spikes_per_class=4, plans=FEW) == 8
        assert arms_core_seconds() < 30 * 60
        with pytest.raises(ValueError, match="at least 1"):
            run_arms_study(Path("nowhere"), spikes_per_class=0)

    @pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.specimen)
    def test_plans(self, plan: ArmsPlan) -> None:
        """contract: each class has all of its spikes, and each specimen batches that differ."""
        chosen = specimen(plan.specimen)
        assert chosen.cause == plan.cause
        assert sum(other.part for other in PLANS if other.cause == plan.cause) == pytest.approx(1)
        assert plan.share < 1 or chosen.kind == "planted", "a full batch is the same at every step"

    def test_a_real_spike(self) -> None:
        """contract: edge of stability, recorded, and all five arms of one length."""
        plan = ArmsPlan(specimen="edge_of_stability", cause="C3", share=0.5, steps=1000, part=1.0, core_s=3.0)
        found = arms_of(plan, 1, 0)
        assert found.problem == ""
        assert set(found.arms) == set(ARMS)
        assert found.window is not None
        assert {one.steps for one in found.arms.values()} == {found.last - found.window[0]}
        assert found.arms["push"].spiked
        assert not found.arms["never"].spiked
        assert ArmsLine.from_line(json.loads(to_json(found.to_line()))) == found


class TestJudgements:
    def test_a_known_difference(self) -> None:
        """planted: in both classes a push ends 0.3 lower than never spiking, and 0.2 higher than a skip."""
        found = [line for plan in FEW for line in lines(plan, 20, never=math.exp(0.3), skip=math.exp(-0.2))]
        h5, h6 = judge_h5(found), judge_h6(found)
        assert (h5.verdict, h6.verdict) == ("supported", "contradicted")
        assert h5.effect == pytest.approx(-0.3, abs=0.011)  # the losses of runs differ by up to 0.02
        assert h6.effect == pytest.approx(0.2, abs=0.011)
        assert h5.interval[0] <= h5.effect <= h5.interval[1] < 0
        assert h5.detail["verdict by class"] == {"C1": 1.0, "C3": 1.0}
        assert h5.detail["spikes with both arms"] == {"C1": 20.0, "C3": 20.0}
        assert h5.detail["spikes by remedy"] == {"C1 lr*0.5": 20.0, "C3 lr*0.5": 20.0}
        assert h6.detail["hazard of another spike"]["C1 push"] == 0.5
        assert h6.detail["hazard of another spike"]["C1 skip"] == 0
        assert h6.detail["hazard of another spike: low"]["C1 push"] < 0.5
        assert h6.detail["hazard of push less skip"]["C3"] == 0.5
        assert h6.detail["share of spikes removed"] == {
            "C1 skip": 1.0,
            "C1 sham_skip": 0.0,
            "C3 skip": 1.0,
            "C3 sham_skip": 0.0,
        }

    def test_it_depends_on_the_class(self) -> None:
        """planted: lower in one, higher in the other; a class of 19 spikes is reported and not judged."""
        one, other = lines(FEW[0], 20, never=1.5), lines(FEW[1], 20, never=0.5)
        assert judge_h5([*one, *other]).verdict == "inconclusive"
        assert judge_h5([*one, *other]).detail["verdict by class"] == {"C1": 1.0, "C3": -1.0}
        short = judge_h5([*one, *other[:19]])
        assert short.verdict == "supported"
        assert short.detail["verdict by class"] == {"C1": 1.0}
        assert short.detail["spikes with both arms"] == {"C1": 20.0, "C3": 19.0}
        assert judge_h5(other).verdict == "contradicted"
        assert judge_h5(lines(FEW[0], 20, never=1.0)).verdict == "inconclusive"

    def test_nothing_to_judge(self) -> None:
        """contract: too few spikes, none at all, or none without a spike."""
        for some in ([], lines(FEW[0], 19, never=2.0)):
            found = judge_h5(some)
            assert found.verdict == "inconclusive"
            assert math.isnan(found.effect)
        found = [
            dataclasses.replace(
                ArmsLine.from_line(line), cure=None, arms={"push": ArmsLine.from_line(line).arms["push"]}
            ).to_line()
            for line in lines(FEW[0], 20)
        ]
        assert judge_h5(found).verdict == "inconclusive"
        assert judge_h5(found).detail["spikes by remedy"] == {"C1 none": 20.0}

    def test_kept_remedies_are_told_apart(self) -> None:
        """planted: where the remedy had to be kept the push ends higher, where it was taken back lower."""
        kept = [spike(FEW[0], seed, never=0.5, back=False).to_line() for seed in range(20)]
        back = [spike(FEW[0], 20 + seed, never=2.0).to_line() for seed in range(5)]
        found = judge_h5([*kept, *back])
        assert found.verdict == "contradicted"
        assert found.detail["push less never, remedy taken back"]["C1"] == pytest.approx(-math.log(2))
        assert found.detail["spikes by remedy"] == {"C1 lr*0.5": 5.0, "C1 lr*0.5, kept": 20.0}

    def test_lost_arms(self) -> None:
        """planted: a push that is lost counts as much worse, and is counted."""
        found = lines(FEW[0], 25, skip=1.0)
        lost = [
            dataclasses.replace(one, arms={**one.arms, "push": arm(math.inf, spiked=True)}).to_line()
            for one in map(ArmsLine.from_line, found)
        ]
        assert judge_h6(lost).effect == LIMIT
        assert judge_h6(lost).detail["lost arms"] == {"C1 push": 25.0}
        assert judge_h6([*lost[:12], *found[12:]]).effect == pytest.approx(0, abs=0.03)  # medians do not mind
