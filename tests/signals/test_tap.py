"""The optimizer tap: every statistic against slow arithmetic on copies, training unchanged, faults said once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from aftershock.signals import pieces
from aftershock.signals.reader import Measured
from aftershock.signals.tap import TensorTap
from aftershock.signals.tensors import CHEAP, STATS, Stat

CLIP = 0.05
REL = 3e-6  # sums of up to 400 float32 squares; a wrong factor, sign or element is off by far more
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.02, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.1),
    "adam-for-loop": lambda params: torch.optim.Adam(params, lr=0.02, foreach=False),
    "adamw-fused": lambda params: torch.optim.AdamW(params, lr=0.02, fused=True),
    "amsgrad": lambda params: torch.optim.AdamW(params, lr=0.02, amsgrad=True),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
}


def _train(kit: Any, model: nn.Module, optimizer: torch.optim.Optimizer, *, steps: int, start: int = 0) -> None:
    torch.manual_seed(1)  # dropout
    for step in range(start, start + steps):
        kit.loss(model, kit.tokens(step)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()


class _Slow:
    """The oracle: whole copies in float64 numpy, one tensor and one formula at a time."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self.last: dict[str, np.ndarray] = {}
        self.steps: list[dict[str, float]] = []

    def step(self) -> None:
        rows: dict[str, float] = {}
        raw = {n: _array(p.grad) for n, p in self.model.named_parameters() if p.grad is not None}
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        clipped = {n: _array(p.grad) for n, p in self.model.named_parameters() if p.grad is not None}
        before = {n: _array(p) for n, p in self.model.named_parameters()}
        self.optimizer.step()
        update = {n: _array(p) - before[n] for n, p in self.model.named_parameters()}
        for kind, arrays in (("grad", raw), ("grad_clipped", clipped), ("param", before), ("update", update)):
            for name, x in arrays.items():
                rows[f"{kind}/{name}/norm"] = math.sqrt((x**2).sum())
                rows[f"{kind}/{name}/rms"] = math.sqrt((x**2).mean())
                if kind != "grad_clipped":
                    rows[f"{kind}/{name}/abs_max"] = abs(x).max()
                    rows[f"{kind}/{name}/zero_frac"] = (x == 0).mean()
                    rows[f"{kind}/{name}/nonfinite_count"] = (~np.isfinite(x)).sum()
            rows[f"{kind}/all/norm"] = math.sqrt(sum((x**2).sum() for x in arrays.values()))
        for name, x in update.items():
            if before[name].any():
                rows[f"update/{name}/ratio"] = float(np.linalg.norm(x) / np.linalg.norm(before[name]))
            if not clipped[name].any():
                continue
            rows[f"update/{name}/cosine_descent"] = _cosine(x, -clipped[name])
            if name in self.last:
                rows[f"grad/{name}/cosine_previous"] = _cosine(clipped[name], self.last[name])
        median = np.median([rows[f"grad/{name}/norm"] for name in raw if name != "embed.weight"])
        rows["grad/embed.weight/over_median"] = rows["grad/embed.weight/norm"] / median
        for name, p in self.model.named_parameters():
            self._adam(rows, name, p, clipped[name])
        self.last = clipped
        self.steps.append(rows)

    def _adam(self, rows: dict[str, float], name: str, p: nn.Parameter, grad: np.ndarray) -> None:
        state, group = self.optimizer.state[p], self.optimizer.param_groups[0]
        if "exp_avg_sq" not in state:
            return
        beta1, beta2 = group["betas"]
        taken, eps = int(state["step"]), group["eps"]
        v = _array(state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]) / (1 - beta2**taken)
        m = _array(state["exp_avg"]) / (1 - beta1**taken)
        rms_t = math.sqrt((grad**2 / np.maximum(v, eps**2)).mean())
        rows[f"optim/{name}/rms_t"] = rms_t
        rows[f"optim/{name}/rms_t_share"] = rms_t / (1 / math.sqrt(1 - beta2))
        rows[f"optim/{name}/saturated_frac"] = (abs(m) > 0.9 * np.sqrt(v)).mean()
        rows[f"optim/{name}/eps_floor_frac"] = (np.sqrt(v) < eps).mean()
        rows[f"optim/{name}/first_norm"] = float(np.linalg.norm(_array(state["exp_avg"])))
        rows[f"optim/{name}/second_root_sum"] = np.sqrt(v * (1 - beta2**taken)).sum()


