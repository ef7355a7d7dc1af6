"""What a user gives on the command line: the incident to replay, and the function that builds its workload.

    load_workload("my_run.py:build"), find_incident("runs/a")

Must not import the lab, nor the runner: it finds things, it replays nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from aftershock.config import nearest
from aftershock.guard.incidentrecord import FOLDER, RECORD, Incident, read_incidents
from aftershock.workload import Workload

RETURNS = (
    "an aftershock.workload.Workload (model, optimizer, batch(i), loss), a Hugging Face Trainer, or a LightningModule "
    "and its DataLoader"
)
GUARD = "guard"
"""Where a run's folder keeps its guard's."""


class FoundIncident(NamedTuple):
    """The incident's folder, and in words how it was chosen; "" where it was named itself."""

    folder: Path
    words: str


class Given(NamedTuple):
    """A workload, and what turns tokens' ids into text, where the module has a `decode`."""

    workload: Workload
    decode: Callable[[Sequence[int]], str] | None


# -------------------------------------------------------------------------------------------------------- incident


def find_incident(path: str | Path) -> FoundIncident:
    """The incident at `path`: its own folder, or the newest with a snapshot of a guard's (or a run's guard's) folder.

    Raises ValueError for a folder that does not exist, holds no incident, or none with a snapshot.
    """
    folder = Path(path)
    if not folder.exists():
        raise ValueError(f"{folder}: no such folder; give an incident's folder, a guard's that holds some, or zoo:NAME")
    if (folder / RECORD).exists():
        return FoundIncident(folder, "")
    for home in (folder, folder.parent if folder.name == FOLDER else folder / GUARD):
        found = read_incidents(home)
        if found:
            return _newest(home, found)
    raise ValueError(
        f"{folder} holds no incident: there is no {RECORD} in it, in {FOLDER}/*/ or in {GUARD}/{FOLDER}/*/. A guard "
        "writes them when it is given a folder: Guard(model, optimizer, folder=...)"
    )


def _newest(home: Path, found: Sequence[Incident]) -> FoundIncident:
    kept = [one for one in found if one.snapshot is not None]
    if not kept:
        raise ValueError(
            f"none of the incidents in {home / FOLDER} ({len(found)}) has a snapshot to replay from: by default only "
            "rewinds and stops keep one; Guard(incident_state='all') keeps more. Or give another snapshot of the run "
            "with --snapshot, and the incident's own folder"
        )
    chosen, others = kept[-1], len(found) - 1
    which = "the only one" if not others else f"the newest with a snapshot; there {_are(others)} besides"
    return FoundIncident(chosen.folder, f"Incident {chosen.folder.name} of {home}, {which}.")


def _are(number: int) -> str:
    return "is 1 other" if number == 1 else f"are {number} others"


# -------------------------------------------------------------------------------------------------------- workload


def load_workload(target: str) -> Given:
    """What the function at `target` builds: `FILE.py:function` or `package.module:function`.

    Its folder is importable from then on, as if the file were run. Raises ValueError, in the user's words, where there
    is no such file or function, where it fails, or where it returns something else than a workload can be made of.
    """
    where, colon, name = target.rpartition(":")
    if not colon or not where or not name.isidentifier():
        raise ValueError(f"--workload takes FILE.py:function or package.module:function, got {target!r}")
    module = _module(where, target)
    public = {key: value for key, value in vars(module).items() if not key.startswith("_")}
    if name not in public:
        own = [key for key, value in public.items() if getattr(value, "__module__", None) == module.__name__]
        raise ValueError(f"--workload {target}: {where} has no {name!r}{nearest(name, own or public)}")
    made = public[name]
    if callable(made):
        made = _guarded(made, target)
    return Given(as_workload(made, target), public["decode"] if callable(public.get("decode")) else None)


def as_workload(made: Any, said: str) -> Workload:
    """`made` itself, or the workload of a foreign trainer. Raises ValueError, naming `said`, for anything else."""
    if isinstance(made, Workload):
        return made
    # Whoever returns a trainer has imported its package; nobody else pays for that.
    transformers, lightning = sys.modules.get("transformers"), sys.modules.get("lightning.pytorch")
    if transformers is not None and isinstance(made, transformers.Trainer):
        from aftershock.replay.adapters.hf import workload_from_trainer

        return workload_from_trainer(made)
    if lightning is not None and isinstance(made, tuple) and made and isinstance(made[0], lightning.LightningModule):
        from aftershock.replay.adapters.lightning import workload_from_lightning

        if len(made) not in (2, 3):
            raise ValueError(f"--workload {said} returned {len(made)} things; return (module, loader[, trainer])")
        plain = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = made[2] if len(made) == 3 else lightning.Trainer(**plain)
        return workload_from_lightning(made[0], made[1], trainer=trainer)
    raise ValueError(f"--workload {said} returned {_article(type(made).__name__)}; return {RETURNS}")


def _module(where: str, target: str) -> ModuleType:
    if not where.endswith(".py"):
        _importable(Path.cwd())
        return _guarded(lambda: importlib.import_module(where), target)
    path = Path(where).resolve()
    if not path.is_file():
        raise ValueError(f"--workload {target}: {where}: no such file")
    # Its own name, so that what else imports it gets the same module; another's is not taken over.
    name = path.stem if path.stem not in sys.modules else f"{path.stem}_workload"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    _importable(path.parent)
    sys.modules[name] = module
    load = spec.loader.exec_module
    try:
        _guarded(lambda: load(module), target)
    except ValueError:
        del sys.modules[name]
        raise
    return module


def _importable(folder: Path) -> None:
    """As `python FILE.py` and `python -m module` would have it; it stays so, since code may import later."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _guarded(function: Callable[[], Any], target: str) -> Any:
    """What `function`, the user's code, returns; what it raises as one sentence with the place in that code."""
    try:
        return function()
    except Exception as error:  # anybody's code, which may fail in any way
        frames = [one for one in traceback.extract_tb(error.__traceback__) if not _theirs(one.filename)]
        at = "" if not frames else f" at {Path(frames[-1].filename).name} line {frames[-1].lineno}"
        raise ValueError(f"--workload {target} failed{at}: {type(error).__name__}: {error}") from error


def _theirs(filename: str) -> bool:
    """Whether a frame is not the user's own code."""
    return filename.startswith("<") or "site-packages" in filename or filename in (__file__, importlib.__file__)


def _article(name: str) -> str:
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"
