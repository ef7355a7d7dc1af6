"""The tap on an optimizer: every step's per-tensor statistics, from hooks that live only inside a `with`.

Legend: P places, C columns.
The tap reads; it writes to nothing that trains. What it can not measure it says once, in `notes`, and goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn

from aftershock.signals import tensors
from aftershock.signals.pieces import Cut
from aftershock.signals.places import Notes, match, parameter_places, plain_name
from aftershock.signals.ranks import is_sharded, local, meet, sharding
from aftershock.signals.reader import Carrier, Measured
from aftershock.signals.tensors import CHEAP, STATS, AdamFacts, Stat

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class _Sent(NamedTuple):
    """What the host knows of a step whose numbers are under way."""

    names: list[str]
    present: dict[str, np.ndarray]
    facts: AdamFacts | None


class TensorTap:
    """Measures parameters, gradients, updates and Adam's moments, step by step, without changing a bit of training.

    - `places`: fnmatch patterns over parameter names. Left out, with a note: what needs no gradient, and what the
      optimizer does not hold
    - `stats`: which groups to measure. "param", "grad", "update", "rms_t" are the default; "grad_clipped" adds the
      gradient as the optimizer gets it, "moments" the shares of saturated elements and of v at the eps floor,
      "cosines" successive gradients and descent, "elements" abs max, zeros and non-finite counts. The formulas stand
      in `tensors.statistics`
    - `gradients`: "backward" measures them at the end of every backward pass, before anything can clip them; "call"
      leaves it to `measure_gradients()`: needed with FSDP2, right with a GradScaler (after `unscale_`), and cheaper
      with accumulation
    - `every`: measure steps divisible by it
    - `embeddings`: patterns of the parameters to set against the median place; by default those of nn.Embedding
    - `group`: the processes that hold pieces of the same DTensors; by default all

    Cost per measured step with the default groups: six reads and one write of the parameters' size, and one copy of
    the parameters in memory for "update"; "cosines" keeps a copy of the gradients.

    Example:
        with TensorTap(model, optimizer) as tap:
            for batch in batches:
                loss(model, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
                for step, values in tap.read():  # of the steps before
                    run.stats(step, list(values), np.array(list(values.values())))
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        places: str | Sequence[str] = "*",
        stats: Iterable[Stat] = CHEAP,
        gradients: Literal["backward", "call"] = "backward",
        every: int = 1,
        first_step: int = 0,
        embeddings: str | Sequence[str] | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError(
                f"TensorTap needs a torch.optim.Optimizer, got {type(optimizer).__name__}; pass the inner one"
            )
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.notes, self.step = Notes(), first_step
        self._stats = frozenset(stats)
        unknown = sorted(self._stats - set(STATS))
        if unknown:
            match(unknown, STATS, what="group of statistics")
        self._optimizer, self._every, self._mode = optimizer, every, gradients
        self._params = self._choose(model, places)
        self._embeddings = _embeddings(model, self._params, embeddings)
        self._sizes = np.array([p.numel() for p in self._params.values()], dtype=np.float64)
        self._shares = sharding(self._params, group=group)
        if self._shares.group is not None and gradients == "backward" and self._stats & {"grad", "elements"}:
            raise ValueError(
                "the parameters are sharded, and FSDP2 fills gradients where hooks do not see it; pass "
                "gradients='call' "
                "and call measure_gradients() between backward and clipping"
            )
        self._cut = Cut([local(p).numel() for p in self._params.values()], _device(self._params))
        self._carrier = Carrier[_Sent](self._rows)
        self._forget()
        self._counted = 0
        self._graph_task = -1

    def __enter__(self) -> Self:
        handles = self._carrier.open("TensorTap")
        self._count_again()
        handles += [
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
            self._optimizer.register_load_state_dict_post_hook(self._count_again),
        ]
        if self._mode == "backward" and self._stats & {"grad", "elements"}:
            handles += [p.register_post_accumulate_grad_hook(self._queue) for p in self._params.values()]
        return self

    def __exit__(self, *_: object) -> None:
        self._carrier.close()
        self._forget()

    def read(self, *, wait: bool = False) -> list[Measured]:
        """The steps that have come through since the last call, oldest first; the newest step is still under way.

        Never waits for a GPU unless `wait` is set (see `LateReader.ready`). After the `with`, everything is there.
        """
        return self._carrier.read(wait=wait)

    @torch.no_grad()
    def measure_gradients(self) -> None:
        """Measure the gradients as they are now: call it between backward and clipping. A later call replaces it."""
        if not self._due():
            return
        grads = self._grads()
        found: dict[str, Tensor] = {}
        if "grad" in self._stats:
            found |= tensors.norm_columns(self._cut, grads, name="grad")
        if "elements" in self._stats:
            found |= tensors.element_columns(self._cut, grads, name="grad")
        self._grad_columns = found
        self._grad_present = _present(grads)

    def rewind(self, step: int) -> None:
        """Go on counting from `step`, after weights and optimizer went back to it; the last gradient is forgotten."""
        self.step = step
        self._forget()

    def _due(self) -> bool:
        return self.step % self._every == 0

    def _forget(self) -> None:
        self._grad_columns: dict[str, Tensor] | None = None
        self._grad_present = np.zeros(0)
        self._columns: dict[str, Tensor] = {}
        self._before: list[Tensor] = []
        self._previous: list[Tensor | None] = [None] * len(self._params)

    def _choose(self, model: nn.Module, places: str | Sequence[str]) -> dict[str, Tensor]:
        chosen = parameter_places(model, places)
        held = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        frozen = [name for name, p in chosen.items() if not p.requires_grad]
        foreign = [name for name, p in chosen.items() if p.requires_grad and id(p) not in held]
        for names, why in ((frozen, "need no gradient"), (foreign, "are not in the optimizer")):
            if names:
                self.notes.say(why, f"not measured, because they {why}: {_listed(names)}")
        left = {name: p for name, p in chosen.items() if p.requires_grad and id(p) in held}
        if not left:
            raise ValueError(f"nothing to measure at {places!r}: {'; '.join(self.notes.sentences)}")
        return left

    def _grads(self) -> list[Tensor | None]:
        grads = [_dense(p) for p in self._params.values()]
        sparse = [name for name, p in self._params.items() if p.grad is not None and p.grad.is_sparse]
        if sparse:
            self.notes.say("sparse", f"not measured, because their gradients are sparse: {_listed(sparse)}")
        missing = [name for name, grad in zip(self._params, grads, strict=True) if grad is None]
        if missing:
            self.notes.say(
                f"no gradient {missing}",
                f"no gradient at step {self.step}, so no rows about it there: {_listed(missing)}",
            )
        return grads

    def _queue(self, _: Tensor) -> None:
        """Once per backward pass: measure at its end, after whatever others (DDP) left to do until then."""
        task = torch._C._current_graph_task_id()
        if task != self._graph_task:
            self._graph_task = task
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(lambda: engine.queue_callback(self.measure_gradients))

    @torch.no_grad()
    def _before_step(self, *_: Any) -> None:
        self._columns = {}
        if not self._due():
            return
        weights, found = [local(p) for p in self._params.values()], {}
        if self._stats & {"update", "cosines", "elements"}:
            if not self._before:
                self._before = [_empty_copy(w) for w in weights]
            found = tensors.copy_columns(self._cut, self._before, weights, name="param")
        elif "param" in self._stats:
            found = tensors.norm_columns(self._cut, weights, name="param")
        if self._stats & {"param", "update"}:
            self._columns |= found
        if "elements" in self._stats:
            self._columns |= tensors.element_columns(self._cut, weights, name="param")

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        if self._due():
            self._measure_step()
        self._grad_columns = None
        self.step += 1
        self._counted += 1

    def _measure_step(self) -> None:
        cut, stats, columns = self._cut, self._stats, self._columns
        grads, weights = self._grads(), [local(p) for p in self._params.values()]
        everywhere = np.ones(len(weights))
        present = {"param": everywhere, "update": everywhere, "step_grad": _present(grads)}
        if self._grad_columns is not None:
            columns |= self._grad_columns
            present["grad"] = self._grad_present
        elif stats & {"grad", "elements"}:
            self.notes.say("no call", f"step {self.step} came without measure_gradients(), so it has no grad rows")
        if stats & {"grad_clipped", "cosines"}:
            columns |= tensors.norm_columns(cut, grads, name="step_grad")
        if "grad_clipped" in stats:
            columns["norm_grad_clipped"] = columns["norm_step_grad"]
            present["grad_clipped"] = present["step_grad"]
        if stats & {"update", "cosines", "elements"}:
            keep = bool(stats & {"cosines", "elements"})
            columns |= tensors.update_columns(cut, self._before, weights, keep=keep)
            if "elements" in stats:
                columns |= tensors.element_columns(cut, self._before, name="update")
        if "cosines" in stats:
            columns |= tensors.dot_columns(cut, self._before, grads, name="descent")
            columns |= tensors.dot_columns(cut, grads, self._previous, name="previous")
            columns |= tensors.norm_columns(cut, self._previous, name="previous")
            both = [None if a is None else b for a, b in zip(grads, self._previous, strict=True)]
            present["previous"] = _present(both)
            self._previous = [_kept(old, new) for old, new in zip(self._previous, grads, strict=True)]
        facts = self._adam(grads, columns, present)
        names = list(columns)
        if not names:
            return
        packed = torch.stack([columns[name] for name in names], dim=1)
        how = ["max" if name.startswith("max_") else "sum" for name in names]
        self._carrier.send(self.step, meet(packed, how, self._shares), _Sent(names, present, facts))

    def _adam(
        self, grads: list[Tensor | None], columns: dict[str, Tensor], present: dict[str, np.ndarray]
    ) -> AdamFacts | None:
        if not self._stats & {"rms_t", "moments"}:
            return None
        groups = {id(p): group for group in self._optimizer.param_groups for p in group["params"]}
        first: list[Tensor | None] = []
        second: list[Tensor | None] = []
        rows: list[tuple[float, float, float, float]] = []
        for p, grad in zip(self._params.values(), grads, strict=True):
            state, group = self._optimizer.state.get(p, {}), groups[id(p)]
            like_adam = {"exp_avg", "exp_avg_sq"} <= state.keys() and {"betas", "eps"} <= group.keys()
            ours = like_adam and grad is not None
            key = "max_exp_avg_sq" if "max_exp_avg_sq" in state else "exp_avg_sq"
            first.append(local(state["exp_avg"]) if ours else None)
            second.append(local(state[key]) if ours else None)
            rows.append(self._adam_row(state, group) if ours else (0.0, 0.0, 1.0, 1.0))
        strange = [n for n, m, g in zip(self._params, first, grads, strict=True) if m is None and g is not None]
        if strange:
            self.notes.say(
                "not like Adam",
                f"{type(self._optimizer).__name__} keeps no exp_avg and exp_avg_sq, so no optim rows: "
                f"{_listed(strange)}",
            )
        facts = AdamFacts(*np.array(rows).T)
        present["adam"] = _present(first)
        if present["adam"].any():
            if "rms_t" in self._stats:
                seen = [g if m is not None else None for g, m in zip(grads, first, strict=True)]
                columns |= tensors.rms_t_columns(self._cut, seen, second, facts)
            if "moments" in self._stats:
                columns |= tensors.moment_columns(self._cut, first, second, facts)
        return facts

    def _adam_row(self, state: dict[str, Any], group: dict[str, Any]) -> tuple[float, float, float, float]:
        beta1, beta2 = (float(beta) for beta in group["betas"])
        taken = state.get("step", self._counted + 1)
        if isinstance(taken, Tensor):
            # Fused and capturable optimizers count on the device; reading it would wait for the step.
            taken = float(taken) if taken.device.type == "cpu" else self._counted + 1
        return float(group["eps"]), beta2, 1 - beta1**taken, 1 - beta2**taken

    def _count_again(self, *_: Any) -> None:
        """Steps the optimizer has taken, as its state says: read at the start and after a load, outside of any step."""
        taken = [state["step"] for state in self._optimizer.state.values() if "step" in state]
        self._counted = int(max((float(one) for one in taken), default=0.0))

    def _rows(self, sent: _Sent, values_PC: np.ndarray) -> dict[str, float]:
        columns = dict(zip(sent.names, values_PC.T, strict=True))
        columns |= {f"present_{name}": mask for name, mask in sent.present.items()}
        return tensors.statistics(
            columns, places=list(self._params), sizes=self._sizes, facts=sent.facts, embeddings=self._embeddings
        )


def _embeddings(model: nn.Module, params: dict[str, Tensor], patterns: str | Sequence[str] | None) -> list[str]:
    if patterns is not None:
        return match(patterns, params, what="measured parameter")
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return [plain_name(name) for name, p in params.items() if id(p) in tables]


def _device(params: dict[str, Tensor]) -> torch.device:
    devices = sorted({str(local(p).device) for p in params.values()})
    if len(devices) > 1:
        raise ValueError(
            f"the places lie on {' and '.join(devices)}; open one tap per device, each with its own pattern"
        )
    return torch.device(devices[0])


def _dense(p: Tensor) -> Tensor | None:
    if p.grad is None or p.grad.is_sparse:
        return None
    assert is_sharded(p) == is_sharded(p.grad), "a gradient lies as its parameter does"
    return local(p.grad)


def _present(tensors_P: Sequence[Tensor | None]) -> np.ndarray:
    return np.array([float(t is not None) for t in tensors_P])


def _empty_copy(like: Tensor) -> Tensor:
    dtype = like.dtype if like.dtype == torch.float64 else torch.float32
    return torch.empty(like.shape, dtype=dtype, device=like.device)


def _kept(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    """The gradient to compare with next time; one that is absent today does not make yesterday's successive."""
    if new is None:
        return None
    return new.clone() if old is None else old.copy_(new)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