def _array(x: Any) -> np.ndarray:
    return x.detach().double().numpy().copy()


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / (np.linalg.norm(a) * np.linalg.norm(b)))


def _bits(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[bytes]:
    tensors = [*model.parameters(), *model.buffers(), torch.get_rng_state()]
    tensors += [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    return [x.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for x in tensors]


@pytest.mark.parametrize("cut", [7, 1 << 18], ids=["split", "whole"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_oracle_every_statistic(kit: Any, monkeypatch: pytest.MonkeyPatch, name: str, cut: int) -> None:
    """Each row there is equals the slow one, and there is a row for each slow one: none is missed."""
    monkeypatch.setattr(pieces, "PIECE", {"cpu": cut})
    monkeypatch.setattr(pieces, "GROUP", {"cpu": 3 * cut})
    model = kit.decoder()
    optimizer = OPTIMIZERS[name](model.parameters())
    slow = _Slow(model, optimizer)
    with TensorTap(model, optimizer, stats=STATS) as tap:
        for step in range(3):
            kit.loss(model, kit.tokens(step)).backward()
            slow.step()
            optimizer.zero_grad()
    fast = tap.read()
    assert [step for step, _ in fast] == [0, 1, 2]
    for (_, values), expected in zip(fast, slow.steps, strict=True):
        assert values.keys() == expected.keys()
        for key, value in values.items():
            # A count decided by a float32 comparison may differ from float64's only at exact ties: none here.
            assert value == pytest.approx(float(expected[key]), rel=REL, abs=1e-6 if "cosine" in key else 0), key


def test_oracle_rms_t_of_a_lagging_second_moment() -> None:
    """By hand: with v carried from gradients of 1, one of 100 gives almost its ceiling; and eps takes over below."""
    p = nn.Parameter(torch.zeros(4))
    model = nn.Module()
    model.p = p
    optimizer = torch.optim.Adam([p], lr=0.0, betas=(0.9, 0.99), eps=1e-8)
    with TensorTap(model, optimizer, stats=["rms_t"]) as tap:
        for size in [1.0] * 1000 + [100.0]:
            p.grad = torch.full((4,), size)
            optimizer.step()
    last = tap.read()[-1].values
    v = 0.99 * 1 + 0.01 * 100**2
    assert last["optim/p/rms_t"] == pytest.approx(100 / math.sqrt(v), rel=1e-4)  # v is bias-corrected to 1 within 1e-4
    assert last["optim/p/rms_t_share"] == pytest.approx(100 / math.sqrt(v) / 10, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stat", [*STATS, "all"])
def test_training_keeps_its_bits(kit: Any, stat: Stat, dtype: torch.dtype) -> None:
    """equivalence: dropout, clipping, AdamW, with and without each group of statistics."""

    def trained(tapped: bool) -> list[bytes]:
        model = kit.decoder().to(dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        if tapped:
            with TensorTap(model, optimizer, stats=STATS if stat == "all" else [stat]):
                _train(kit, model, optimizer, steps=4)
        else:
            _train(kit, model, optimizer, steps=4)
        return _bits(model, optimizer)

    assert trained(True) == trained(False)


def test_hooks_live_only_inside_the_with(kit: Any) -> None:
    model = kit.decoder()
    optimizer = torch.optim.AdamW(model.parameters())
    tap = TensorTap(model, optimizer)
    _train(kit, model, optimizer, steps=1)
    with tap, pytest.raises(RuntimeError, match="interrupted"):
        _interrupted(kit, model, optimizer)
    _train(kit, model, optimizer, steps=1)
    assert [step for step, _ in tap.read()] == [0, 1]
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())


def _interrupted(kit: Any, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    _train(kit, model, optimizer, steps=2)
    kit.loss(model, kit.tokens(2)).backward()
    raise RuntimeError("interrupted")


def test_read_is_one_step_late_and_rewinds(kit: Any) -> None:
    model = kit.decoder()
    optimizer = torch.optim.AdamW(model.parameters())
    seen: list[int] = []
    with TensorTap(model, optimizer, first_step=10, every=2) as tap:
        for step in range(4):
            _train(kit, model, optimizer, steps=1, start=step)
            seen += [measured.step for measured in tap.read()]
        assert seen == [10]  # 12 is the newest
        tap.rewind(12)
        _train(kit, model, optimizer, steps=1)
        assert [m.step for m in tap.read()] == [12]
    assert [m.step for m in tap.read()] == [12]


def test_accumulation_and_call_agree(kit: Any) -> None:
    """equivalence: two backward passes per step, measured at each end or by one call before clipping."""

    def measured(mode: Any) -> list[Measured]:
        model = kit.decoder()
        optimizer = torch.optim.AdamW(model.parameters())
        torch.manual_seed(1)
        with TensorTap(model, optimizer, stats=STATS, gradients=mode) as tap:
            for step in range(3):
                for part in range(2):
                    kit.loss(model, kit.tokens(2 * step + part)).backward()
                if mode == "call":
                    tap.measure_gradients()
                nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                optimizer.zero_grad()
        return tap.read()

    assert measured("backward") == measured("call")


def test_a_call_that_is_missing_is_said(kit: Any) -> None:
    model = kit.decoder()
    optimizer = torch.optim.AdamW(model.parameters())
    with TensorTap(model, optimizer, gradients="call") as tap:
        _train(kit, model, optimizer, steps=2)
    assert tap.notes.sentences == ("step 0 came without measure_gradients(), so it has no grad rows",)
    assert not any(name.startswith("grad/") for name in tap.read()[0].values)


def test_bad_input_is_said_in_one_sentence(kit: Any) -> None:
    """planted: a parameter that never gets a gradient, a frozen one, one outside the optimizer; the rest goes on."""
    model = kit.decoder()
    model.unused = nn.Linear(3, 3, bias=False)
    model.foreign = nn.Linear(3, 3, bias=False)
    model.embed.weight.requires_grad_(False)
    held = [p for name, p in model.named_parameters() if not name.startswith("foreign")]
    optimizer = torch.optim.AdamW(held)
    with TensorTap(model, optimizer, stats=STATS) as tap:
        _train(kit, model, optimizer, steps=2)
    assert tap.notes.sentences == (
        "not measured, because they need no gradient: embed.weight",
        "not measured, because they are not in the optimizer: foreign.weight",
        "no gradient at step 0, so no rows about it there: unused.weight",
    )
    values = tap.read()[1].values
    assert {name for name in values if "unused" in name and name.split("/")[0] in ("grad", "optim")} == set()
    assert values["update/unused.weight/norm"] == 0.0
    assert values["grad/head.weight/norm"] > 0


def test_an_optimizer_unlike_adam_is_said_and_the_rest_measured(kit: Any) -> None:
    model = kit.decoder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with TensorTap(model, optimizer) as tap:
        _train(kit, model, optimizer, steps=1)
    (sentence,) = tap.notes.sentences
    assert sentence.startswith("SGD keeps no exp_avg and exp_avg_sq, so no optim rows: embed.weight, ")
    assert {name.split("/")[0] for name in tap.read()[0].values} == {"param", "grad", "update"}
    with TensorTap(model, optimizer, stats=["rms_t", "moments"]) as nothing:
        _train(kit, model, optimizer, steps=2)
    assert nothing.read() == []
    assert len(nothing.notes.sentences) == 1


def test_sparse_gradients_are_said() -> None:
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with TensorTap(model, optimizer, stats=["grad"]) as tap:
        model(torch.tensor([1, 2])).sum().backward()
        optimizer.step()
    assert tap.notes.sentences[0] == "not measured, because their gradients are sparse: 0.weight"
    assert "grad/1.weight/norm" in tap.read()[0].values


def test_non_finite_elements_are_counted_and_stay_in_their_place(kit: Any) -> None:
    """planted: two infinities and a nan in one gradient; every other place keeps its numbers."""
    model = kit.decoder()
    optimizer = torch.optim.AdamW(model.parameters())
    with TensorTap(model, optimizer, stats=STATS, gradients="call") as tap:
        kit.loss(model, kit.tokens(0)).backward()
        flat = model.head.weight.grad.view(-1)
        flat[3], flat[4], flat[5] = math.inf, -math.inf, math.nan
        tap.measure_gradients()
        optimizer.step()
    values = tap.read()[0].values
    assert values["grad/head.weight/nonfinite_count"] == 3
    assert math.isnan(values["grad/head.weight/norm"])
    assert math.isnan(values["grad/all/norm"])
    assert values["update/head.weight/nonfinite_count"] >= 1
    assert math.isfinite(values["grad/embed.weight/norm"])
    assert values["grad/embed.weight/nonfinite_count"] == 0


@pytest.mark.parametrize(("planted", "after"), [(math.nan, "all nan"), (math.inf, "zeros and one nan")])
def test_the_tap_names_the_place_that_clipping_spreads(kit: Any, planted: float, after: str) -> None:
    """planted: one element; torch's clip_grad_norm_ makes all gradients nan, or 0 with a nan where the infinity was."""
    model = kit.decoder()
    optimizer = torch.optim.AdamW(model.parameters())
    with TensorTap(model, optimizer, stats=["grad", "elements"], gradients="call") as tap:
        kit.loss(model, kit.tokens(0)).backward()
        model.head.weight.grad.view(-1)[3] = planted
        tap.measure_gradients()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        flat = torch.cat([p.grad.flatten() for p in model.parameters()])
        optimizer.step()
    spread = "all nan" if flat.isnan().all() else "zeros and one nan"
    assert (spread, int(flat.isnan().sum()) + int((flat == 0).sum())) == (after, flat.numel())
    found = {
        name: x for name, x in tap.read()[0].values.items() if name.startswith("grad/") and name.endswith("_count")
    }
    assert {name: x for name, x in found.items() if x} == {"grad/head.weight/nonfinite_count": 1.0}


def test_oracle_sums_of_a_million_equal_terms_keep_their_digits() -> None:
    """Terms of one size are the worst case for adding in float32."""
    p = nn.Parameter(torch.full((1 << 20,), 1 / 3))
    model = nn.Module()
    model.p = p
    optimizer = torch.optim.Adam([p], lr=0.0)
    with TensorTap(model, optimizer, gradients="call") as tap:
        p.grad = torch.full_like(p, 0.3)
        tap.measure_gradients()
        optimizer.step()
    values = tap.read()[0].values
    # By dot products of 2^17 terms 1.3e-5; torch's float32 norms of 2^18 terms are 1e-4 away from both.
    assert values["param/p/norm"] == pytest.approx(2**10 / 3, rel=6e-5)
    assert values["grad/p/norm"] == pytest.approx(0.3 * 2**10, rel=6e-5)


def test_device_side_step_count_is_read_at_load(kit: Any) -> None:
    """equivalence: where the count may not be read in the step, entry and load give the same bias correction."""
    model = kit.decoder()
    optimizer = torch.optim.AdamW(model.parameters())
    _train(kit, model, optimizer, steps=3)
    tap = TensorTap(model, optimizer)
    with tap:
        assert tap._counted == 3
        saved = optimizer.state_dict()
        _train(kit, model, optimizer, steps=2)
        assert tap._counted == 5
        optimizer.load_state_dict(saved)
        assert tap._counted == int(next(iter(optimizer.state.values()))["step"])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"places": "blocks.0.atn.*"}, "no parameter matches 'blocks.0.atn.*'; the nearest of 22 is 'blocks.0.attn"),
        ({"stats": ["rmst"]}, "no group of statistics matches 'rmst'; the nearest of 8 is 'rms_t'"),
        ({"every": 0}, "every must be at least 1, got 0"),
        ({"embeddings": "embd"}, "no measured parameter matches 'embd'; the nearest of 22 is 'embed.weight'"),
    ],
)
def test_mistakes_are_errors(kit: Any, settings: dict[str, Any], sentence: str) -> None:
    model = kit.decoder()
    with pytest.raises(ValueError) as error:
        TensorTap(model, torch.optim.AdamW(model.parameters()), **settings)
    assert str(error.value).startswith(sentence)


def test_a_wrapped_optimizer_is_refused(kit: Any) -> None:
    model = kit.decoder()
    with pytest.raises(ValueError, match="needs a torch.optim.Optimizer, got str"):
        TensorTap(model, "adam")  # pyright: ignore[reportArgumentType]


def test_the_default_is_the_cheap_set() -> None:
    assert set(CHEAP) < set(STATS)


@pytest.mark.gpu
def test_no_synchronisation_on_a_gpu(kit: Any) -> None:
    """planted: the sync debug mode raises at any synchronising call inside the step."""
    model = kit.decoder().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batches = [kit.tokens(step).cuda() for step in range(5)]
    with TensorTap(model, optimizer, stats=STATS) as tap:
        for step, batch in enumerate(batches):
            torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
            try:
                kit.loss(model, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
                tap.read()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert tap.read()[-1].step == 4
