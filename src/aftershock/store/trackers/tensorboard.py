"""TensorBoard event files: one sub-folder per run. Rows of a rewound segment hide the ones they replace."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aftershock.store.folder import plain
from aftershock.store.sinks import PREFIX, SEGMENT, RunInfo, require


class TensorBoardSink:
    """Writes to `folder/<run_id>`, which `tensorboard --logdir folder` shows."""

    def __init__(self, folder: str) -> None:
        """Raises ValueError when tensorboard is not installed."""
        require("tensorboard", "tensorboard")
        self._folder = Path(folder)
        self._run: RunInfo | None = None
        self._writer: Any = None
        self._segment = 0

    def open(self, run: RunInfo) -> None:
        self._run = run
        self._segment = run.segment

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        segment = int(metrics[SEGMENT])
        if segment != self._segment and self._writer is not None:
            self._writer.close()
            self._writer = None
        self._segment = segment
        writer = self._writer_at(step)
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)

    def event(self, kind: str, step: int, data: Mapping[str, object]) -> None:
        self._writer_at(step).add_text(f"{PREFIX}event/{kind}", f"`{json.dumps(plain(data, kind))}`", step)

    def artifact(self, path: Path, name: str) -> None:
        """TensorBoard keeps no files: the text is shown under its name."""
        lines = path.read_text(encoding="utf-8").splitlines()
        if self._writer is not None:
            self._writer.add_text(f"{PREFIX}file/{name}", "\n".join(f"    {line}" for line in lines), 0)

    def close(self, status: str) -> None:
        if self._writer is not None:
            self._writer.add_text(f"{PREFIX}status", status, 0)
            self._writer.close()

    def _writer_at(self, step: int) -> Any:
        """The open event file. The first of a later segment hides what earlier files hold from `step` on."""
        if self._writer is None:
            from torch.utils.tensorboard.writer import SummaryWriter

            assert self._run is not None
            purge = step if self._segment else None
            self._writer = SummaryWriter(str(self._folder / self._run.run_id), purge_step=purge)
        return self._writer
