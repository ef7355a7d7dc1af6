"""Snapshots on disk: one folder each, written whole or not at all, checked when read.

    <folder>/snap-<serial>-step-<step>/
        complete.json                        what belongs here, with sizes and SHA-256; written last
        rank-<r>.json  rank-<r>.safetensors  the plain rest and the tensors of each rank; equal ones only with rank 0
        pieces/                              sharded tensors, by torch.distributed.checkpoint; any world size reads them

A folder counts once it has lost its `.tmp` name. One run writes a folder at a time. With several processes all of them
call each function here, with one shared file system, unless `alone`. Must not import the recorder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aftershock.guard.pieces import HostPiece, read_pieces, write_pieces
from aftershock.guard.shelf import (
    PIECES,
    begin,
    choose,
    digest,
    finish,
    manifest,
    rotate,
    sync,
    to_json,
)
from aftershock.guard.state import Kept, State, StepRow, Training
from aftershock.guard.team import Team
from aftershock.guard.tree import decode, encode, join, refs
from aftershock.store.folder import SCHEMA, disk_errors, plain
from aftershock.store.snapshots import as_os_error

_log = logging.getLogger("aftershock.guard")


class Snapshot(NamedTuple):
    """One moment of a run: where it stood, its state, the log up to then or later, and the batches at hand by id.

    `guard`: the guard's own state, `{"guard": ...}` as `split` gives it; None where none was written.
    """

    at: Kept
    state: State
    rows: tuple[StepRow, ...]
    batches: Mapping[int, State]
    guard: State | None = None

    def batch(self, batch_id: int) -> Any:
        """A copy of one batch, its tensors on the CPU. Raises KeyError when it is not here."""
        kept = self.batches[batch_id]
        return join(kept.plain["batch"], kept.tensors, host=True)


def write_snapshot(folder: Path, snapshot: Snapshot, *, keep: int = 3, alone: bool = False) -> Path:
    """Write `snapshot` into a folder of its own below `folder`; gives its path once all of it is on the disk.

    Then goes what is older than the newest `keep` steps, and what is of a later step: a branch that was rewound (see
    `shelf.rotate`). The snapshot just written always stays. A batch that JSON and tensors cannot express is left out,
    and the log says so. `alone`: only this process writes, its own state only; impossible when the model is sharded.
    Raises OSError, on every rank, when one could not write: what was there before is as it was. Raises ValueError for
    state that is neither tensor nor plain.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}; at least the snapshot just written is kept: give 1 or more")
    team = Team(alone=alone)
    name = team.first(lambda: begin(folder, snapshot.at.step))
    tmp = folder / f"{name}.tmp"
    try:
        part = team.own(lambda: _part(snapshot, team))
        # Every rank holds the same under DDP: what equals rank 0's is not written again.
        if team.size > 1:
            theirs = team.first(lambda: _digests(part.tensors))
            team.each(lambda: part.leave_out(theirs) if team.rank else None)
        team.each(lambda: _write_part(tmp, part, team.rank))
        if any(team.each(lambda: bool(part.pieces))):
            team.each(lambda: write_pieces(tmp / PIECES, part.pieces, None))
        files = {k: v for mine in team.each(lambda: _files(tmp, team.rank)) for k, v in mine.items()}
        body = {"schema": SCHEMA, "step": snapshot.at.step, "batch_id": snapshot.at.batch_id, "world": team.size}
        team.first(lambda: finish(tmp, body | {"files": files}))
    except BaseException:
        if team.rank == 0:
            shutil.rmtree(tmp, ignore_errors=True)
        raise
    team.first(lambda: rotate(folder, step=snapshot.at.step, keep=keep))
    return folder / name


def load_snapshot(path: str | Path) -> Snapshot:
    """One snapshot as rank 0 wrote it, on this process alone: `path` is its folder, or the one above, for the newest
    that verifies.

    Raises ValueError, in a sentence, when it is damaged or half written, or when its tensors are sharded: those can
    only be restored into a sharded model, with `restore_from`.
    """
    found = choose(Path(path), Team(alone=True))
    snapshot = _read_part(found, 0)
    if any(ref.piece for ref in refs(snapshot.state.plain)):
        raise ValueError(f"{found} holds a sharded model; restore it into one with restore_from, on all processes")
    return snapshot


