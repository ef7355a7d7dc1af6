from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from aftershock.report.figures import write_figures
from aftershock.report.numbers import study_numbers


def test_png_and_svg_of_each(numbers: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    written = write_figures(numbers, tmp_path / "a")
    assert [path.name for path in written] == [
        f"{name}.{suffix}" for name in ("loss", "sensitivity", "logits") for suffix in ("png", "svg")
    ]
    assert all(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for path in written if path.suffix == ".png")
    text = " ".join(ElementTree.parse(tmp_path / "a" / "loss.svg").getroot().itertext())
    assert "no-qk-norm" in text
    assert "3e-4" in text


def test_the_same_numbers_give_the_same_svg(numbers: dict[str, Any], tmp_path: Path) -> None:
    """equivalence: a figure under version control changes only when its numbers do."""
    pytest.importorskip("matplotlib")
    first, second = write_figures(numbers, tmp_path / "a"), write_figures(numbers, tmp_path / "b")
    assert [p.read_bytes() for p in first if p.suffix == ".svg"] == [
        p.read_bytes() for p in second if p.suffix == ".svg"
    ]


def test_without_data_nothing_is_drawn(build_study: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = build_study(sizes=["w32-d2"], leave=lambda ref: "missing")
    assert write_figures(study_numbers(folder), tmp_path) == ()


def test_without_matplotlib_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="pip install 'aftershock\\[plots\\]'"):
        write_figures({}, tmp_path)
