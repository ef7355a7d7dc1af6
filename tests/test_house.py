"""The house rules that a machine can hold: import arrows, lazy heavy packages, line budget, ASCII, docs in step."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "aftershock"
VENDOR = PACKAGE / "report" / "vendor"

LEVELS = {
    "_version": 0,
    "numerics": 1,
    "config": 1,
    "causes": 1,
    "workload": 1,
    "store": 2,
    "signals": 3,
    "guard": 4,
    "lab": 5,
    "testing": 5,
    "replay": 5,
    "forecast": 6,
    "phenomena": 7,
    "claims": 7,
    "bench": 7,
    "report": 8,
    "cli": 9,
    "__main__": 10,
}
"""A room imports its own files and rooms of a lower level. Rooms on one level do not know each other."""

HEAVY = {
    *("duckdb", "fsspec", "jinja2", "rich", "safetensors"),  # core, but slow to load
    *("matplotlib", "playwright", "ray", "scipy", "submitit", "torchdata"),  # extras and tools
    *("mlflow", "tensorboard", "trackio", "wandb"),  # trackers
    *("accelerate", "lightning", "transformers"),  # foreign trainers
    "pandas",  # never ours
}
"""Imported inside the function that uses them. (torch, numpy, yaml and tyro may stand at the top of a file.)"""

LINE_BUDGET = 400
PUBLIC_NAMES = 20
OWN_MODULES = 120
"""What `import aftershock` may load beyond torch's own modules: a count, since seconds depend on the machine."""

