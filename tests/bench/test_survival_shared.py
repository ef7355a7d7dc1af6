"""Runs that share their beginning end as they do alone."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from aftershock.bench import survival_shared
from aftershock.bench.survival import LATE, SHARING, Job
from aftershock.bench.survival_run import SETTINGS, Ended, train
from aftershock.bench.survival_shared import train_together
from aftershock.bench.survival_study import _together
from aftershock.guard.policies import POLICIES
from aftershock.guard.policy import CONTINUE, Action, Live, Policy, Seen
from aftershock.lab.zoo.specimen import Specimen, Trial
from aftershock.workload import Workload

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


def _specimen(kind: str) -> Specimen:
    """A line learnt by Adam. "spike": the inputs of four batches are 30 times as large; "nan": one input is broken."""

    def build(seed: int, *, faulty: bool = True) -> Trial:
        torch.manual_seed(seed)
        model = nn.Linear(4, 1)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

        def batch(index: int) -> torch.Tensor:
            x_ND = torch.randn(16, 4, generator=torch.Generator().manual_seed(index))
            if faulty and kind == "spike" and 60 <= index < 64:
                return 30 * x_ND
            return x_ND * torch.nan if faulty and kind == "nan" and index == 60 else x_ND

        def loss(model: nn.Module, x_ND: torch.Tensor) -> torch.Tensor:
            return (model(x_ND) - x_ND.sum(1, keepdim=True) + torch.randn(())).square().mean()

        work = Workload(model=model, optimizer=optimizer, batch=batch, loss=loss)
        return Trial(work, None)

    return Specimen(name=kind, kind="planted", cause="C7", about="-", source="-", steps=100, onset=60, build=build)


def _numbers(run: Ended) -> Ended:
    return run._replace(seconds=0.0)


@pytest.mark.parametrize("kind", ["spike", "nan", "calm"])
def test_shared_runs_end_as_they_do_alone(kind: str) -> None:
    """equivalence: losses, counts and every event, of each policy that shares; random numbers included."""
    one = _specimen(kind)
    shared = train_together(one, SHARING, 0)
    alone = [train(one, policy=name, seed=0, settings=SETTINGS.get(name)) for name in SHARING]
    assert [_numbers(run) for run in shared] == [_numbers(run) for run in alone]
    acted = {run.policy for run in alone if set(run.counts) - {"alarm", "nonfinite"}}
    assert acted <= {"ratio_back_off"} if kind == "calm" else len(acted) >= 5


def test_who_may_share() -> None:
    """contract: what edits from the first step is refused, and jobs are put together by specimen and seed."""
    assert set(SHARING) < set(POLICIES)
    with pytest.raises(ValueError, match="zclip may edit before anything is wrong"):
        train_together(_specimen("calm"), ["skip", "zclip"], 0)
    jobs = [Job("a", "skip", 1), Job("a", "zclip", 1), Job("a", LATE[0], 1), Job("a", "skip", 3), Job("b", "skip", 1)]
    assert _together(jobs) == [[jobs[0], jobs[2]], [jobs[1]], [jobs[3]], [jobs[4]]]


class Faulty(Policy):
    """Fails when it has to act."""

    def before_step(self, seen: Seen, live: Live) -> Action:
        if os.getpid() != PARENT:
            raise OSError("no disk")
        return CONTINUE

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: object) -> None:
        return None


PARENT = os.getpid()


def test_a_child_that_fails_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """planted: the error of the child, with its traceback, is the parent's."""
    monkeypatch.setattr(survival_shared, "policy_of", lambda name, **settings: Faulty())
    with pytest.raises(RuntimeError, match=r"(?s)the run of eps_switch failed.*no disk"):
        train_together(_specimen("spike"), ["eps_switch"], 0)
