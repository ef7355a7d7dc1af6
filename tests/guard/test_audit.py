"""Resume audit: each thing that a resume can forget is planted and must be named; a clean resume names nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from aftershock.guard.audit import ADVICE, AuditResult, Rerun, TailLog, audit, read_tail, record_tail
from aftershock.guard.digest import of_state
from aftershock.guard.recorder import FlightRecorder
from aftershock.guard.state import Training

STEPS = 23
"""Snapshots lie each 5 steps, so the newest at least 8 steps back is that of step 15."""


class Average:
    """An EMA of the weights, as an `extra`."""

    def __init__(self, model: nn.Module) -> None:
        self.values = {name: p.detach().clone() for name, p in model.named_parameters()}

    def update(self, model: nn.Module) -> None:
        for name, p in model.named_parameters():
            self.values[name].lerp_(p.detach(), 0.1)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.values)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.values = {name: value.clone() for name, value in state.items()}


class Run:
    """A small loop as a user writes it: dropout, AdamW, a schedule, clipping, an EMA, shuffled batches of 50 rows."""

    def __init__(self, *, betas: tuple[float, float] = (0.9, 0.95), lr: float = 0.01) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, betas=betas)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + 0.1 * step))
        self.average = Average(self.model)
        self.data = torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
        self.order_seed = 0
        self.norm = 1.0
        self.training = Training(self.model, self.optimizer, scheduler=self.scheduler, extra={"ema": self.average})

    def batch(self, batch_id: int) -> Tensor:
        epoch, index = divmod(batch_id, 10)
        order = torch.randperm(50, generator=torch.Generator().manual_seed(self.order_seed + epoch))
        return self.data[order[index * 5 : index * 5 + 5]]

    def step(self, batch: Tensor) -> float:
        noise = random.random() * 0.01 + float(np.random.rand()) * 0.01  # noqa: NPY002 - what users' loaders draw from
        loss = (self.model(batch + noise) - batch.sum(1, keepdim=True)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.average.update(self.model)
        return float(loss.detach())

    def rerun(self, batch_id: int) -> Rerun:
        batch = self.batch(batch_id)
        return Rerun(self.step(batch), batch)


@dataclass(kw_only=True)
class Arguments:
    """As in Hugging Face's TrainingArguments."""

    logging_nan_inf_filter: bool = True


def saved(folder: Path, *, steps: int = STEPS) -> dict[str, Any]:
    """Train, write the tail into `folder`, and return a checkpoint as users write one."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - see above
    run = Run()
    recorder, log = FlightRecorder(run.training, every=5), TailLog(run.training)
    for step in range(steps):
        if recorder.due(step):
            recorder.take(step, step)
        batch = run.batch(step)
        log.before(step, step, batch)
        log.after(run.step(batch))
    record_tail(folder, log, run.training, recorder)
    return {
        "model": {k: v.clone() for k, v in run.model.state_dict().items()},
        "optimizer": _copied(run.optimizer.state_dict()),
        "scheduler": _copied(run.scheduler.state_dict()),
        "average": {k: v.clone() for k, v in run.average.state_dict().items()},
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),  # noqa: NPY002 - see above
        "python": random.getstate(),
    }


def _copied(state: Any) -> Any:
    import copy

    return copy.deepcopy(state)


def resumed(checkpoint: dict[str, Any], *, forget: str = "", **settings: Any) -> Run:
    """A new process' run, loaded from the checkpoint but for what it forgets."""
    random.seed(99)
    np.random.seed(99)  # noqa: NPY002 - see above
    run = Run(**settings)
    if forget != "model":
        run.model.load_state_dict(checkpoint["model"])
    if forget != "optimizer":
        run.optimizer.load_state_dict(_copied(checkpoint["optimizer"]))
    if forget != "scheduler":
        run.scheduler.load_state_dict(_copied(checkpoint["scheduler"]))
    if forget != "average":
        run.average.load_state_dict(checkpoint["average"])
    if forget != "rng":
        torch.set_rng_state(checkpoint["torch"])
        np.random.set_state(checkpoint["numpy"])  # noqa: NPY002 - see above
        random.setstate(checkpoint["python"])
    return run


