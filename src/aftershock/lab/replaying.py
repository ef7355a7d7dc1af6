"""A run folder of the lab, or a study of several, as what a replay needs: the recorded losses, and the run built again.

Refuses, in a sentence that says what can still be done, where it would be another run that is trained.
Must not import the replay: who starts one hands this in.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from aftershock._version import __version__
from aftershock.config import load_yaml, run_id
from aftershock.guard.incidentrecord import FOLDER as INCIDENTS
from aftershock.lab.data import Batches, build_batches
from aftershock.lab.recipe import RunConfig
from aftershock.lab.replica import put_snapshot, workload_of
from aftershock.lab.zoo.labels import label
from aftershock.store import folder as fs
from aftershock.store.reader import RunReader
from aftershock.store.study import MANIFEST, Study
from aftershock.workload import Workload

LOSS = "loss/train/total"
"""What is trained: cross-entropy and z term."""
NAMED = 12
"""Runs of a study that are named at most."""
_RUN_ID = re.compile(r"[0-9a-f]{12}")


class LabRun(NamedTuple):
    """A run that can be trained again.

    - `losses`: what was trained on, by step, as recorded; after the last step of a run that broke, one that is nan
    - `steps`: its length by its config; `notes`: what may make the same steps differ in their last bits
    """

    folder: Path
    config: RunConfig
    batches: Batches
    losses: dict[int, float]
    notes: tuple[str, ...]

    @property
    def steps(self) -> int:
        return self.config.steps

    def build(self, step: int) -> tuple[Workload, int]:
        """A fresh workload at the newest snapshot of `step` or before, at the start where there is none; and where it
        stands."""
        workload, reader = workload_of(self.config, self.batches), RunReader(self.folder)
        kept = max((at for at in reader.snapshots() if at <= step), default=None)
        return workload, 0 if kept is None else put_snapshot(workload, reader.load_snapshot(kept))


def find_run(path: str | Path, *, anyway: bool = False) -> LabRun | None:
    """The lab's run at `path`: a run's folder, or a study's with one run. None for anything else.

    Raises ValueError for a study of several runs, naming those with a spike; for a run that is under way, has no
    losses, or whose data is not to be had; and, unless `anyway`, where version, config or data are no longer those that
    it was trained with.
    """
    folder = Path(path)
    if (folder / MANIFEST).is_file():
        folder = _only_run(Study(folder))
    if not (folder / fs.CONFIG).is_file() or _guarded(folder):
        return None
    config = _config(folder)
    reader = RunReader(folder)
    if reader.status == "running":
        raise ValueError(f"{folder} is being trained; wait until it has ended")
    losses = recorded_losses(reader)
    if not losses:
        raise ValueError(f"{folder} has no losses: train it first, with aftershock run {folder}")
    batches = _batches(config, reader)
    changed = [*_changed_code(config, reader), *_changed_data(batches, reader)]
    if changed and not anyway:
        raise ValueError(
            f"{folder} is not what it was when it was trained: {'; '.join(changed)}. Go back to that, train it again, "
            "or add --anyway: the replay then says whether the recorded losses come out again"
        )
    return LabRun(folder, config, batches, losses, (*changed, *_other_bits(reader)))


def recorded_losses(reader: RunReader) -> dict[int, float]:
    """`LabRun.losses` of a run folder; {} before its first step."""
    if LOSS not in reader.scalar_names():
        return {}
    series = reader.scalars(LOSS)
    losses = dict(zip(series.steps.tolist(), series.values[LOSS].tolist(), strict=True))
    last = max(losses)
    if any(event.kind == "diverged" for event in reader.events()) and math.isfinite(losses[last]):
        losses[last + 1] = math.nan  # its gradient, or the weights after its last step, were not finite
    return losses


# ---------------------------------------------------------------------------------------------------------- the folder


def _only_run(study: Study) -> Path:
    """The folder of a study's run. Raises ValueError where there are several, with those that have a spike."""
    folders = [Path((study.runs / ref.run_id).text) for ref in study.refs]
    if len(folders) == 1:
        return folders[0]
    spiky = list(_spiky(study))
    which = (
        "none of them has a spike"
        if not spiky
        else f"with a spike {'is 1' if len(spiky) == 1 else f'are {len(spiky)}'}: {'; '.join(spiky[:NAMED])}"
    )
    more = "; .." if len(spiky) > NAMED else ""
    raise ValueError(f"{study.place.text} is a study of {len(folders)} runs, give the folder of one; {which}{more}")


