"""Gradient and update norms of every place of a model, step by step in a replay: tensors, layers, attention heads.

Legend: T steps, K kinds (gradient, update), P places, N pieces, H heads.
Must not import the runner or the lab, nor judge what it measures.
"""

from __future__ import annotations

import math
import mmap
import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from aftershock.guard.policies.qk_clip import probed
from aftershock.replay.edits.architecture import FUSED, KEY, QUERY
from aftershock.replay.edits.checked import first_part
from aftershock.replay.edits.places import modules_of
from aftershock.replay.run import Edit, Run
from aftershock.replay.subject import Subject
from aftershock.signals.places import parameter_places, plain_name

Level = Literal["model", "layer", "tensor", "head"]
Kind = Literal["gradient", "update"]
KINDS: tuple[Kind, ...] = ("gradient", "update")
"""Axis K: the gradient's norm before clipping; the norm of the weights' change over that of the weights before it."""

VALUE = r"v(_?proj|_?lin|alue)?|value|to_v|wv"
"""Names of the layers that make values, beside those of `edits.architecture`."""
TINY = 1e-30
"""What the norm of weights that are all 0 counts as."""


class Piece(NamedTuple):
    """Of the parameter `name` the `size` rows from `start` on along `axis`; -1 is the whole of it."""

    name: str
    axis: int = 0
    start: int = 0
    size: int = -1


class Place(NamedTuple):
    """Somewhere in the model; its norm is that of all its pieces together."""

    name: str
    level: Level
    pieces: tuple[Piece, ...]


def places_of(subject: Subject) -> list[Place]:
    """All places of a subject's model that are trained: the whole, layers, tensors and heads, in the model's order.

    - layers: what has the same name down to its first number ("blocks.3"), else the same module
    - heads ("blocks.3.attn.head0"): rows of the query, key and value layers, found by their names; their number by a
      forward pass of the suspect snapshot's batch through the attention modules. A key head that query heads share
      (GQA) belongs to each of them. None where the names or the softmax cannot be seen

    The workload stands at the snapshot afterwards. Raises ValueError when nothing is trained.
    """
    model = subject.workload.model
    trained = {name: p for name, p in parameter_places(model).items() if p.requires_grad}
    if not trained:
        raise ValueError("no parameter of the model is trained (requires_grad), so none can have moved first")
    subject.restore()
    heads = _heads(subject.run(), trained)
    subject.restore()
    layers: dict[str, list[Piece]] = {}
    for name in trained:
        layers.setdefault(layer_of(name), []).append(Piece(name))
    return [
        Place("model", "model", tuple(Piece(name) for name in trained)),
        *(Place(name, "layer", tuple(pieces)) for name, pieces in layers.items()),
        *(Place(name, "tensor", (Piece(name),)) for name in trained),
        *(Place(name, "head", tuple(pieces)) for name, pieces in heads.items()),
    ]


def layer_of(name: str) -> str:
    """The layer that a parameter belongs to.

    >>> layer_of("blocks.3.attn.out.weight"), layer_of("embed.weight"), layer_of("scale")
    ('blocks.3', 'embed', 'scale')
    """
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return ".".join(parts[:-1] if number is None else parts[: number + 1]) or name


class Recorded(Edit):
    """Another edit, from the snapshot on, with the norms of every step written into `norms_TKP` beside it.

    Every replay needs a `norms_TKP` of its own, row 0 being the snapshot's step; in memory that a worker shares
    (`shared`). Cost: a copy of the weights, and norms of gradients, weights and changes, each step.
    """

    def __init__(self, edit: Edit, places: Sequence[Place], norms_TKP: np.ndarray) -> None:
        self._edit, self._norms_TKP = edit, norms_TKP
        index = {piece: n for n, piece in enumerate(dict.fromkeys(p for place in places for p in place.pieces))}
        self._pieces = list(index)
        self._members = [index[piece] for place in places for piece in place.pieces]
        self._starts = np.cumsum([0, *(len(place.pieces) for place in places)])[:-1]

    def apply(self, run: Run) -> None:
        self._edit.apply(run)
        params = parameter_places(run.workload.model)
        before: dict[str, Tensor] = {}

        def read_gradients(step: int) -> None:
            before.update({name: p.detach().clone() for name, p in params.items()})
            grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in params.items()}
            self._norms_TKP[step - run.window.start, 0] = self._norms(grads)

        def read_updates(step: int) -> None:
            weights = self._norms(before)
            changes = self._norms({name: p.detach() - before[name] for name, p in params.items()})
            self._norms_TKP[step - run.window.start, 1] = changes / np.maximum(weights, TINY)

        run.after_backward.append(read_gradients)
        run.after_step.append(read_updates)

    def _norms(self, tensors: Mapping[str, Tensor]) -> np.ndarray:
        """[P], in float32 at least."""
        views = [_view(tensors[piece.name], piece) for piece in self._pieces]
        wide = [v if v.dtype in (torch.float32, torch.float64) else v.float() for v in views]
        norms = [norm.to(torch.float64) for norm in torch._foreach_norm(wide)]
        norms_N = torch.stack([norm.to(norms[0].device) for norm in norms]).cpu().numpy()
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is judged by who reads it
            return np.sqrt(np.add.reduceat(norms_N[self._members] ** 2, self._starts))


