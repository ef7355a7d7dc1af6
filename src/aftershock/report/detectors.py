"""The page of the benchmark of detectors: one self-contained HTML file with the table and the precision-recall curves.

Drawn from the record alone, which it repeats in `script#numbers`. jinja2 is imported inside.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aftershock._version import __version__
from aftershock.bench import table
from aftershock.bench.records import Record, Row
from aftershock.bench.words import best_row, headline, standing
from aftershock.report import charts, paper, words
from aftershock.report.charts import Line, Mark, Panel, Tick
from aftershock.signals.detect.registry import OURS

NUM_CURVES = 6
"""Curves in a panel: as many as the style has colours that stay apart."""
NAME = "detectors.html"


def write_detectors_page(record: Record, folder: str | Path) -> Path:
    """Write `detectors.html` of a record into `folder`; it opens offline.

    Example:
        path = write_detectors_page(read_record(), "out/bench")
    """
    return paper.write_whole(Path(folder) / NAME, render_detectors(record))


def render_detectors(record: Record) -> str:
    """The page as ASCII HTML."""
    env = paper.environment()
    for name in ("signals_text", "nan_text", "bloom_text", "figure_text", "span_text"):
        env.filters[name] = getattr(table, name)
    # The shared file of chart macros names these filters, in macros that this page does not call.
    env.filters.update(loss=words.loss, number=words.number, setting=str, heat=float)
    env.globals.update(
        width=charts.WIDTH, height=charts.HEIGHT, left=charts.LEFT, right=charts.RIGHT, bottom=charts.BOTTOM
    )
    drawn = drawn_rows(record)
    page = env.get_template("detectors.html.j2").render(
        r=record,
        ours=OURS,
        headline=headline(record),
        standing=standing(record),
        legend=table.legend(record),
        rows=table.ordered_rows(record),
        alone=[row for row in record.rows if row.setup in ("single", "all")],
        panels=curve_panels(record, drawn),
        drawn=drawn,
        arms=[{"arm": row.detector, "settings": {}} for row in drawn],
        symbols=[charts.symbol(index) for index in range(len(drawn))],
        json=paper.embedded(table.record_json(record)),
        version=__version__,
        style=paper.asset("templates/style.css"),
    )
    return paper.ascii_html(page)


def drawn_rows(record: Record) -> list[Row]:
    """The best set-up of ours and of the other detectors with the largest areas at lead >= 1: those worth a curve."""
    best = [row for name in record.traits if (row := best_row(record, name)) is not None]
    others = sorted((row for row in best if row.detector != OURS), key=lambda row: -row.area[1])
    return [*(row for row in best if row.detector == OURS), *others][:NUM_CURVES]


def curve_panels(record: Record, rows: list[Row]) -> list[Panel]:
    """Precision against recall, one panel for each lead, all with the axes 0 to 1."""
    return [
        Panel(
            title=f"lead >= {lead}",
            subtitle="precision against recall",
            label=f"Precision against recall at lead >= {lead}; the table below holds the areas",
            x_ticks=tuple(Tick(at=_x(v), label=f"{v:g}") for v in (0.0, 0.25, 0.5, 0.75, 1.0)),
            y_ticks=tuple(Tick(at=_y(v), label=f"{v:g}") for v in (0.0, 0.25, 0.5, 0.75, 1.0)),
            rule_y=None,
            rule_label="",
            lines=tuple(_line(row, index, place) for index, row in enumerate(rows)),
        )
        for place, lead in enumerate(record.leads)
    ]


def _line(row: Row, index: int, place: int) -> Line:
    """The curve as the area counts it: at each recall the best precision of a setting with that recall or more."""
    spots = sorted((point.recall[place], point.precision[place]) for point in row.curve)
    path, before = "", 0.0
    for number, (recall, _) in enumerate(spots):
        if recall > before:
            best = max(precision for _, precision in spots[number:])
            path += f"{'L' if path else 'M'}{_x(before):.1f} {_y(best):.1f}H{_x(recall):.1f}"
            before = recall
    marks = tuple(_mark(row, index, place, point) for point in row.curve)
    return Line(arm=row.detector, index=index, path=path, band="", marks=marks)


def _mark(row: Row, index: int, place: int, point: Any) -> Mark:
    recall, precision = point.recall[place], point.precision[place]
    title = (
        f"{row.detector}, threshold {point.threshold:g}: recall {recall:.2f}, precision {precision:.2f}, "
        f"{point.false_rate:.2g} false alarms per 10,000"
    )
    return Mark(title=title, failed=False, path=charts.symbol_at(index, _x(recall), _y(precision)))


def _x(share: float) -> float:
    return charts.LEFT + share * (charts.WIDTH - charts.LEFT - charts.RIGHT)


def _y(share: float) -> float:
    return charts.HEIGHT - charts.BOTTOM - share * (charts.HEIGHT - charts.TOP - charts.BOTTOM)
