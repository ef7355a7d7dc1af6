"""Per-tensor measures of a training step: parameter, gradient, update, Adam's moments.

Legend: P places. Columns are float64 [P] sums and maxima over elements, made on the device by a few fused calls per
group of pieces; `statistics` turns them into numbers on the host, after they met across ranks.
Nothing here writes to a tensor of the training. Must not import the tap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from aftershock.signals.pieces import Cut

Stat = Literal["param", "grad", "grad_clipped", "update", "rms_t", "moments", "cosines", "elements"]
STATS: tuple[Stat, ...] = get_args(Stat)
CHEAP: tuple[Stat, ...] = ("param", "grad", "update", "rms_t")

SATURATED = 0.9
"""|m/sqrt(v)| beyond this: gradients agree so well that Adam moves at nearly its full rate (Molybog 2023)."""

Tensors = Sequence[Tensor | None]
Lists = list[list[Tensor]]
Found = dict[str, Sequence[Tensor]]


class AdamFacts(NamedTuple):
    """Per place, on the host: `eps`, `beta2`, and the bias corrections 1 - beta1^t and 1 - beta2^t; shape P."""

    eps: np.ndarray
    beta2: np.ndarray
    bias1: np.ndarray
    bias2: np.ndarray


def norm_columns(cut: Cut, tensors: Tensors, *, name: str) -> dict[str, Tensor]:
    """`norm_<name>` = sum(x^2) for `norm` and `rms`. Cost: one read of x.

    Squares are taken in float32 at least: |x| above 1e19 gives inf although every element is finite.
    """
    return cut.columns([tensors], lambda _, lists: {f"norm_{name}": _squares(lists[0])}, names=[f"norm_{name}"])


def copy_columns(cut: Cut, copies: Tensors, tensors: Tensors, *, name: str) -> dict[str, Tensor]:
    """`norm_<name>` = sum(x^2), and x into `copies`, which are contiguous and in float32 at least.

    Cost: one read of x and one write, the sum on what is in the cache.
    """

    def work(_: list[int], lists: Lists) -> Found:
        torch._foreach_copy_(lists[0], lists[1])
        return {f"norm_{name}": _squares(lists[0])}

    return cut.columns([copies, tensors], work, names=[f"norm_{name}"])


def element_columns(cut: Cut, tensors: Tensors, *, name: str) -> dict[str, Tensor]:
    """`max_<name>` = max |x|, and how many x are not 0 and how many not finite. Cost: six passes in cache.

    Counted tensor by tensor: seven small kernels each on a GPU, still without a synchronisation.
    """

    def work(_: list[int], lists: Lists) -> Found:
        return {
            f"max_{name}": [x.abs().amax() for x in lists[0]],
            # Written as floats: on a CPU that is five times as fast as counting booleans.
            f"nonzero_{name}": [torch.ne(x, 0, out=torch.empty_like(x)).sum() for x in lists[0]],
            # x - x is 0 where x is finite and nan where it is not.
            f"nonfinite_{name}": [(x - x).nan_to_num_(nan=1.0).sum() for x in lists[0]],
        }

    return cut.columns([tensors], work, names=[f"{kind}_{name}" for kind in ("max", "nonzero", "nonfinite")])


def dot_columns(cut: Cut, a: Tensors, b: Tensors, *, name: str) -> dict[str, Tensor]:
    """`dot_<name>` = sum(a b). Cost: one read of a and b; one dot product a piece."""

    def work(_: list[int], lists: Lists) -> Found:
        return {f"dot_{name}": [torch.dot(x, y.to(x.dtype)) for x, y in zip(*lists, strict=True)]}

    return cut.columns([a, b], work, names=[f"dot_{name}"])


def update_columns(cut: Cut, before: Tensors, after: Tensors, *, keep: bool) -> dict[str, Tensor]:
    """`norm_update` = sum((after - before)^2); with `keep`, `before` then holds before - after, minus the update.

    The update is what the parameter really did, whatever the optimizer, its rounding to bf16 included.
    `before` are contiguous copies that the caller owns, in float32 at least. Cost: one read of both, with `keep` one
    write.
    """

    def work(_: list[int], lists: Lists) -> Found:
        scratch = lists[0] if keep else cut.scratch(lists[0])
        if scratch is None:
            return {"norm_update": _squares(torch._foreach_sub(lists[0], lists[1]))}
        for x, y, out in zip(*lists, scratch, strict=True):
            torch.sub(x, y, out=out)
        return {"norm_update": _squares(scratch)}

    return cut.columns([before, after], work, names=["norm_update"])


def rms_t_columns(cut: Cut, grads: Tensors, second: Tensors, facts: AdamFacts) -> dict[str, Tensor]:
    """`norm_rms_t` = sum(g^2 / max(v, eps^2 b)) with v as stored and b = 1 - beta2^t its bias correction.

    Cost: one read of g and v; on a CPU two elementwise passes and a dot product in cache, on a GPU three and a norm.
    """
    floor = facts.eps**2 * facts.bias2

    def work(places: list[int], lists: Lists) -> Found:
        grad, v = lists
        limits = [float(floor[place]) for place in places]
        scratch = cut.scratch(v)
        if scratch is None:
            scale = torch._foreach_clamp_min(v, limits)
            torch._foreach_sqrt_(scale)
            return {"norm_rms_t": _squares(torch._foreach_div(grad, scale))}
        for g, x, limit, out in zip(grad, v, limits, scratch, strict=True):
            torch.div(g, torch.clamp_min(x, limit, out=out), out=out)
        return {"norm_rms_t": [torch.dot(g, out) for g, out in zip(grad, scratch, strict=True)]}

    return cut.columns([grads, second], work, names=["norm_rms_t"])


def moment_columns(cut: Cut, first: Tensors, second: Tensors, facts: AdamFacts) -> dict[str, Tensor]:
    """How many elements have |m_hat| > 0.9 sqrt(v_hat), how many sqrt(v_hat) < eps; sum(m^2) and sum(sqrt(v)).

    m_hat, v_hat are the debiased moments. Cost: one read of m and v; ten elementwise passes in scratch.
    """
    floor = facts.eps**2 * facts.bias2
    reach = SATURATED * facts.bias1 / np.sqrt(facts.bias2)

    def work(places: list[int], lists: Lists) -> Found:
        m, v = lists
        root = torch._foreach_sqrt(v)
        root_sum = _totals(root)
        squares = _squares(m)
        torch._foreach_mul_(root, [float(reach[place]) for place in places])
        over = torch._foreach_abs(m)
        torch._foreach_sub_(over, root)
        under = torch._foreach_sub(v, [float(floor[place]) for place in places])
        torch._foreach_neg_(under)
        return {
            "saturated": _positive(list(over)),
            "floored": _positive(list(under)),
            "norm_first": squares,
            "root_sum": root_sum,
        }

    return cut.columns([first, second], work, names=["saturated", "floored", "norm_first", "root_sum"])


def statistics(
    columns: Mapping[str, np.ndarray],
    *,
    places: Sequence[str],
    sizes: np.ndarray,
    facts: AdamFacts | None,
    embeddings: Sequence[str] = (),
) -> dict[str, float]:
    """Columns to signals, `kind/place/stat`; a place whose columns were left out (`present` false) has no row.

    With n elements, W the parameter before the step, u = W_after - W_before, g_c the gradient as the optimizer got it:

    - `norm` = sqrt(sum(x^2)), `rms` = norm / sqrt(n), for param (W), grad (before clipping), grad_clipped, update (u)
    - `update/<place>/ratio` = |u| / |W|
    - `optim/<place>/rms_t` = sqrt(mean(g_c^2 / max(v_hat, eps^2))), v_hat after the step and debiased (Wortsman et al.
      2023, arXiv 2304.13013, algorithm 2); `rms_t_share` = rms_t sqrt(1 - beta2), its share of the ceiling that v >=
      (1 - beta2) g^2 sets
    - `optim/<place>/saturated_frac`: share of |m_hat / sqrt(v_hat)| > 0.9; `eps_floor_frac`: of sqrt(v_hat) < eps;
      `first_norm` = |m|, `second_root_sum` = sum(sqrt(v)), both as stored
    - `grad/<place>/cosine_previous` = cos(g_c, g_c of the previous measured step); clipping the global norm leaves it
    - `update/<place>/cosine_descent` = cos(u, -g_c): 1 for plain gradient descent, below 0 when the step climbs
    - `abs_max`, `zero_frac`, `nonfinite_count` of param, grad and update
    - `grad/<embedding>/over_median` = its gradient norm over the median norm of all other places
    - `<kind>/all/norm`: over all places

    Shares are in [0, 1]. A non-finite element gives nan or inf in its own place and in `all`; a ratio or cosine with a
    length of 0 has no row.
    """
    rows: dict[str, float] = {}
    with np.errstate(all="ignore"):
        root_n = np.sqrt(sizes)
        norms = {name.removeprefix("norm_"): np.sqrt(c) for name, c in columns.items() if name.startswith("norm_")}

        def put(kind: str, stat: str, value_P: np.ndarray, present_P: np.ndarray) -> None:
            for place, value, there in zip(places, value_P.tolist(), present_P.tolist(), strict=True):
                if there:
                    rows[f"{kind}/{place}/{stat}"] = value

        def there(name: str) -> np.ndarray:
            return columns[f"present_{name}"] > 0

        for kind in ("param", "grad", "grad_clipped", "update"):
            if kind in norms:
                put(kind, "norm", norms[kind], there(kind))
                put(kind, "rms", norms[kind] / root_n, there(kind))
                rows[f"{kind}/all/norm"] = float(np.sqrt(columns[f"norm_{kind}"][there(kind)].sum()))
            if f"max_{kind}" in columns:
                put(kind, "abs_max", columns[f"max_{kind}"], there(kind))
                put(kind, "zero_frac", 1 - columns[f"nonzero_{kind}"] / sizes, there(kind))
                put(kind, "nonfinite_count", columns[f"nonfinite_{kind}"], there(kind))
        if "update" in norms and "param" in norms:
            put("update", "ratio", norms["update"] / norms["param"], there("update") & (norms["param"] != 0))
        if "rms_t" in norms and facts is not None:
            rms_t = norms["rms_t"] * np.sqrt(facts.bias2) / root_n
            put("optim", "rms_t", rms_t, there("adam"))
            put("optim", "rms_t_share", rms_t * np.sqrt(1 - facts.beta2), there("adam"))
        if "saturated" in columns:
            put("optim", "saturated_frac", columns["saturated"] / sizes, there("adam"))
            put("optim", "eps_floor_frac", columns["floored"] / sizes, there("adam"))
            put("optim", "first_norm", norms["first"], there("adam"))
            put("optim", "second_root_sum", columns["root_sum"], there("adam"))
        if "dot_previous" in columns:
            lengths = norms["step_grad"] * norms["previous"]
            put("grad", "cosine_previous", columns["dot_previous"] / lengths, there("previous") & (lengths != 0))
        if "dot_descent" in columns:
            lengths = norms["update"] * norms["step_grad"]
            put("update", "cosine_descent", columns["dot_descent"] / lengths, there("step_grad") & (lengths != 0))
        if "grad" in norms:
            _over_median(rows, places, norms["grad"], there("grad"), embeddings)
    return rows


def _over_median(
    rows: dict[str, float], places: Sequence[str], norm_P: np.ndarray, there_P: np.ndarray, embeddings: Sequence[str]
) -> None:
    others = [i for i, place in enumerate(places) if there_P[i] and place not in embeddings]
    if others:
        median = np.median(norm_P[others])
        if median == 0:
            return
        for i, place in enumerate(places):
            if there_P[i] and place in embeddings:
                rows[f"grad/{place}/over_median"] = float(norm_P[i] / median)


def _squares(pieces: Sequence[Tensor]) -> Sequence[Tensor]:
    """Sums of squares: on a GPU from one fused norm; on a CPU a dot product is the fastest reduction there is."""
    if pieces[0].device.type == "cpu":
        return [torch.dot(piece, piece) for piece in pieces]
    norms = torch._foreach_norm(list(pieces), 2)
    return torch._foreach_mul(norms, norms)


def _positive(scratch: list[Tensor]) -> Sequence[Tensor]:
    """How many elements are above 0, as a float; the lists are ours to overwrite."""
    torch._foreach_sign_(scratch)
    torch._foreach_clamp_min_(scratch, 0.0)
    return _totals(scratch)


def _totals(pieces: Sequence[Tensor]) -> Sequence[Tensor]:
    """Sums of numbers that are not negative: on a GPU one fused 1-norm, which on a CPU is 15 times as slow as a sum."""
    if pieces[0].device.type == "cpu":
        return [piece.sum() for piece in pieces]
    return torch._foreach_norm(list(pieces), 1)