def shared(shape: tuple[int, ...]) -> np.ndarray:
    """Zeros, float64, that a forked worker can fill for this process to read."""
    return np.frombuffer(mmap.mmap(-1, 8 * math.prod(shape)), dtype=np.float64).reshape(shape)


def _view(tensor: Tensor, piece: Piece) -> Tensor:
    whole = tensor.detach()
    return whole if piece.size < 0 else whole.narrow(piece.axis, piece.start, piece.size)


# --------------------------------------------------------------------------------------------------------- heads


_NAMED = re.compile(r"(?:.*\.)?(?P<layer>[^.]+)[._](?:weight|bias)")


def _heads(run: Run, trained: Mapping[str, Tensor]) -> dict[str, list[Piece]]:
    """By head, "<attention>.head<h>", its rows of what makes queries, keys and values."""
    model, batch = run.workload.model, first_part(run)
    try:
        tops = probed(model, lambda: run.loss(model, batch), list(modules_of(model, "attention")))()
    except ValueError:  # no module is called an attention, or one runs no softmax that can be seen
        return {}
    turned = _turned(model)
    found: dict[str, list[Piece]] = {}
    for place, top_H in tops.items():
        if len(top_H) < 2:
            continue
        inside = {name: p for name, p in trained.items() if name.startswith(f"{place}.")}
        axes = {name: 1 if name in turned else 0 for name in inside}
        sizes = {name: p.shape[axes[name]] for name, p in inside.items() if p.ndim}
        for name, rows_H in _rows(sizes, num_heads=len(top_H)).items():
            for h, rows in enumerate(rows_H):
                pieces = found.setdefault(f"{place}.head{h}", [])
                pieces += [Piece(name, axes[name], start, size) for start, size in rows]
    return found


def _rows(sizes: Mapping[str, int], *, num_heads: int) -> dict[str, list[list[tuple[int, int]]]]:
    """By parameter and head [H] the (start, size) of its rows, of the parameters of one attention module."""
    layers = {name: match["layer"] for name in sizes if (match := _NAMED.fullmatch(name)) is not None}
    found: dict[str, list[list[tuple[int, int]]]] = {}
    width = 0
    for name, layer in layers.items():
        count = next((count for pattern, count in (FUSED | {QUERY: 1}).items() if _is(layer, pattern)), 0)
        if count and sizes[name] % (count * num_heads) == 0:
            width = sizes[name] // count // num_heads
            found[name] = [[((part * num_heads + h) * width, width) for part in range(count)] for h in range(num_heads)]
    for name, layer in layers.items():
        if name in found or not width or not _is(layer, f"{KEY}|{VALUE}"):
            continue
        key_heads, left = divmod(sizes[name], width)
        if key_heads and not left and num_heads % key_heads == 0:
            found[name] = [[(h * key_heads // num_heads * width, width)] for h in range(num_heads)]
    return found


def _is(layer: str, pattern: str) -> bool:
    return re.fullmatch(pattern, layer, re.IGNORECASE) is not None


def _turned(model: nn.Module) -> set[str]:
    """Weights [in, out], as in GPT-2: their rows are the second axis."""
    turned = {name for name, module in model.named_modules() if type(module).__name__ == "Conv1D"}
    return {plain_name(f"{name}.weight") for name in turned}
