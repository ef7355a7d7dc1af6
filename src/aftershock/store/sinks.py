"""Trackers as mirrors: the `Sink` protocol, and the queue that keeps them out of training's way.

Our own files are the truth. A sink is called from one background thread, on rank 0 only; an exception in it is logged
once and never reaches training. Names sent are `aftershock/<kind>/<place>/<stat>`, with `aftershock/step` and
`aftershock/segment` beside them, because a rewound run visits steps twice and some trackers drop what goes back.
The adapters live in `trackers/`, one file each; their packages are imported when a sink is made.
"""

from __future__ import annotations

import importlib
import logging
import queue
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from aftershock.config import nearest

_log = logging.getLogger(__name__)

PREFIX = "aftershock/"
STEP = "aftershock/step"
SEGMENT = "aftershock/segment"

QUEUE_LENGTH = 10_000
"""Calls waiting for slow trackers; beyond it rows are left out of the trackers, counted, and said so."""
CLOSE_S = 60.0
"""How long closing a run waits for its trackers."""

_TRACKERS: dict[str, tuple[str, str]] = {
    "tensorboard": ("aftershock.store.trackers.tensorboard", "TensorBoardSink"),
    "wandb": ("aftershock.store.trackers.wandb", "WandbSink"),
    "mlflow": ("aftershock.store.trackers.mlflow", "MlflowSink"),
    "trackio": ("aftershock.store.trackers.trackio", "TrackioSink"),
}


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What a sink is told of the run. `resumed_from`: the last step of earlier segments, None for a new run."""

    run_id: str
    config: Mapping[str, Any]
    tags: Mapping[str, str]
    segment: int
    resumed_from: int | None
    folder: Path


class Sink(Protocol):
    """A tracker that follows one run. Make one sink for each run."""

    def open(self, run: RunInfo) -> None:
        """The run begins, or goes on."""
        ...

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Numbers of one step, `aftershock/step` and `aftershock/segment` among them."""
        ...

    def event(self, kind: str, step: int, data: Mapping[str, object]) -> None:
        """Something happened at a step: a divergence, a spike, a rewind."""
        ...

    def artifact(self, path: Path, name: str) -> None:
        """A file that belongs to the run; a tracker without files may do nothing."""
        ...

    def close(self, status: str) -> None:
        """The run ends: `finished`, `diverged`, `failed` or `interrupted`."""
        ...


class SinkQueue:
    """Feeds the sinks of one run from one background thread."""

    def __init__(self, sinks: Sequence[Sink], run: RunInfo) -> None:
        self._live = list(sinks) if _is_rank_zero() else []
        self._run = run
        self._calls: queue.Queue[Callable[[Sink], None] | None] = queue.Queue(QUEUE_LENGTH)
        self._failed: set[int] = set()
        self._num_dropped = 0
        self._thread = threading.Thread(target=self._drain, name=f"aftershock-sinks-{run.run_id}", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._put(lambda sink: sink.open(self._run))

    def log(self, values: Mapping[str, float], step: int, segment: int) -> None:
        metrics = {PREFIX + name: value for name, value in values.items()}
        metrics |= {STEP: float(step), SEGMENT: float(segment)}
        self._put(lambda sink: sink.log(metrics, step))

    def event(self, kind: str, step: int, data: Mapping[str, object]) -> None:
        self._put(lambda sink: sink.event(kind, step, data))

    def close(self, status: str) -> None:
        """Send the config and the events as files, end the sinks, wait at most `CLOSE_S`."""
        for name in ("config.yaml", "events.jsonl"):
            self._put(lambda sink, name=name: sink.artifact(self._run.folder / name, name))
        self._put(lambda sink: sink.close(status), wait=True)
        self._put(None, wait=True)
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            _log.warning("%s: trackers did not finish within %d s; the run folder is whole", self._run.run_id, CLOSE_S)
        if self._num_dropped:
            _log.warning("%s: trackers were too slow for %d calls", self._run.run_id, self._num_dropped)

    def _put(self, call: Callable[[Sink], None] | None, *, wait: bool = False) -> None:
        if not self._live and call is not None:
            return
        try:
            self._calls.put(call, block=wait, timeout=CLOSE_S if wait else None)
        except queue.Full:
            if not self._num_dropped:
                _log.warning("%s: trackers are too slow and miss rows; the run folder misses none", self._run.run_id)
            self._num_dropped += 1

    def _drain(self) -> None:
        opened = False
        while (call := self._calls.get()) is not None:
            for sink in list(self._live):
                ok = self._call(sink, call)
                if not ok and not opened:
                    self._live.remove(sink)  # never opened: every further call would fail too
            opened = True

    def _call(self, sink: Sink, call: Callable[[Sink], None]) -> bool:
        try:
            call(sink)
        except Exception as error:  # a tracker may raise anything; training must not see it
            if id(sink) not in self._failed:
                name = type(sink).__name__
                _log.warning("%s: %s failed, further errors are not shown: %r", self._run.run_id, name, error)
            self._failed.add(id(sink))
            return False
        return True


def sink_from_spec(spec: str) -> Sink:
    """A sink from text: `tensorboard:FOLDER`, `wandb:[ENTITY/]PROJECT`, `mlflow:URI[#EXPERIMENT]`, `trackio:PROJECT`.

    Raises ValueError on an unknown tracker, an empty target, or a package that is not installed.
    """
    kind, _, target = spec.partition(":")
    if kind not in _TRACKERS:
        raise ValueError(f"tracker {spec!r}: unknown kind {kind!r}{nearest(kind, _TRACKERS)}")
    if not target:
        raise ValueError(f"tracker {spec!r}: say where to, as in {kind}:NAME")
    module, name = _TRACKERS[kind]
    return getattr(importlib.import_module(module), name)(target)


def require(package: str, extra: str) -> Any:
    """Import an optional package. Raises ValueError with the pip line when it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"{extra} is not installed ({error}): pip install 'aftershock[{extra}]'") from None


def _is_rank_zero() -> bool:
    """True unless this process is a higher rank of an initialised torch.distributed group."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return True
    return distributed.get_rank() == 0
