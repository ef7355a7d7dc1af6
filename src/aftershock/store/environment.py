"""What a run ran on: versions, machine, commit, command line. Written to env.json before step 0.

Reads metadata only: no package is imported to learn its version, no process is started.
Must not import anything else of aftershock except the version.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import socket
import sys
from pathlib import Path
from typing import Any

from aftershock._version import __version__

_PACKAGES = ("torch", "numpy", "duckdb", "safetensors", "fsspec")


def describe_environment() -> dict[str, Any]:
    """JSON-ready description of process and machine; `commit` is that of the working directory, None outside git."""
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        "argv": list(sys.argv),
        "directory": str(Path.cwd()),
        "commit": git_commit(Path.cwd()),
        "python": platform.python_version(),
        "versions": {"aftershock": __version__} | {name: _version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
    } | _torch_state()


def in_checkout(path: str) -> Path | None:
    """`path` within the package when it runs from a source checkout; None when it is installed elsewhere."""
    package = Path(__file__).resolve().parents[1]
    is_checkout = package.parent.name == "src" and (package.parents[1] / "pyproject.toml").is_file()
    return package / path if is_checkout else None


def git_commit(folder: Path) -> str | None:
    """The commit checked out in the git work tree around `folder`, read from its files; None when there is none."""
    try:
        for parent in (folder, *folder.parents):
            dot = parent / ".git"
            if dot.is_file():  # a linked work tree: "gitdir: PATH"
                return _head(parent / dot.read_text(encoding="utf-8").partition("gitdir:")[2].strip())
            if dot.is_dir():
                return _head(dot)
    except (OSError, UnicodeDecodeError):
        return None
    return None


def _head(git: Path) -> str | None:
    head = (git / "HEAD").read_text(encoding="utf-8").strip()
    if not head.startswith("ref: "):
        return head
    name = head.removeprefix("ref: ")
    common = git / "commondir"
    shared = git / common.read_text(encoding="utf-8").strip() if common.exists() else git
    for root in (git, shared):
        if (root / name).exists():
            return (root / name).read_text(encoding="utf-8").strip()
    packed = shared / "packed-refs"
    lines = packed.read_text(encoding="utf-8").splitlines() if packed.exists() else []
    return next((line.split()[0] for line in lines if line.endswith(f" {name}")), None)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _torch_state() -> dict[str, Any]:
    """Threads and accelerator, where the process has loaded torch already."""
    torch = sys.modules.get("torch")
    if torch is None:
        return {}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"torch_threads": torch.get_num_threads(), "accelerator": device}
