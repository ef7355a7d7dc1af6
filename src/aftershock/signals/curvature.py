"""Curvature of the loss along the step, and the sharpest curvature the optimizer feels, against the edge 2/eta.

Legend: lists of tensors run over the chosen parameters; H is the Hessian of the loss on one fixed batch.
Hessian-vector products come from double backward, or from central differences of the gradient where a kernel has no
second derivative. The model's own tensors are never written to: differences are taken at swapped-in copies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from aftershock.signals.places import parameter_places
from aftershock.signals.ranks import is_sharded
from aftershock.signals.untouched import untouched

Method = Literal["auto", "double_backward", "finite_difference"]

RELATIVE_STEP = 1e-3
"""Central differences move this share of |theta|: near eps^(1/3) of float32, where rounding and truncation balance."""


class NoCurvature(ValueError):
    """The loss is not finite, at the point itself or a step away from it."""


class Curvature(NamedTuple):
    """`value` = curvature, unit loss per (preconditioned) length squared; `edge_share` = value eta / 2, above 1 beyond
    the edge of stability; `momentum_edge_share`: against the edge with momentum; `loss`, `grad_norm` at the point."""

    value: float
    edge_share: float
    momentum_edge_share: float
    loss: float
    grad_norm: float
    method: str


class Sharpness(NamedTuple):
    """Power iteration's `value` (Rayleigh quotient, signed) and `edge_share` = value eta / 2; `residual` = |A x -
    value x| / |value|: how far from an eigenvector; `vector`: unit x, the warm start of the next call."""

    value: float
    edge_share: float
    residual: float
    vector: list[Tensor]
    method: str


def directional_curvature(
    model: nn.Module,
    loss: Callable[[], Tensor],
    *,
    lr: float,
    optimizer: torch.optim.Optimizer | None = None,
    places: str | Sequence[str] = "*",
    method: Method = "auto",
    step: float = RELATIVE_STEP,
) -> Curvature:
    """lambda = u'Hu / u'Du along the step u = D^-1 g, with g the gradient of `loss()`.

    Without `optimizer`: D = 1, so lambda = g'Hg / |g|^2. With an Adam-like one: D = sqrt(v_hat) + eps, which is the
    directional curvature of D^-1/2 H D^-1/2 along D^-1/2 g (arXiv 2506.04805). Gradient descent at rate lr is stable
    below 2/lr; with Adam's beta1 below 2 (1 + beta1) / ((1 - beta1) lr) (Cohen et al. 2022, arXiv 2207.14484).
    `loss()` returns a scalar on a fixed batch and must not call backward; dropout draws the same numbers each time.
    `auto` takes double backward and, where that has no formula, finite differences; `method` says which it was.
    Call it between steps. Nothing of the model changes by a bit, gradients included.
    Cost: one gradient and one double backward, or three gradients; 3 to 6 copies of the parameters in memory.
    Raises ValueError for sharded parameters, for a `loss` that is not a finite scalar, and for an unlike optimizer.
    """
    with _Problem(model, loss, places=places, optimizer=optimizer, method=method, step=step) as problem:
        value, grads = problem.loss_and_grads()
        weights = problem.scale
        along = _over(grads, weights)
        product = problem.hessian_times(along)
        # u'Du = u'g, both with and without a preconditioner.
        curvature = _dot(along, product) / max(_dot(along, grads), 1e-300)
        beta1 = problem.beta1
        edge = curvature * lr / 2
        return Curvature(
            curvature, edge, edge * (1 - beta1) / (1 + beta1), value, _dot(grads, grads) ** 0.5, problem.method
        )


def sharpness(
    model: nn.Module,
    loss: Callable[[], Tensor],
    *,
    lr: float,
    optimizer: torch.optim.Optimizer | None = None,
    places: str | Sequence[str] = "*",
    warm: Sequence[Tensor] | None = None,
    iterations: int = 5,
    method: Method = "auto",
    step: float = RELATIVE_STEP,
) -> Sharpness:
    """The eigenvalue of largest size of D^-1/2 H D^-1/2 (of H without `optimizer`) by power iteration.

    Give the `vector` of the last call as `warm`: the sharpest direction turns slowly, and a few iterations then do. A
    cold start begins at the step's own direction. Where a negative eigenvalue is largest in size, that one comes out.
    Cost: one gradient, and one Hessian-vector product (about 2 or 3 forward and backward passes) per iteration.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    with _Problem(model, loss, places=places, optimizer=optimizer, method=method, step=step) as problem:
        root = None if problem.scale is None else torch._foreach_sqrt(problem.scale)
        start = list(warm) if warm is not None else _over(problem.loss_and_grads()[1], root)
        if [x.shape for x in start] != [p.shape for p in problem.params]:
            raise ValueError(
                f"warm has other shapes than the {len(problem.params)} parameters; start cold at new places"
            )
        x = _unit(start)
        value, image = 0.0, x
        for turn in range(iterations):
            image = _over(problem.hessian_times(_over(x, root)), root)
            value = _dot(x, image)
            if turn + 1 < iterations:
                x = _unit(image)
        away = _dot(image, image) - value**2
        residual = max(away, 0.0) ** 0.5 / max(abs(value), 1e-300)
        return Sharpness(value, value * lr / 2, residual, x, problem.method)