def load_own(path: Path, rank: int) -> dict[str, Any] | None:
    """What the guard of `rank` wrote of itself into a snapshot that is intact; None when it wrote nothing."""
    own = _read_part(path, rank).guard
    return None if own is None else join(own.plain["guard"], own.tensors, host=True)


def restore_from(path: str | Path, training: Training, *, rng: bool = True, alone: bool = False) -> Kept:
    """Make `training` what it was in the snapshot at `path`, or in the newest below `path` that verifies.

    With `rng` the random numbers of this rank go back too, which another number of processes cannot have.
    Raises ValueError, on every rank, when there is no snapshot, it is damaged, or of another run.
    """
    team = Team(alone=alone)
    found = choose(Path(path), team)
    world = manifest(found)["world"]
    if rng and world != team.size:
        raise ValueError(f"{found}: written by {world} processes, here are {team.size}; random numbers need rng=False")
    snapshot = _read(found, training, team)
    restore(snapshot, training, rng=rng, alone=alone)
    return snapshot.at


def restore(snapshot: Snapshot, training: Training, *, rng: bool, alone: bool = False) -> None:
    """Make `training` what it was in what `read_snapshot` gave. Raises ValueError, on every rank, if it cannot."""
    team = Team(alone=alone)
    team.each(lambda: training.check(snapshot.state, rng=rng))
    team.each(lambda: training.restore(snapshot.state, rng=rng))


def read_snapshot(path: str | Path, training: Training, *, alone: bool = False) -> Snapshot:
    """The snapshot at `path`, or the newest below it that verifies, with sharded tensors as `training` lays them out.

    Raises ValueError, on every rank, when there is none or it is damaged.
    """
    team = Team(alone=alone)
    return _read(choose(Path(path), team), training, team)


@dataclass(kw_only=True)
class _Part:
    """What one rank writes. `elsewhere` names tensors that are read from rank 0's file."""

    rest: dict[str, Any]
    tensors: dict[str, Tensor]
    pieces: dict[str, HostPiece]
    elsewhere: list[str]

    def leave_out(self, theirs: Mapping[str, str]) -> None:
        own = _digests(self.tensors)
        self.elsewhere = [name for name in own if own[name] == theirs.get(name)]
        for name in self.elsewhere:
            del self.tensors[name]


def _part(snapshot: Snapshot, team: Team) -> _Part:
    state = snapshot.state
    sharded = {ref.name: ref.piece for ref in refs(state.plain) if ref.piece is not None}
    if sharded and team.size < Team(alone=False).size:
        raise ValueError("a sharded state cannot be written by one process alone; call this on all of them")
    tensors = {name: tensor for name, tensor in state.tensors.items() if name not in sharded}
    batches: dict[str, Any] = {}
    for batch_id, kept in snapshot.batches.items():
        try:
            batches[str(batch_id)] = encode(kept.plain["batch"], f"batch {batch_id}")
        except ValueError as error:
            _log.warning("left out of the snapshot of step %d: %s", snapshot.at.step, error)
            continue
        tensors |= {f"batch:{batch_id}:{name}": tensor for name, tensor in kept.tensors.items()}
    own = snapshot.guard
    if own is not None:
        tensors |= own.tensors  # named guard/..
    rest = {
        "at": list(snapshot.at),
        "state": encode(state.plain, "state"),
        "guard": None if own is None else encode(own.plain["guard"], "guard"),
        "rows": [plain(row, "row") for row in snapshot.rows],
        "batches": batches,
    }
    pieces = {name: HostPiece(state.tensors[name], piece.size, piece.offset) for name, piece in sharded.items()}
    return _Part(rest=rest, tensors=tensors, pieces=pieces, elsewhere=[])


def _write_part(tmp: Path, part: _Part, rank: int) -> None:
    from safetensors.torch import save_file

    pairs = sorted(name for name, tensor in part.tensors.items() if tensor.is_complex())  # safetensors lacks some
    text = tmp / f"rank-{rank}.json"
    with disk_errors(tmp.parent):
        text.write_bytes(to_json(part.rest | {"elsewhere": part.elsewhere, "pairs": pairs}))
        stored = {n: torch.view_as_real(t).contiguous() if n in pairs else t for n, t in part.tensors.items()}
        path = text.with_suffix(".safetensors")
        try:
            save_file(stored, path)
        except Exception as error:
            raise as_os_error(error) from error
        shutil.copymode(text, path)  # safetensors makes it readable by its owner only
        sync(text)
        sync(path)


