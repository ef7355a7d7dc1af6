"""Outputs of modules: every statistic against numpy, training unchanged, odd outputs said."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from aftershock.signals.activations import LOGIT_STATS, OUTPUT_STATS, ActivationTap


def _slow(x: np.ndarray) -> dict[str, float]:
    centred = x - x.mean()
    return {
        "abs_max": abs(x).max(),
        "square_mean": (x**2).mean(),
        "rms": math.sqrt((x**2).mean()),
        "abs_mean": abs(x).mean(),
        "zero_frac": (x == 0).mean(),
        "nonfinite_count": 0,
        "kurtosis": (centred**4).mean() / (centred**2).mean() ** 2,
    }


def test_oracle_every_statistic(kit: Any) -> None:
    """Two forward passes in a step: maxima over both, means over both; the outputs kept whole by the test itself."""
    model = kit.decoder().eval()
    kept: dict[str, list[np.ndarray]] = {"blocks.0.mlp": [], "head": []}
    for name, arrays in kept.items():
        hook = lambda _, __, y, arrays=arrays: arrays.append(y.detach().double().numpy())  # noqa: E731
        model.get_submodule(name).register_forward_hook(hook)
    with ActivationTap(model, ["blocks.0.mlp", "head"], logits="head") as tap:
        for part in range(2):
            kit.loss(model, kit.tokens(part))
        tap.end_step()
    (measured,) = tap.read()
    for name, arrays in kept.items():
        one, two = (_slow(x) for x in arrays)
        for stat in (*OUTPUT_STATS, "rms"):
            want = max(one[stat], two[stat]) if stat == "abs_max" else (one[stat] + two[stat]) / 2
            want = math.sqrt((one["square_mean"] + two["square_mean"]) / 2) if stat == "rms" else want
            assert measured.values[f"output/{name}/{stat}"] == pytest.approx(want, rel=1e-5), stat  # float32 moments
    log_z = np.log(np.exp(np.stack(kept["head"])).sum(-1))
    for stat, want in zip(LOGIT_STATS, (log_z, log_z**2, abs(log_z), np.stack(kept["head"])), strict=True):
        assert measured.values[f"output/head/{stat}"] == pytest.approx(want.mean(), rel=1e-5, abs=1e-7)
    assert len(measured.values) == 2 * (len(OUTPUT_STATS) + 1) + len(LOGIT_STATS)


def test_kurtosis_by_hand() -> None:
    """One of n equal outliers: kurtosis about n; a large mean does not spoil it."""
    x = torch.zeros(1, 1000)
    x[0, 0] = 1.0
    model = nn.Sequential(nn.Identity())
    with ActivationTap(model, "0") as tap:
        model(x + 100.0)
        tap.end_step()
    assert tap.read()[0].values["output/0/kurtosis"] == pytest.approx(998.0, rel=1e-2)  # float32 around 100


def test_training_keeps_its_bits(kit: Any) -> None:
    """equivalence: dropout and AdamW with and without the tap."""

    def trained(tapped: bool) -> list[bytes]:
        model = kit.decoder()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        tap = ActivationTap(model, "*", logits="head", optimizer=optimizer)
        torch.manual_seed(1)
        for step in range(4):
            if tapped:
                with tap:
                    kit.loss(model, kit.tokens(step)).backward()
                    optimizer.step()
            else:
                kit.loss(model, kit.tokens(step)).backward()
                optimizer.step()
            optimizer.zero_grad()
        assert len(tap.read()) == (4 if tapped else 0)
        return [p.detach().numpy().tobytes() for p in model.parameters()] + [torch.get_rng_state().numpy().tobytes()]

    assert trained(True) == trained(False)


class _Odd(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        return {"ids": torch.zeros(2, dtype=torch.int64), "hidden": (None, x)}


def test_outputs_of_any_shape_and_odd_ones_are_said() -> None:
    model = nn.ModuleDict({"odd": _Odd(), "lstm": nn.LSTM(3, 3)})
    integers = nn.Sequential(nn.Flatten())
    with ActivationTap(model, ["odd", "lstm"], every=2) as tap, ActivationTap(integers, "0") as silent:
        for _ in range(3):
            model["odd"](torch.ones(2))
            model["lstm"](torch.ones(1, 2, 3))
            tap.end_step()
        integers(torch.ones(2, 2, dtype=torch.int64))
        silent.end_step()
    assert [measured.step for measured in tap.read()] == [0, 2]
    assert silent.notes.sentences == ("0 gives Tensor without a float tensor; not measured",)


def test_pause_rewind_and_mistakes(kit: Any) -> None:
    model = kit.decoder()
    with ActivationTap(model, "head") as tap:
        with tap.paused():
            kit.loss(model, kit.tokens(0))
        tap.end_step()
        kit.loss(model, kit.tokens(0))
        tap.rewind(7)
        kit.loss(model, kit.tokens(0))
        tap.end_step()
    assert [measured.step for measured in tap.read()] == [7]
    assert not model.head._forward_hooks
    with pytest.raises(ValueError, match="no module matches 'hed'; the nearest of 23 is 'head'"):
        ActivationTap(model, "hed")
    with pytest.raises(ValueError, match="neither places nor logits"):
        ActivationTap(model)