def findings(result: AuditResult) -> list[str]:
    assert result.ok == (not result.findings)
    assert all(finding.advice == ADVICE[finding.what] for finding in result.findings)
    return [finding.what for finding in result.findings]


def test_planted_nothing_a_clean_resume_names_nothing(tmp_path: Path) -> None:
    """planted: the clean case, bit for bit over 8 steps of dropout and python, numpy and torch randomness."""
    run = resumed(saved(tmp_path))
    result = audit(run.training, read_tail(tmp_path), run.rerun, arguments=Arguments(logging_nan_inf_filter=False))
    assert result == AuditResult(True, (), 8)


def test_contract_the_run_is_left_as_it_was_found(tmp_path: Path) -> None:
    """contract: state, moments, rates, random numbers and gradients, after a replay and after one that raises."""
    checkpoint = saved(tmp_path)
    run, untouched = resumed(checkpoint), resumed(checkpoint)
    expected = [untouched.rerun(i).loss for i in range(STEPS, STEPS + 5)]
    run = resumed(checkpoint)
    before = of_state(run.training)
    audit(run.training, read_tail(tmp_path), run.rerun)

    def broken(batch_id: int) -> Rerun:
        run.rerun(batch_id)
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        audit(run.training, read_tail(tmp_path), broken)
    assert of_state(run.training) == before
    assert all(p.grad is None for p in run.model.parameters())
    assert [run.rerun(i).loss for i in range(STEPS, STEPS + 5)] == expected


@pytest.mark.parametrize(
    ("forget", "what", "evidence"),
    [
        ("model", "weights", "9 of 9 differ"),
        ("optimizer", "optimizer", "18 of 18 missing"),
        ("scheduler", "scheduler", "last_epoch 23 recorded, 0 now"),
        ("average", "extra", "6 of 6 differ"),
        ("rng", "rng", "differ"),
    ],
)
def test_planted_part_not_restored_is_named(forget: str, what: str, evidence: str, tmp_path: Path) -> None:
    """planted: one part each; the replay of the recorded steps adds no wrong name."""
    run = resumed(saved(tmp_path), forget=forget)
    result = audit(run.training, read_tail(tmp_path), run.rerun)
    assert findings(result) == [what]
    assert evidence in result.findings[0].evidence
    assert result.num_replayed == 8


def test_planted_step_counters_lost_are_named(tmp_path: Path) -> None:
    """planted: moments restored, Adam's counters not (bias correction begins anew)."""
    run = resumed(saved(tmp_path))
    for state in run.optimizer.state.values():
        state["step"].zero_()
    result = audit(run.training, read_tail(tmp_path))
    assert findings(result) == ["optimizer"]
    assert "6 of 18 differ" in result.findings[0].evidence
    assert "/step" in result.findings[0].evidence
    assert result.num_replayed == 0


def test_planted_betas_of_the_config_written_over_by_the_checkpoint(tmp_path: Path) -> None:
    """planted: the user wants 0.99 from here on, load_state_dict silently puts 0.95 back."""
    run = resumed(saved(tmp_path), betas=(0.9, 0.99))
    result = audit(run.training, read_tail(tmp_path), run.rerun)
    assert findings(result) == ["settings_from_checkpoint"]
    assert "betas [0.9, 0.99] in the config, [[0.9, 0.95]] in use" in result.findings[0].evidence


def test_planted_betas_of_the_checkpoint_written_over_by_the_config(tmp_path: Path) -> None:
    """planted: a trainer sets the config's betas again after loading."""
    run = resumed(saved(tmp_path), betas=(0.9, 0.99))
    run.optimizer.param_groups[0]["betas"] = (0.9, 0.99)
    result = audit(run.training, read_tail(tmp_path), run.rerun)
    assert findings(result) == ["settings_from_config"]
    assert "betas [0.9, 0.95] recorded, [0.9, 0.99] now" in result.findings[0].evidence