class _Problem:
    """The loss on one batch around one point, evaluated again and again under equal dice."""

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[], Tensor],
        *,
        places: str | Sequence[str],
        optimizer: torch.optim.Optimizer | None,
        method: Method,
        step: float,
    ) -> None:
        chosen = {name: p for name, p in parameter_places(model, places).items() if p.requires_grad}
        if not chosen:
            raise ValueError(f"no parameter at {places!r} needs a gradient")
        if any(is_sharded(p) for p in chosen.values()):
            raise ValueError("curvature of sharded parameters is not measured; probe an unsharded copy of the model")
        if method not in ("auto", "double_backward", "finite_difference"):
            raise ValueError(f"method must be auto, double_backward or finite_difference, got {method!r}")
        self.params = list(chosen.values())
        self.beta1, self.scale = 0.0, None
        if optimizer is not None:
            self.beta1, self.scale = _preconditioner(optimizer, chosen)
        self._loss, self._asked, self._step = loss, method, step
        self.method = "finite_difference" if method == "finite_difference" else "double_backward"
        self._world = untouched(model, evaluate=False)

    def __enter__(self) -> _Problem:
        self._again = self._world.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._world.__exit__(*error)

    def loss_and_grads(self) -> tuple[float, list[Tensor]]:
        value, grads = self._grads(create_graph=False)
        return float(value), grads

    def hessian_times(self, vector: list[Tensor]) -> list[Tensor]:
        if self.method == "double_backward":
            try:
                return self._double_backward(vector)
            except RuntimeError as error:
                if self._asked != "auto" or not _no_formula(error):
                    raise
                self.method = "finite_difference"
        return self._difference(vector)

    def _grads(self, *, create_graph: bool) -> tuple[Tensor, list[Tensor]]:
        self._again()
        with torch.enable_grad():
            value = self._loss()
            if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
                raise ValueError("loss() must return a scalar tensor that depends on the parameters")
            found = torch.autograd.grad(value, self.params, create_graph=create_graph, allow_unused=True)
        value = value.detach()
        if not bool(torch.isfinite(value)):
            raise NoCurvature(f"loss() is {value.item()}: a loss that is not finite has no curvature")
        return value.detach(), [
            torch.zeros_like(p) if g is None else g for p, g in zip(self.params, found, strict=True)
        ]

    def _double_backward(self, vector: list[Tensor]) -> list[Tensor]:
        _, grads = self._grads(create_graph=True)
        live = [(g, v) for g, v in zip(grads, vector, strict=True) if g.requires_grad]
        if not live:
            return [torch.zeros_like(p) for p in self.params]
        found = torch.autograd.grad([g for g, _ in live], self.params, [v for _, v in live], allow_unused=True)
        return [torch.zeros_like(p) if h is None else h for p, h in zip(self.params, found, strict=True)]

    def _difference(self, vector: list[Tensor]) -> list[Tensor]:
        length = _dot(vector, vector) ** 0.5
        if length == 0:
            return [torch.zeros_like(p) for p in self.params]
        here = [p.data for p in self.params]
        amount = self._step * max(_dot(here, here) ** 0.5, 1e-6) / length
        sides = []
        try:
            for sign in (1.0, -1.0):
                for p, data, v in zip(self.params, here, vector, strict=True):
                    p.data = torch.add(data, v.to(data.dtype), alpha=sign * amount)
                sides.append(self._grads(create_graph=False)[1])
        finally:
            # The same tensors as before, never written to: their bits and addresses have not changed.
            for p, data in zip(self.params, here, strict=True):
                p.data = data
        up, down = sides
        return [(a - b) / (2 * amount) for a, b in zip(up, down, strict=True)]


def _preconditioner(optimizer: torch.optim.Optimizer, chosen: dict[str, Tensor]) -> tuple[float, list[Tensor]]:
    """beta1, and D = sqrt(v_hat) + eps per parameter, as the last step used it."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    scale, beta1 = [], 0.0
    for name, p in chosen.items():
        state, group = optimizer.state.get(p, {}), groups.get(id(p), {})
        if not ({"exp_avg_sq", "step"} <= state.keys() and {"betas", "eps"} <= group.keys()):
            raise ValueError(
                f"{type(optimizer).__name__} has no second moment of {name}: precondition with an Adam-like optimizer "
                "that has taken a step, or leave optimizer out"
            )
        beta1, beta2 = (float(beta) for beta in group["betas"])
        v = state.get("max_exp_avg_sq", state["exp_avg_sq"]).detach()
        scale.append((v / (1 - beta2 ** float(state["step"]))).sqrt_().add_(float(group["eps"])))
    return beta1, scale


def _over(x: Sequence[Tensor], root: Sequence[Tensor] | None) -> list[Tensor]:
    return list(x) if root is None else list(torch._foreach_div(list(x), list(root)))


def _unit(x: Sequence[Tensor]) -> list[Tensor]:
    length = _dot(x, x) ** 0.5
    if not 0 < length < float("inf"):
        raise ValueError(f"a start vector of length {length} has no direction; the gradient is zero or not finite here")
    return [piece / length for piece in x]


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """In float64: curvature is a small difference of large sums near the edge."""
    return float(sum((x.detach().double() * y.detach().double()).sum() for x, y in zip(a, b, strict=True)))


def _no_formula(error: RuntimeError) -> bool:
    """Torch's words for a kernel without a second derivative, and for a Function marked once_differentiable."""
    text = str(error)
    return "not implemented" in text or "once_differentiable" in text or "does not require grad" in text
