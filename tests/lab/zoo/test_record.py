"""record: the run folder holds what the loop saw, and the loop saw what an unmeasured one sees."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

from aftershock.lab.zoo import nets
from aftershock.lab.zoo.labels import label
from aftershock.lab.zoo.nets import ByteLM, TanhNet, Text, seeded, token_loss
from aftershock.lab.zoo.record import record
from aftershock.lab.zoo.specimen import Disturbance, Specimen, Trial
from aftershock.signals.curvature import directional_curvature
from aftershock.store.reader import RunReader
from aftershock.workload import Workload

CURVE = nets.two_sines(20)

ALWAYS = {
    *("loss/train/mean", "optim/all/lr", "grad/all/norm", "update/all/norm", "param/all/norm"),
    *("curvature/all/directional", "grad/all/cosine_previous", "update/all/cosine_descent"),
    *("update/max/ratio", "param/min/of_first", "output/rms", "output/abs_max"),
    *("activation/max/abs_max", "activation/max/kurtosis", "activation/last/rms"),
}
"""Of every run; `grad/max/over_usual` comes with the ninth step, `curvature/all/sharpest` with the 21st."""
ADAM = {
    *("optim/max/rms_t", "optim/max/rms_t_share", "optim/max/saturated_frac", "optim/all/saturated_frac"),
    *("optim/max/eps_floor_frac", "optim/all/eps_floor_frac"),
    *("optim/all/first_norm", "optim/all/second_root_sum", "optim/all/first_over_root"),
}
LANGUAGE = {
    *("grad/embed/over_median", "output/log_z", "output/log_z_max", "attention/max/logit", "attention/min/entropy"),
    *("param/qk/spectral_norm", "param/head/mean_norm", "batch/max/loss", "batch/max/loss_over_mean"),
    *("batch/tokens/repeat_count", "batch/tokens/repeat_frac"),
    *("batch/tokens/compression_ratio", "batch/tokens/unique_frac"),
}
"""The change of the query-key products comes with the eleventh step."""
LATER = {"grad/max/over_usual"}


class _Scaled(Disturbance):
    """Multiplies gradients at one step, and notes every call."""

    def __init__(self, model: nn.Module, step: int) -> None:
        self.model, self.step, self.calls = model, step, list[tuple[str, int]]()

    def before_forward(self, index: int) -> None:
        self.calls.append(("before", index))

    def after_backward(self, index: int) -> None:
        self.calls.append(("after", index))
        if index == self.step:
            for p in self.model.parameters():
                assert p.grad is not None
                p.grad.mul_(1e3)


def _language(seed: int, *, faulty: bool = True) -> Trial:
    text = Text(seed=seed, batch_size=4, context=16)
    model = seeded(seed, lambda: ByteLM(context=16, dropout=0.1))
    optimizer = Adam(model.parameters(), lr=1e-3)
    rest = text.held_out(2)
    return Trial(
        Workload(
            model=model,
            optimizer=optimizer,
            scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 3),
            batch=lambda i: [text.batch(2 * i), text.batch(2 * i + 1)],
            accumulate=2,
            loss=token_loss,
            clip_norm=0.1,
            held_out=lambda model: token_loss(model.eval(), rest).item(),
        ),
        None,
    )


def _curve(seed: int, *, faulty: bool = True) -> Trial:
    """Plain gradient descent; the faulty one at a rate that diverges."""
    model = seeded(seed, TanhNet)
    optimizer = SGD(model.parameters(), lr=10.0 if faulty else 0.01)
    return Trial(Workload(model=model, optimizer=optimizer, batch=lambda i: CURVE, loss=nets.curve_loss), None)


LM = Specimen(name="lm", kind="spontaneous", cause="C1", about="", source="", steps=10, build=_language)
DESCENT = Specimen(name="descent", kind="spontaneous", cause="C3", about="", source="", steps=400, build=_curve)


def _columns(folder: Path) -> dict[str, np.ndarray]:
    run = RunReader(folder)
    return {name: run.scalars(name).values[name] for name in run.scalar_names()}


def test_measuring_changes_nothing(tmp_path: Path) -> None:
    """equivalence: a bare loop with dropout, clipping, accumulation and a schedule has the same losses, to the bit."""
    columns = _columns(record(LM, seed=1, folder=tmp_path / "a"))
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        work = _language(1).workload
        losses, norms, rates = [], [], []
        for index in range(10):
            losses.append(work.backward(index).item())
            norms.append(float(torch.nn.utils.clip_grad_norm_(work.model.parameters(), 0.1)))
            rates.append(work.optimizer.param_groups[0]["lr"])
            work.optimizer.step()
            assert work.scheduler is not None
            work.scheduler.step()
            work.optimizer.zero_grad()
    assert columns["loss/train/mean"].tolist() == losses
    assert columns["optim/all/lr"].tolist() == rates
    # before clipping; float32 sums of squares in another order
    assert columns["grad/all/norm"] == pytest.approx(norms, rel=1e-5)
    assert min(norms) > 0.1


def test_a_row_has_the_signals_of_its_workload(tmp_path: Path) -> None:
    """contract: a language model has all, regression by gradient descent neither Adam's nor the classifier's."""
    columns = _columns(record(LM, seed=0, folder=tmp_path / "lm"))
    assert columns.keys() == ALWAYS | ADAM | LANGUAGE | LATER
    short = {"curvature/all/directional": 6, "grad/max/over_usual": 2, "grad/all/cosine_previous": 9}
    assert {name: len(column) for name, column in columns.items() if len(column) != 10} == short
    assert np.isfinite(columns["optim/max/rms_t_share"]).all()
    # a fresh model's logits are near 0, so log Z is near log 256
    assert columns["output/log_z"][0] == pytest.approx(math.log(256), abs=0.3)
    assert _columns(record(DESCENT, seed=0, folder=tmp_path / "sgd", faulty=False, steps=8)).keys() == ALWAYS


def test_curvature_is_of_every_fourth_step(tmp_path: Path) -> None:
    """oracle: by hand at step 8 before the step; held in between, and none before step 4."""
    run = RunReader(record(DESCENT, seed=0, folder=tmp_path / "a", faulty=False, steps=12))
    found = run.scalars("curvature/all/directional")
    assert found.steps.tolist() == list(range(4, 12))
    values = found.values["curvature/all/directional"]
    assert len(set(values[:4])) == len(set(values[4:])) == 1
    work = _curve(0, faulty=False).workload
    for index in range(8):
        work.backward(index)
        work.optimizer.step()
        work.optimizer.zero_grad()
    by_hand = directional_curvature(work.model, lambda: nets.curve_loss(work.model, CURVE), lr=0.01)
    assert values[4] == by_hand.edge_share


def test_a_run_that_diverges_ends_soon(tmp_path: Path) -> None:
    """contract: 50 steps after the loss was first not finite; the summary and the labels say so."""
    run = RunReader(record(DESCENT, seed=0, folder=tmp_path / "a"))
    losses = run.scalars("loss/train/mean").values["loss/train/mean"]
    first = int(np.flatnonzero(~np.isfinite(losses))[0])
    assert len(losses) == first + 51 < 400
    assert run.status == "diverged"
    assert run.summary == {"finite": False, "steps": first + 51, "held_out_loss": None, "spikes": len(label(losses))}
    assert run.summary["spikes"] > 0


def test_a_disturbance_strikes_where_the_signals_see_it(tmp_path: Path) -> None:
    """planted: gradients times 1000 at step 3 show in that step's gradient norm, a thousandfold."""
    kept: list[_Scaled] = []

    def build(seed: int, *, faulty: bool = True) -> Trial:
        work = _curve(seed, faulty=False).workload
        kept.append(_Scaled(work.model, 3 if faulty else -1))
        return Trial(work, kept[-1])

    specimen = Specimen(name="x", kind="planted", cause="C10", about="", source="", steps=5, build=build, onset=3)
    bad, good = (
        _columns(record(specimen, seed=0, folder=tmp_path / str(faulty), faulty=faulty)) for faulty in (True, False)
    )
    ratio = bad["grad/all/norm"] / good["grad/all/norm"]
    # a float32 product, and the same bits before it
    assert ratio[:4] == pytest.approx([1, 1, 1, 1000], rel=1e-5)
    assert kept[0].calls == [(when, index) for index in range(5) for when in ("before", "after")]


def test_what_the_folder_says_of_itself(tmp_path: Path) -> None:
    """round trip: config, tags' worth of facts, and a held-out loss."""
    run = RunReader(record(LM, seed=4, folder=tmp_path / "a", steps=2))
    assert run.config == {"specimen": "lm", "seed": 4, "faulty": True, "steps": 2}
    assert run.status == "finished"
    assert run.summary["held_out_loss"] == pytest.approx(5.6, abs=0.4)  # near log 256 after two small steps
    with pytest.raises(ValueError, match="steps must be at least 1"):
        record(LM, seed=0, folder=tmp_path / "b", steps=0)