def _spiky(study: Study) -> Iterator[str]:
    for ref in study.refs:
        folder = Path((study.runs / ref.run_id).text)
        losses = recorded_losses(RunReader(folder)) if (folder / fs.CONFIG).is_file() else {}
        spikes = label(list(losses.values()))
        if spikes:
            step = list(losses)[spikes[0].onset]
            yield f"{folder} ({ref.size} {ref.arm} lr {ref.lr:g} seed {ref.seed}, step {step})"


def _guarded(folder: Path) -> bool:
    """Whether a guard keeps its incidents there: it is then somebody's own run."""
    return any((folder / inside).is_dir() for inside in (INCIDENTS, f"guard/{INCIDENTS}"))


def _config(folder: Path) -> RunConfig:
    try:
        return load_yaml(RunConfig, folder / fs.CONFIG)
    except ValueError as error:
        raise ValueError(
            f"{error}. It is not the config of a run of the lab's, which alone needs no --workload; specimens of the "
            "zoo are replayed as zoo:NAME"
        ) from None


def _batches(config: RunConfig, reader: RunReader) -> Batches:
    try:
        return build_batches(config.data)
    except ValueError as error:
        then = reader.env.get("directory")
        moved = isinstance(then, str) and not Path(then).samefile(os.curdir) if then and Path(then).exists() else False
        hint = f"; it was started in {then}" if moved else ""
        raise ValueError(f"{reader.place.text}: its data is not to be had: {error}{hint}") from None


# ---------------------------------------------------------------------------------------------------- what has changed


def _changed_code(config: RunConfig, reader: RunReader) -> Iterator[str]:
    """Of the package's version and the config."""
    then = _versions(reader).get("aftershock")
    if then is not None and then != __version__:
        yield f"it was trained by aftershock {then} and this is {__version__}"
    # A sweep names a folder by its config and the version.
    elif _RUN_ID.fullmatch(reader.run_id) and run_id(config) != reader.run_id:
        yield f"config.yaml was edited: the folder's name is that of another config, this one's is {run_id(config)}"


def _changed_data(batches: Batches, reader: RunReader) -> Iterator[str]:
    then, now = reader.env.get("data"), batches.describe()
    if not isinstance(then, Mapping):
        return
    for key in ("digest", "train_tokens", "train_equations"):
        if then.get(key) != now.get(key):
            was = f"{then.get('description', '')} ({key} {then.get(key)})"
            yield f"its data was {was} and is {now['description']} ({key} {now.get(key)})"
            return


def _other_bits(reader: RunReader) -> Iterator[str]:
    """Why equal steps may round otherwise."""
    size = reader.summary.get("fleet_size", 1)
    if size > 1:
        yield f"it was trained in a fleet of {size}, whose sums round otherwise than those of one run"
    import torch

    then = _versions(reader).get("torch")
    here = str(torch.__version__).partition("+")[0]
    if then is not None and then.partition("+")[0] != here:
        yield f"it was trained with torch {then} and this is {torch.__version__}"
    threads = reader.env.get("torch_threads")
    if threads not in (None, torch.get_num_threads()):
        yield f"it was trained with {threads} threads and this process has {torch.get_num_threads()}"


def _versions(reader: RunReader) -> dict[str, Any]:
    return dict(reader.env.get("versions") or {})
