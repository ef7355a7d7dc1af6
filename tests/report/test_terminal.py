from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from aftershock.report.terminal import print_result, result_table


def _printed(folder: Path, width: int) -> str:
    out = io.StringIO()
    print_result(folder, console=Console(file=out, width=width, color_system=None))
    return out.getvalue()


def test_every_number_is_in_the_table(full_study: Path, numbers: dict[str, Any]) -> None:
    text = _printed(full_study, 140)
    for group in numbers["groups"]:
        (line,) = [row for row in text.splitlines() if row.split()[:2] == [group["size"], group["arm"]]]
        assert f"{group['lr_sensitivity']:.3f}" in line
        shown = ["x" if p["num_diverged"] == p["num_judged"] else f"{p['loss']:.3f}" for p in group["points"]]
        assert line.split()[2:9] == shown


def test_80_columns_cut_nothing(numbers: dict[str, Any]) -> None:
    out = io.StringIO()
    Console(file=out, width=80, color_system=None).print(result_table(numbers, width=80))
    text = out.getvalue()
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "\u2026" not in text
    assert all(word in text for word in ("no-qk-norm", "w64-d3", "3e-4", "sens."))


def test_missing_results_are_dots(build_study: Callable[..., Path]) -> None:
    folder = build_study(
        sizes=["w32-d2"], arms=["qk-norm"], seeds=[0], tensors=False,
        leave=lambda ref: "done" if ref.lr < 0.01 else "missing",
    )  # fmt: skip
    line, note = [row for row in _printed(folder, 140).splitlines() if row.startswith("w32-d2")]
    assert line.split()[5:] == [*["."] * 4, "none"]
    assert note == "w32-d2 qk-norm: 4 of 7 rates have no finished run"


def test_markup_in_names_is_text(tmp_path: Path) -> None:
    from aftershock.store.study import RunRef, write_manifest

    write_manifest(
        tmp_path, name="x", title="[red]", runs=[RunRef(run_id="a", size="[bold]s", arm="b", lr=0.1, seed=0)]
    )
    assert "[bold]s" in _printed(tmp_path, 120)


def test_no_study(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no study"):
        print_result(tmp_path)
