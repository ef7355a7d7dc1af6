"""The README's examples: its Python runs as printed, its commands exist with the flags shown."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text(encoding="utf-8") if README.exists() else ""

pytestmark = pytest.mark.skipif(not TEXT, reason="README.md is not written yet")


class Block(NamedTuple):
    """One fenced block: its first line's number in the file, and its text."""

    line: int
    text: str


def _blocks(language: str, text: str) -> list[Block]:
    found = re.finditer(rf"^```{language}[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [Block(text.count("\n", 0, match.start(1)) + 1, match[1]) for match in found]


def _commands(text: str) -> list[list[str]]:
    """The words of each `aftershock ...` line, joined over backslashes, cut at comments, pipes and redirections."""
    lines = (
        "\n".join(block.text for block in _blocks("(?:bash|sh|console|shell)", text)).replace("\\\n", " ").splitlines()
    )
    commands = []
    for line in lines:
        words = shlex.split(line.removeprefix("$ ").strip(), comments=True)
        if words and Path(words[0]).name == "aftershock":
            stop = next((i for i, word in enumerate(words) if re.fullmatch(r"[|;&]+|\d?>+.*|<", word)), len(words))
            commands.append(words[1:stop])
    return commands


def _run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    source = str(README.parent / "src")
    env = os.environ | {"PYTHONPATH": source, "COLUMNS": "200", "NO_COLOR": "1", "MPLBACKEND": "agg"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=cwd, env=env, timeout=300)


def _fault(words: list[str], usage: str) -> str | None:
    """What is wrong with `aftershock <words>` by the help text it answered with, or None."""
    head = re.split(r"[{\[]", usage[usage.index("usage:") :].partition("\n")[0])[0].split()
    if words and not words[0].startswith("-") and words[0] not in head:
        return f"unknown command {words[0]!r}"
    flags = [word.partition("=")[0] for word in words if re.match(r"--[a-z]", word)]
    unknown = [flag for flag in flags if not re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", usage)]
    return f"unknown flags {unknown}" if unknown else None


def test_python_blocks_run_as_printed(tmp_path: Path) -> None:
    """All blocks in order as one script, as a reader would type them; its line numbers are the README's own."""
    script = [""] * (TEXT.count("\n") + 1)
    for block in _blocks("python", TEXT):
        lines = block.text.splitlines()
        script[block.line - 1 : block.line - 1 + len(lines)] = lines
    (tmp_path / "readme.py").write_text("\n".join(script) + "\n", encoding="utf-8")
    done = _run(["readme.py"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr


@pytest.mark.parametrize("words", _commands(TEXT), ids=" ".join)
def test_commands_exist_with_their_flags(words: list[str], tmp_path: Path) -> None:
    done = _run(["-m", "aftershock", *words, "--help"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert _fault(words, done.stdout) is None, done.stdout


def test_make_targets_exist() -> None:
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))
    assert set(re.findall(r"^(?:\$ )?make ([a-z][\w-]*)", TEXT, re.MULTILINE)) <= targets


def test_local_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", TEXT)
    assert [link for link in links if not (README.parent / link).exists()] == []


def test_a_wrong_command_or_flag_is_found() -> None:
    """planted: the checks above would notice a renamed command and a renamed flag, and pass the right ones."""
    usage = "usage: aftershock sweep [-h] --lrs FLOAT\n  --lrs FLOAT  rates\n  --out-dir PATH\n"
    assert _fault(["sweep", "--lrs", "0.1", "--out-dir=x"], usage) is None
    assert _fault(["sweep", "--lr", "0.1"], usage) == "unknown flags ['--lr']"
    assert _fault(["sweep", "--out"], usage) == "unknown flags ['--out']"
    assert _fault(["swep"], "usage: aftershock [-h] {sweep,report}\n") == "unknown command 'swep'"
    text = "```bash\npip install x\n$ aftershock sweep --lrs 0.1 \\\n  0.3 | tee log  # note\n```\n"
    assert _commands(text) == [["sweep", "--lrs", "0.1", "0.3"]]
    assert _blocks("python", "a\n```python\nx = 1\n```\n") == [Block(3, "x = 1\n")]
