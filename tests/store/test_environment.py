"""What env.json says, against git itself and the running process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from aftershock.store.environment import describe_environment, git_commit


def _git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_oracle_commit_equals_git_rev_parse(tmp_path: Path) -> None:
    """On a branch, after packing refs, detached, in a linked work tree, and in a folder below."""
    _git(tmp_path, "init", "-q")
    assert git_commit(tmp_path) is None
    _git(tmp_path, "commit", "-q", "--allow-empty", "-m", "one")
    want = _git(tmp_path, "rev-parse", "HEAD")
    assert git_commit(tmp_path) == want
    _git(tmp_path, "pack-refs", "--all")
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert git_commit(tmp_path / "a" / "b") == want
    _git(tmp_path, "worktree", "add", "-q", "linked")
    assert git_commit(tmp_path / "linked") == want
    _git(tmp_path, "checkout", "-q", "--detach")
    assert git_commit(tmp_path) == want


def test_contract_environment_is_json_and_true() -> None:
    found = json.loads(json.dumps(describe_environment()))
    assert found["pid"] == os.getpid()
    assert found["cores"] == os.cpu_count()
    assert set(found["versions"]) == {"aftershock", "torch", "numpy", "duckdb", "safetensors", "fsspec"}
    assert found["versions"]["numpy"]
    assert found["cpu"]