def test_planted_betas_changed_in_one_of_two_groups(tmp_path: Path) -> None:
    """planted: the user put the config's betas back, into one group only; named once, with the group."""

    def build(beta2: float) -> Training:
        model = nn.Linear(2, 1)
        nn.init.ones_(model.weight)
        nn.init.ones_(model.bias)
        groups = [{"params": [model.weight]}, {"params": [model.bias]}]
        return Training(model, torch.optim.AdamW(groups, betas=(0.9, beta2)))

    then, now = build(0.95), build(0.99)
    random_state = torch.get_rng_state()
    record_tail(tmp_path, TailLog(then), then)
    torch.set_rng_state(random_state)
    now.optimizer.load_state_dict(then.optimizer.state_dict())
    now.optimizer.param_groups[1]["betas"] = (0.9, 0.99)
    result = audit(now, read_tail(tmp_path))
    assert findings(result) == ["settings_from_config"]
    assert result.findings[0].evidence == "group 1: betas [0.9, 0.95] recorded, [0.9, 0.99] now"


def test_planted_loader_in_another_order_is_named(tmp_path: Path) -> None:
    """planted: the sampler has another seed than when the run was saved."""
    run = resumed(saved(tmp_path))
    run.order_seed = 5
    result = audit(run.training, read_tail(tmp_path), run.rerun)
    assert findings(result) == ["loader"]
    assert "8 of 8 batches differ" in result.findings[0].evidence


def test_planted_loader_that_starts_too_early_is_named(tmp_path: Path) -> None:
    """planted: two batches off; the evidence says that they are known ones."""
    run = resumed(saved(tmp_path))
    result = audit(run.training, read_tail(tmp_path), lambda batch_id: run.rerun(batch_id - 2))
    assert findings(result) == ["loader"]
    assert "out of order (batch 15 came as 17)" in result.findings[0].evidence


def test_planted_schedule_changed_in_code_is_named(tmp_path: Path) -> None:
    """planted: the loaded state agrees, the schedule's own function is another one."""
    run = resumed(saved(tmp_path))
    run.scheduler.lr_lambdas[0] = lambda step: 0.5
    result = audit(run.training, read_tail(tmp_path), run.rerun)
    assert findings(result) == ["scheduler"]
    assert "step 16" in result.findings[0].evidence


def test_planted_other_randomness_in_the_rerun_is_named(tmp_path: Path) -> None:
    """planted: the resumed loop draws once more from torch in each step, so dropout differs."""
    run = resumed(saved(tmp_path))

    def drawing(batch_id: int) -> Rerun:
        torch.rand(1)
        return run.rerun(batch_id)

    result = audit(run.training, read_tail(tmp_path), drawing)
    assert findings(result) == ["rng"]
    assert "losses differ" in result.findings[0].evidence


def test_planted_other_loss_and_other_clip_are_unexplained(tmp_path: Path) -> None:
    """planted: what was not recorded is not guessed at; a step that differs only after its loss is found too."""
    run = resumed(saved(tmp_path))
    result = audit(run.training, read_tail(tmp_path), lambda i: run.rerun(i)._replace(loss=1.0))
    assert findings(result) == ["unexplained"]
    assert "8 of 8 losses differ" in result.findings[0].evidence
    tail = read_tail(tmp_path)
    elsewhere = tail._replace(surroundings=tail.surroundings | {"threads": 99, "torch": "1.0"})
    (finding,) = audit(run.training, elsewhere, lambda i: run.rerun(i)._replace(loss=1.0)).findings
    assert finding.evidence.endswith(f"torch: 1.0 recorded, {torch.__version__} now; threads: 99 recorded, 1 now")
    assert audit(run.training, elsewhere, run.rerun).ok
    last = STEPS - 1

    def clip_last(batch_id: int) -> Rerun:
        run.norm = 1e-3 if batch_id == last else 1.0
        return run.rerun(batch_id)

    result = audit(run.training, read_tail(tmp_path), clip_last)
    assert findings(result) == ["unexplained"]
    assert "all 8 losses agree" in result.findings[0].evidence


def test_planted_hidden_nan_filter_is_named(tmp_path: Path) -> None:
    """planted: the default of Hugging Face's Trainer."""
    run = resumed(saved(tmp_path))
    assert findings(audit(run.training, read_tail(tmp_path), run.rerun, arguments=Arguments())) == ["nan_filter"]


