"""A study as JSON lines: each job that is done is one line, so a study that is interrupted goes on where it stopped.

Lines that were written with other code are not used. Must not import torch at the top: workers do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import as_completed
from pathlib import Path
from typing import TypeVar

from aftershock.claims.claim import Line
from aftershock.lab.workers import worker_pool
from aftershock.store.folder import FolderLock, JsonLines, disk_errors, read_lines, to_json

Job = TypeVar("Job")

LINES = "lines.jsonl"

OnLine = Callable[[int, int], None]
"""Told how many of how many lines there are."""


def work_through(
    folder: Path,
    jobs: Mapping[str, Job],
    work: Callable[[Job], Line],
    *,
    code: str,
    processes: int = 1,
    on_progress: OnLine | None = None,
) -> list[Line]:
    """The lines of `jobs` (by id), in their order: those on file in `folder`, and the others from `work` now.

    `work` is a function of a module, since workers are fresh interpreters of one thread each; what it gives must be
    JSON with the job's id as its `id`. With `processes=1` it works in this process. `code` says which code a line
    depends on, see `code_digest`. Numbers that are not finite come back as text, "inf" or "nan".
    Raises ValueError for less than one process, and whatever `work` raises, with the lines before it kept.
    """
    if processes < 1:
        raise ValueError(f"the number of processes must be at least 1, got {processes}")
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(folder)
        try:
            _work_missing(folder, jobs, work, code, processes, on_progress)
            done = lines_on_file(folder, code=code)
        finally:
            lock.release()
    return [done[name] for name in jobs]


def lines_on_file(folder: Path, *, code: str) -> dict[str, Line]:
    """By id, the lines in `folder` that were written with this code."""
    path = folder / LINES
    found = read_lines(path.read_bytes(), str(path)) if path.is_file() else []
    return {line["id"]: line for line in found if line.get("code") == code}


def code_digest(*parts: str) -> str:
    """Of source files and folders of the package, given from its top ("replay", "lab/zoo"): 12 hex digits."""
    package = Path(__file__).resolve().parents[1]
    files = [file for part in parts for file in _sources(package / part)]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _sources(path: Path) -> list[Path]:
    found = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    assert found, path
    return found


def _work_missing(
    folder: Path,
    jobs: Mapping[str, Job],
    work: Callable[[Job], Line],
    code: str,
    processes: int,
    on_progress: OnLine | None,
) -> None:
    done = lines_on_file(folder, code=code)
    missing = {name: job for name, job in jobs.items() if name not in done}
    count = len(jobs) - len(missing)
    lines = JsonLines(folder / LINES)

    def keep(name: str, line: Line) -> None:
        nonlocal count
        assert line["id"] == name, f"the job {name} gave the line of {line['id']}"
        lines.append((to_json({**line, "code": code}) + "\n").encode())
        count += 1
        if on_progress is not None:
            on_progress(count, len(jobs))

    if on_progress is not None:
        on_progress(count, len(jobs))
    try:
        if processes == 1:
            for name, job in missing.items():
                keep(name, work(job))
        elif missing:
            _in_workers(missing, work, processes, keep)
        lines.sync()
    finally:
        lines.close()


def _in_workers(
    jobs: Mapping[str, Job], work: Callable[[Job], Line], processes: int, keep: Callable[[str, Line], None]
) -> None:
    with worker_pool(min(processes, len(jobs))) as pool:
        waiting = {pool.submit(work, job): name for name, job in jobs.items()}
        try:
            for future in as_completed(waiting):
                keep(waiting[future], future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
