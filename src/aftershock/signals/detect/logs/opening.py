"""Which kind of log a path is, and its rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from aftershock.signals.detect.logs.binary import OUR_STEP, tensorboard_rows, wandb_rows
from aftershock.signals.detect.logs.rows import Follow, Problems, Row
from aftershock.signals.detect.logs.text import csv_rows, jsonl_rows
from aftershock.store.folder import CONFIG, SCALARS
from aftershock.store.reader import RunReader

STATS = ("attn/*/max_logit", "output/*/log_z")
"""Statistics of a run folder that are read beside its scalars: those that show slow growth."""


def log_rows(path: Path, follow: Follow | None, problems: Problems) -> Iterator[Row]:
    """Rows of a CSV or JSONL file, a TensorBoard event file or a folder of them, a W&B offline run, or a run folder.

    Raises ValueError when there is nothing at `path`, or it is none of these.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder; check the path")
    if path.is_dir():
        return _folder_rows(path, follow, problems)
    if "tfevents" in path.name:
        return tensorboard_rows([path], follow, problems)
    if path.suffix == ".wandb":
        return wandb_rows(path, follow, problems)
    with path.open("rb") as file:
        head = file.read(4096)
    if b"\0" in head:
        raise ValueError(f"{path}: a binary file of no known kind; give CSV, JSON lines, TensorBoard events or .wandb")
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"["):
        raise ValueError(f"{path}: one JSON document; write one JSON object a line instead")
    if path.suffix in (".jsonl", ".ndjson") or text.startswith(b"{"):
        return jsonl_rows(path, follow, problems)
    return csv_rows(path, follow, problems)


def _folder_rows(path: Path, follow: Follow | None, problems: Problems) -> Iterator[Row]:
    if (path / CONFIG).exists() and ((path / SCALARS).exists() or not list(path.glob("*.wandb"))):
        if follow is not None:
            if not (path / SCALARS).exists():
                raise ValueError(f"{path}: no {SCALARS} yet; follow it once the run has written its first rows")
            return jsonl_rows(path / SCALARS, follow, problems)
        return _run_rows(path)
    events = sorted(path.glob("*tfevents*"), key=lambda p: p.name)
    if events:
        return tensorboard_rows(events, follow, problems)
    runs = sorted(path.glob("*.wandb"))
    if len(runs) == 1:
        return wandb_rows(runs[0], follow, problems)
    raise ValueError(
        f"{path}: several W&B files here; give one of them"
        if runs
        else f"{path}: no run folder, no TensorBoard event file and no .wandb file in it; give the folder that has one"
    )


def _run_rows(path: Path) -> Iterator[Row]:
    """Scalars and the statistics of `STATS`, after rewound rows have been replaced, ascending by step."""
    run = RunReader(path)
    rows: dict[int, dict[str, float]] = {}
    for row in run.scalar_rows():
        rows.setdefault(row.step, {})[row.name] = row.value
    for name in run.stat_names():
        if any(Path(name).match(pattern) for pattern in STATS):
            series = run.stats(name)[name]
            for step, value in zip(series.steps.tolist(), series.values.tolist(), strict=True):
                rows.setdefault(step, {})[name] = value
    for step in sorted(rows):
        rows[step].pop(OUR_STEP, None)
        yield Row(f"step {step}", step, rows[step])
