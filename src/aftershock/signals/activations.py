"""What comes out of named modules in the forward passes of a step: size, tails, and log Z where it is logits.

Legend: P places, C columns, N positions, V vocabulary.
Numbers are made on the device where the output is, combined over the forward passes of a step (accumulation), and read
one step late. The hooks live only inside a `with`, return nothing and keep no tensor of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from aftershock.signals.places import Notes, module_places
from aftershock.signals.ranks import Sharding, meet
from aftershock.signals.reader import Carrier, Measured

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OUTPUT_STATS = ("abs_max", "square_mean", "abs_mean", "zero_frac", "nonfinite_count", "kurtosis")
LOGIT_STATS = ("log_z", "log_z_sq", "abs_log_z", "mean_logit")


def output_columns(x: Tensor) -> Tensor:
    """`OUTPUT_STATS` of one tensor, float32 or better: shape [6].

    abs_max = max |x|; square_mean = mean(x^2); abs_mean = mean |x|; zero_frac = share of zeros; nonfinite_count;
    kurtosis = mean((x - mean)^4) / mean((x - mean)^2)^2: 3 for a normal, n when one of n elements carries it all.
    Cost: about ten elementwise passes over x, in scratch of x's size; no synchronisation.
    """
    x = x.detach().flatten()
    x = x if x.dtype == torch.float64 else x.float()
    var, mean = torch.var_mean(x, correction=0)
    fourth = (x - mean).square_().square_().mean()
    size, finite = x.abs(), torch.isfinite(x)
    return torch.stack(
        [
            size.amax(),
            x.square().mean(),
            size.mean(),
            (x == 0).to(x.dtype).mean(),
            (~finite).sum().to(x.dtype),
            fourth / var.square(),
        ]
    )


def logit_columns(logits_NV: Tensor) -> Tensor:
    """`LOGIT_STATS` of logits over their last axis, means over all positions, padding included; shape [4].

    log_z = mean(log Z) with log Z = logsumexp(logits); log_z_sq = mean((log Z)^2), abs_log_z = mean |log Z|;
    mean_logit = mean over positions and vocabulary (Chowdhery et al. 2022, section 5; Wortsman et al. 2023, 3.1.2).
    Cost: three passes over the logits.
    """
    logits_NV = logits_NV.detach()
    logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    log_z_N = logits_NV.logsumexp(-1)
    return torch.stack([log_z_N.mean(), log_z_N.square().mean(), log_z_N.abs().mean(), logits_NV.mean()])


class ActivationTap:
    """Measures the outputs of the modules that match `places`, and log Z at those that match `logits`.

    - a step ends with `optimizer.step()` where `optimizer` is given, else with `end_step()`
    - over several forward passes of a step, and over the ranks of `group`: the maximum of abs_max, the sum of
      nonfinite_count, the mean of everything else (of square_mean; rms is its root)
    - `every`: measure steps divisible by it; the other steps cost one comparison a hook
    - `group`: reduce over these processes with one all-gather a step; without it, each rank has its own numbers

    A module that gives no float tensor first is left out with a note. Signals: `output/<place>/<stat>`, and `rms`.

    Example:
        with ActivationTap(model, "blocks.*.mlp", logits="head", optimizer=optimizer) as tap:
            train_step()
            tap.read()
    """

    def __init__(
        self,
        model: nn.Module,
        places: str | Sequence[str] = (),
        *,
        logits: str | Sequence[str] = (),
        optimizer: torch.optim.Optimizer | None = None,
        every: int = 1,
        first_step: int = 0,
        group: ProcessGroup | None = None,
    ) -> None:
        if not places and not logits:
            raise ValueError("ActivationTap got neither places nor logits; name the modules to measure")
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.notes, self.step = Notes(), first_step
        self._outputs = module_places(model, places) if places else {}
        self._logits = module_places(model, logits) if logits else {}
        self._optimizer, self._every, self._group = optimizer, every, group
        self._found: dict[tuple[str, str], list[Tensor]] = {}
        self._carrier = Carrier[list[tuple[str, str]]](_rows)
        self._paused = False

    def __enter__(self) -> Self:
        handles = self._carrier.open("ActivationTap")
        for stats, modules in (("output", self._outputs), ("logits", self._logits)):
            for place, module in modules.items():
                handles.append(module.register_forward_hook(self._hook(stats, place)))
        if self._optimizer is not None:
            handles.append(self._optimizer.register_step_post_hook(lambda *_: self.end_step()))
        return self

    def __exit__(self, *_: object) -> None:
        self._carrier.close()
        self._found = {}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, nothing is measured: for probes, evaluations and other forward passes that are not the step's."""
        was, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = was

    @torch.no_grad()
    def end_step(self) -> None:
        """Send the step's numbers on their way. A step without a forward pass has no rows."""
        if self.step % self._every == 0 and self._found:
            # All ranks of a group run the same modules, so their keys agree.
            keys = sorted(self._found)
            packed_PC = torch.stack([_combined(self._found[key]) for key in keys])
            if self._group is not None:
                mine_P = torch.ones(len(keys), dtype=torch.bool, device=packed_PC.device)
                packed_PC = meet(packed_PC, ["sum"] * 7 + ["max"], Sharding(mine_P, self._group))
            self._carrier.send(self.step, packed_PC, keys)
        self._found = {}
        self.step += 1

    def read(self, *, wait: bool = False) -> list[Measured]:
        """The steps that have come through since the last call; the newest is still under way (see `LateReader`)."""
        return self._carrier.read(wait=wait)

    def rewind(self, step: int) -> None:
        """Go on counting from `step`; what the present step has seen so far is dropped."""
        self.step, self._found = step, {}

    def _hook(self, stats: str, place: str) -> Any:
        columns = output_columns if stats == "output" else logit_columns

        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if self._paused or self.step % self._every:
                return
            x = next(_float_tensors(output), None)
            if x is None or not x.numel():
                self.notes.say(place, f"{place} gives {type(output).__name__} without a float tensor; not measured")
                return
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                self._found.setdefault((stats, place), []).append(columns(x))

        return hook


def _combined(calls: list[Tensor]) -> Tensor:
    """[8]: how many calls, then six sums (logits need four of them), then the largest first column."""
    all_calls = torch.stack(calls).double()
    sums = all_calls.sum(0)
    out = all_calls.new_zeros(8)
    out[0] = len(calls)
    out[1 : 1 + sums.numel()] = sums
    out[7] = all_calls[:, 0].abs().amax()
    return out


def _rows(keys: list[tuple[str, str]], values_PC: np.ndarray) -> dict[str, float]:
    rows: dict[str, float] = {}
    for (stats, place), (calls, *sums, top) in zip(keys, values_PC.tolist(), strict=True):
        names = OUTPUT_STATS if stats == "output" else LOGIT_STATS
        means = {name: total / calls for name, total in zip(names, sums, strict=False)}
        if stats == "output":
            means |= {"abs_max": top, "nonfinite_count": sums[4]}
            means["rms"] = means["square_mean"] ** 0.5
        rows |= {f"output/{place}/{name}": value for name, value in means.items()}
    return rows


def _float_tensors(output: Any) -> Iterator[Tensor]:
    """The float tensors in a module's output, in order, through tuples, lists and mappings (transformers' outputs)."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _float_tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _float_tensors(value)