TEXT_SUFFIXES = (".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".css", ".html", ".js", ".j2", ".jinja")


def _files(*suffixes: str) -> list[Path]:
    """Our own text files, as git would ship them: no vendored ones, nothing built."""
    tops = [ROOT / name for name in ("src", "tests", "benchmarks", "docs", "examples", ".ci")]
    found = [path for top in tops for path in top.rglob("*")] + list(ROOT.iterdir())
    return sorted(
        path
        for path in found
        if path.is_file() and path.suffix in suffixes and VENDOR not in path.parents and "__pycache__" not in path.parts
    )


def _imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every absolute import anywhere in the file, as (line, dotted module); `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write the full name"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def _arrow_faults(room: str, source: str) -> list[str]:
    faults = []
    for line, name in _imports(ast.parse(source)):
        parts = name.split(".")
        if parts[0] != "aftershock":
            continue
        target = parts[1]
        if target == room or target == "__version__":
            continue
        if target not in LEVELS:
            faults.append(f"line {line}: {name}: import from the room that holds it, not from the top of the package")
        elif LEVELS[target] >= LEVELS[room]:
            faults.append(f"line {line}: {room} must not import {name}")
    return faults


def _heavy_faults(source: str) -> list[str]:
    """Heavy imports that run when the file is imported: outside of functions and of `if TYPE_CHECKING:`."""
    faults, todo = [], list[ast.AST](ast.parse(source).body)
    while todo:
        node = todo.pop()
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            todo += [] if typing_only else list(ast.iter_child_nodes(node))
        faults += [f"{name} imported at the top" for name in names if name.split(".")[0] in HEAVY]
    return faults


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize(
    "path", [p for p in _files(".py") if PACKAGE in p.parents], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_imports_point_one_way_and_heavy_ones_wait(path: Path) -> None:
    """contract: every file of the package. The top __init__ only gathers names, so any room may stand in it."""
    source = path.read_text(encoding="utf-8")
    room = _room(path)
    if room != "__init__":
        assert room in LEVELS, f"{room} is no known room; give it a level in this test and a line in docs/concepts.md"
        assert _arrow_faults(room, source) == []
    assert _heavy_faults(source) == []


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("store", "from aftershock.lab.recipe import RunConfig"),
        ("guard", "def f():\n    import aftershock.lab"),
        ("replay", "from aftershock import lab"),
        ("lab", "from aftershock.replay import cells"),
        ("numerics", "from aftershock.config import nearest"),
        ("report", "from aftershock import Study"),
    ],
)
def test_a_wrong_arrow_is_found(room: str, source: str) -> None:
    """planted."""
    assert len(_arrow_faults(room, source)) == 1


def test_a_right_arrow_passes() -> None:
    """planted: the clean case."""
    source = (
        "import numpy\nfrom aftershock.store.reader import RunReader\nfrom aftershock.lab.recipe import RunConfig\n"
    )
    assert _arrow_faults("lab", source) == []


def test_a_heavy_import_is_found_only_where_it_runs_at_once() -> None:
    """planted: at the top, in a class body, in a try; not in a function nor for the type checker."""
    loud = "import duckdb\nclass A:\n    from rich import table\ntry:\n    import scipy.stats\nfinally:\n    pass\n"
    assert len(_heavy_faults(loud)) == 3
    quiet = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import duckdb\ndef f():\n    import duckdb\n"
    assert _heavy_faults(quiet) == []


def test_line_budget() -> None:
    long = {
        str(p.relative_to(ROOT)): n
        for p in _files(".py")
        if (n := len(p.read_text("utf-8").splitlines())) > LINE_BUDGET
    }
    assert long == {}, f"over {LINE_BUDGET} lines: split by noun"


def test_ascii() -> None:
    wild = []
    for path in _files(*TEXT_SUFFIXES, ""):
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            if not line.isascii():
                wild.append(f"{path.relative_to(ROOT)}:{number}")
    assert wild == []


def test_every_package_folder_has_an_init() -> None:
    bare = {p.parent for p in PACKAGE.rglob("*.py") if not (p.parent / "__init__.py").exists()}
    assert sorted(str(p.relative_to(ROOT)) for p in bare) == []


def test_tests_mirror_rooms() -> None:
    """Each tests/<folder> is a folder of the package, so that a file's tests are found without searching."""
    folders = {p.parent.relative_to(ROOT / "tests") for p in (ROOT / "tests").rglob("test_*.py")}
    strange = [str(f) for f in folders if not (PACKAGE / f).is_dir() and f.parts[0] != "benchmarks"]
    assert strange == []


def test_import_stays_light() -> None:
    """`import aftershock` loads no heavy package and few modules beyond those torch loads itself."""
    script = (
        "import sys, json, torch; before = set(sys.modules); import aftershock; "
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    env = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env, cwd="/")
    loaded = json.loads(done.stdout)
    assert sorted({name.split(".")[0] for name in loaded} & HEAVY) == []
    assert len(loaded) <= OWN_MODULES, f"{len(loaded)} modules: {', '.join(loaded)}"


def test_public_names() -> None:
    """At most 20 names at the top, each of them there and documented."""
    aftershock = importlib.import_module("aftershock")
    names = [name for name in aftershock.__all__ if name != "__version__"]
    assert 0 < len(names) <= PUBLIC_NAMES
    assert len(set(names)) == len(names)
    bare = [name for name in names if callable(getattr(aftershock, name)) and not getattr(aftershock, name).__doc__]
    assert bare == []


def test_core_dependencies_have_a_reason() -> None:
    """Each core dependency has its own line with a reason in CHANGELOG.md, and an exact pin in constraints.txt."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    pins = {
        line.split("==")[0].lower()
        for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()
        if "==" in line
    }
    extras = project["optional-dependencies"]
    core = [_requirement(text) for text in project["dependencies"]]
    installed = {
        _requirement(text) for extra in ("fit", "plots", "tensorboard", "dev", "docs") for text in extras[extra]
    }
    assert [name for name in core if not re.search(rf"^- `{name}`: .{{20,}}", changelog, re.MULTILINE)] == []
    assert sorted((installed | set(core)) - pins - {"aftershock"}) == []


def test_changelog_has_a_section_for_this_version() -> None:
    version = re.search(r'__version__ = "(.+)"', (PACKAGE / "_version.py").read_text("utf-8"))
    assert version is not None
    assert f"## {version[1]}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_every_room_has_its_api_page() -> None:
    """The docs' `% modules: ...` lines name all rooms there are, and none besides."""
    rooms = {_room(path) for path in PACKAGE.rglob("*.py")} - {"__init__", "__main__", "_version", "cli"}
    text = "\n".join(path.read_text("utf-8") for path in (ROOT / "docs").rglob("*.md"))
    assert set(" ".join(re.findall(r"^% modules: (.+)$", text, re.MULTILINE)).split()) == rooms


def _requirement(text: str) -> str:
    match = re.match(r"[A-Za-z0-9_.-]+", text)
    assert match is not None
    return match[0].lower()
