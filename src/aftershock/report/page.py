"""The report of a study: one self-contained HTML file that opens offline, its numbers as JSON, and figures on request.

The page is drawn from `numbers.study_numbers` alone and repeats that dict in `script#numbers`.
jinja2 is imported inside `write_report`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple

from aftershock._version import __version__
from aftershock.report import charts, paper, words
from aftershock.report.numbers import study_numbers

LOGIT_FLOOR, LOGIT_CEILING = 10.0, 1e4
"""The heat map's ends: a softmax is still soft at 10; above 1e4 every run of the paper diverged (figure 9)."""


class ReportPaths(NamedTuple):
    """What was written: the page, its numbers, and the figures (empty unless asked for)."""

    html: Path
    json: Path
    figures: tuple[Path, ...]


def write_report(
    study_folder: str | Path, *, out: str | Path | None = None, figures: Literal["off", "on"] = "off"
) -> ReportPaths:
    """Write `report.html` and `report.json` of a study into the folder `out` (default: `STUDY/report`).

    `figures="on"` also writes PNG and SVG figures into `out/figures` (needs matplotlib). Reads the store only, so it
    can be called while runs are still training; what is missing then is said on the page.

    Example:
        paths = write_report("studies/qk-norm")
        print(paths.html)

    Raises ValueError when there is no study, it lists no runs, or `figures="on"` without matplotlib.
    """
    if out is None and "://" in str(study_folder):
        raise ValueError(f"{study_folder}: the study is remote, so say where the report goes (out=FOLDER)")
    folder = Path(study_folder) / "report" if out is None else Path(out)
    numbers = study_numbers(study_folder)
    text = json.dumps(numbers, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    folder.mkdir(parents=True, exist_ok=True)
    drawn: tuple[Path, ...] = ()
    if figures == "on":
        from aftershock.report.figures import write_figures

        drawn = write_figures(numbers, folder / "figures")
    html = paper.write_whole(folder / "report.html", render_page(numbers, text))
    return ReportPaths(html=html, json=paper.write_whole(folder / "report.json", text), figures=drawn)


def render_page(numbers: Mapping[str, Any], text: str) -> str:
    """The whole page as ASCII HTML. `text` is `numbers` as JSON, which the page carries unchanged."""
    env = paper.environment()
    for name in ("rate", "number", "loss", "count", "duration"):
        env.filters[name] = getattr(words, name)
    env.filters["setting"] = _setting
    env.filters["whole_names"] = _whole_names
    env.filters["lower_first"] = lambda text: text[:1].lower() + text[1:]
    env.filters["heat"] = _heat
    env.globals.update(
        width=charts.WIDTH, height=charts.HEIGHT, left=charts.LEFT, right=charts.RIGHT, bottom=charts.BOTTOM
    )

    page = env.get_template("page.html.j2").render(
        n=numbers,
        json=paper.embedded(text),
        version=__version__,
        facts=_facts(numbers),
        columns=_COLUMNS,
        panels=charts.loss_panels(numbers),
        sensitivity=charts.sensitivity_panel(numbers),
        symbols=[charts.symbol(i) for i in range(len(numbers["arms"]))],
        arm_index={arm["arm"]: i for i, arm in enumerate(numbers["arms"])},
        points={(g["size"], g["arm"]): {p["lr"]: p for p in g["points"]} for g in numbers["groups"]},
        has_logits=any(run["peak_logit"] is not None for run in numbers["runs"]),
        style=paper.asset("templates/style.css"),
        curves_js=paper.asset("templates/curves.js"),
        tables_js=paper.asset("templates/tables.js"),
        uplot_js=paper.asset("vendor/uplot.min.js"),
        uplot_css=paper.asset("vendor/uplot.min.css"),
    )
    return paper.ascii_html(page)


class _Column(NamedTuple):
    title: str
    numeric: bool


_COLUMNS = (
    _Column("Run", False),
    _Column("Size", False),
    _Column("Arm", False),
    _Column("Rate", True),
    _Column("Seed", True),
    _Column("Status", False),
    _Column("Final loss", True),
    _Column("Diverged at", True),
    _Column("Max logit", True),
    _Column("Steps", True),
    _Column("Tokens", True),
    _Column("Time", True),
)


def _facts(numbers: Mapping[str, Any]) -> list[dict[str, str]]:
    """The strip under the headline: what was run."""
    counts, rates, sizes = numbers["counts"], numbers["rates"], numbers["sizes"]
    status = ", ".join(f"{n} {name}" for name, n in counts["status"].items())
    span = f"{words.rate(rates[0])} to {words.rate(rates[-1])}"
    facts = [
        {"name": "Runs", "value": str(counts["runs"]), "note": status},
        {"name": "Sizes", "value": str(len(sizes)), "note": ", ".join(size["size"] for size in sizes)},
        {"name": "Learning rates", "value": str(len(rates)), "note": span},
        {"name": "Seeds", "value": str(len(numbers["seeds"])), "note": ""},
    ]
    if counts["tokens"]:
        facts.append({"name": "Tokens trained on", "value": words.count(counts["tokens"]), "note": ""})
    return facts


def _whole_names(text: str) -> Any:
    """Keep hyphenated names on one line: `w64-d3` must not break after the hyphen."""
    from markupsafe import Markup, escape

    pieces = re.split(r"(\w+(?:-\w+)+)", text)
    names = (Markup('<span class="whole">{}</span>').format(piece) for piece in pieces[1::2])
    return Markup("").join(part for pair in zip_longest(map(escape, pieces[::2]), names, fillvalue="") for part in pair)


def _setting(value: Any) -> str:
    """A setting as it would stand in YAML: true, null, 0.0003."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value)


def _heat(value: float) -> float:
    """0 at `LOGIT_FLOOR` and below, 1 at `LOGIT_CEILING` and above, logarithmic between."""
    inside = min(max(value, LOGIT_FLOOR), LOGIT_CEILING)
    return math.log(inside / LOGIT_FLOOR) / math.log(LOGIT_CEILING / LOGIT_FLOOR)


def _replace(path: Path, text: str) -> Path:
    """Write whole or not at all: a page that is open in a browser is never half new."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, encoding="ascii")
    partial.replace(path)
    return path