def test_contract_tolerance_is_relative_and_the_users(tmp_path: Path) -> None:
    """contract: 1e-6 off passes at 1e-5 and not at 0."""
    run = resumed(saved(tmp_path))

    def off(batch_id: int) -> Rerun:
        new = run.rerun(batch_id)
        return new._replace(loss=new.loss * (1 + 1e-6))

    assert findings(audit(run.training, read_tail(tmp_path), off, tolerance=1e-5)) == []
    assert findings(audit(run.training, read_tail(tmp_path), off)) == ["unexplained"]
    with pytest.raises(ValueError, match="at least 0, got -1"):
        audit(run.training, read_tail(tmp_path), off, tolerance=-1)


def test_contract_after_a_skip_the_tail_begins_anew(tmp_path: Path) -> None:
    """contract: steps that a plain rerun would not repeat are never in a tail; a short one is still audited."""
    run = Run()
    recorder, log = FlightRecorder(run.training, every=5), TailLog(run.training)
    for step in range(13):
        if step == 9:
            log.clear()
        if recorder.due(step):
            recorder.take(step, step)
        log.before(step, step)
        log.after(run.step(run.batch(step)))
    tail = record_tail(tmp_path, log, run.training, recorder)
    assert [row.step for row in tail.steps] == [10, 11, 12]
    assert read_tail(tmp_path) == tail
    assert audit(run.training, tail, run.rerun) == AuditResult(True, (), 3)


def test_contract_without_a_recorder_the_state_is_compared(tmp_path: Path) -> None:
    """contract: no snapshot, no replay, and the result says so; without any step likewise."""
    run = Run()
    log = TailLog(run.training)
    tail = record_tail(tmp_path, log, run.training)
    assert audit(run.training, tail, run.rerun) == AuditResult(True, (), 0)
    with torch.no_grad():
        run.model[0].weight[0, 0] += 1  # pyright: ignore[reportIndexIssue]
    assert findings(audit(run.training, tail, run.rerun)) == ["weights"]


def test_planted_bad_calls_are_refused(tmp_path: Path) -> None:
    """planted: each says what to do."""
    run = Run()
    with pytest.raises(ValueError, match="cannot be audited"):
        read_tail(tmp_path)
    log = TailLog(run.training)
    with pytest.raises(ValueError, match="after without before"):
        log.after(1.0)
    with pytest.raises(ValueError, match="capacity"):
        TailLog(run.training, capacity=0)
    with pytest.raises(ValueError, match="compare must be at least 1"):
        record_tail(tmp_path, log, run.training, compare=0)
    tail = record_tail(tmp_path, log, run.training)
    model = nn.Linear(3, 1)
    other = Training(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="another model"):
        audit(other, tail)


def test_contract_infinities_in_the_state_survive_their_file(tmp_path: Path) -> None:
    """contract: ReduceLROnPlateau holds inf, an option may be NaN; neither is a difference to itself."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD([{"params": model.parameters(), "cap": float("nan"), "top": float("inf")}], lr=0.1)
    training = Training(model, optimizer, scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer))
    log = TailLog(training)
    log.before(0, 0)
    log.after(float("nan"))
    record_tail(tmp_path, log, training)
    assert repr(read_tail(tmp_path).steps) == repr(log.steps)
    assert findings(audit(training, read_tail(tmp_path))) == []


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW([{"params": p, "weight_decay": 0.0}], lr=torch.tensor(0.1), foreach=False),
        lambda p: torch.optim.Adagrad(p),
    ],
)
def test_contract_digest_survives_its_file_for_any_optimizer(make: Callable[..., Any], tmp_path: Path) -> None:
    """contract: written and read again it equals the live one; one changed bit shows."""
    model = nn.Linear(3, 2).to(torch.bfloat16)
    optimizer = make(list(model.parameters()))
    training = Training(model, optimizer)
    model(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    record_tail(tmp_path, TailLog(training), training)
    tail = read_tail(tmp_path)
    assert tail.end == of_state(training)
    with torch.no_grad():
        model.bias.view(torch.int16)[1] ^= 1
    assert findings(audit(training, tail)) == ["weights"]