def _read_part(path: Path, rank: int) -> Snapshot:
    """What `rank` wrote, sharded tensors left out."""
    rest, tensors = _read_tensors(path, rank)
    if rest["elsewhere"]:
        theirs = _read_tensors(path, 0)[1]
        tensors |= {name: theirs[name] for name in rest["elsewhere"]}
    batches = {}
    for batch_id, batch in rest["batches"].items():
        prefix = f"batch:{batch_id}:"
        own = {n.removeprefix(prefix): tensors.pop(n) for n in list(tensors) if n.startswith(prefix)}
        batches[int(batch_id)] = State(own, {"batch": decode(batch)})
    rows = tuple(StepRow(*row[:2], *(float(value) for value in row[2:-1]), taken=row[-1]) for row in rest["rows"])
    own = None
    if rest["guard"] is not None:
        held = {n: tensors.pop(n) for n in list(tensors) if n.startswith("guard/")}
        own = State(held, {"guard": decode(rest["guard"])})
    return Snapshot(Kept(*rest["at"]), State(tensors, decode(rest["state"])), rows, batches, own)


def _read(found: Path, training: Training, team: Team) -> Snapshot:
    world = manifest(found)["world"]
    snapshot = team.own(lambda: _read_part(found, team.rank if team.rank < world else 0))
    pieces = team.own(lambda: _targets(snapshot.state.plain, training))
    if any(team.each(lambda: bool(pieces))):
        team.each(lambda: read_pieces(found / PIECES, pieces, None))
    tensors = snapshot.state.tensors | {name: piece.local for name, piece in pieces.items()}
    return snapshot._replace(state=State(tensors, snapshot.state.plain))


def _read_tensors(path: Path, rank: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors.torch import load_file

    rest = json.loads((path / f"rank-{rank}.json").read_bytes())
    tensors = load_file(path / f"rank-{rank}.safetensors")
    return rest, tensors | {name: torch.view_as_complex(tensors[name]) for name in rest["pairs"]}


def _targets(then: Mapping[str, Any], training: Training) -> dict[str, HostPiece]:
    """Empty host memory for this process's part of each sharded tensor, as it or its parameter is laid out now."""
    live = training.read()
    now = {ref.name: ref.piece for ref in refs(live.plain) if ref.piece is not None}
    parameters = {f"optimizer/{name}/": ref.name for name, ref in live.plain["model"].items()}
    targets = {}
    for ref in refs(then):
        if (piece := ref.piece) is None:
            continue
        twin = ref.name
        if twin not in now and piece.dims is None:
            twin = next((model for start, model in parameters.items() if ref.name.startswith(start)), twin)
        if twin in now and now[twin].size == piece.size:
            shape, offset = live.tensors[twin].shape, now[twin].offset
        elif piece.dims is not None and all(dim < 0 for dim in piece.dims):
            shape, offset = piece.size, (0,) * len(piece.size)
        else:
            raise ValueError(f"{ref.name} is not sharded here as it was; build the same model and optimizer first")
        targets[ref.name] = HostPiece(torch.empty(shape, dtype=piece.dtype), piece.size, offset)
    return targets


def _files(tmp: Path, rank: int) -> dict[str, Any]:
    """Size and digest of what this rank wrote, by name."""
    paths = [tmp / f"rank-{rank}.json", tmp / f"rank-{rank}.safetensors", *(tmp / PIECES).glob(f"__{rank}_*")]
    paths += [path for path in [tmp / PIECES / ".metadata"] if rank == 0 and path.exists()]
    return {str(path.relative_to(tmp)): {"bytes": path.stat().st_size, "sha256": digest(path)} for path in paths}


def _digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Of each tensor's shape, type and bytes."""
    found = {}
    for name, tensor in tensors.items():
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(real.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        found[name] = digest.hexdigest()
    return found
