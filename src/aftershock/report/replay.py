"""The page of a replay: one self-contained HTML file with the verdict, its evidence and the figures.

Drawn from the explanation's data alone, which it repeats in `script#numbers`. jinja2 is imported inside.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from aftershock._version import __version__
from aftershock.replay import table
from aftershock.replay.written import RECORDED, explanation_json
from aftershock.report import paper, words
from aftershock.report import replay_axes as axes
from aftershock.report import replay_figures as figures
from aftershock.report import replay_maps as maps

if TYPE_CHECKING:
    from aftershock.replay.explain import Explanation

NAME = "replay.html"
ALL_POINTS, MOST_POINTS, LEAST_POINTS = 12_000, 400, 60
"""Points of all curves together, and of one: a page stays well below 1 MB."""
MOST_PLACES = 16
"""Places a level that the heat map draws."""
CURVES_OF = {"gone": "Without the spike", "later": "Later", "stays": "With the spike"}


def write_replay_page(explanation: Explanation, folder: str | Path) -> Path:
    """Write `replay.html` of an explanation into `folder`; it opens offline.

    Example:
        path = write_replay_page(replay("guard/incidents/812-spike", workload), "out/replay")
    """
    return paper.write_whole(Path(folder) / NAME, render_replay(explanation))


def render_replay(explanation: Explanation) -> str:
    """The page as ASCII HTML."""
    points = max(LEAST_POINTS, min(MOST_POINTS, ALL_POINTS // (len(explanation.curves) + RECORDED)))
    text = explanation_json(explanation, points=points, places=MOST_PLACES)
    data = json.loads(text)
    env = paper.environment()
    env.filters.update(number=words.number, duration=words.duration, percent="{:.0%}".format, step=_step)
    env.filters.update(excess=_excess, effect=_effect, cost=_cost, token=_token)
    env.globals.update(buckets_of=_buckets)
    env.filters.update(figure=_figure, share=_share, signed=lambda value: table.signed(float(value)))
    order = [one.name for one in table.ordered(explanation)]
    by_name = {cell["name"]: cell for cell in data["cells"]}
    cells = [by_name[name] for name in order]
    loss = figures.loss_figure(data, [name for name in order if by_name[name]["response"] is not None])
    drawn = {
        "loss": loss,
        "picks": _picks(loss.curves, by_name),
        "forest": figures.forest(data),
        "heat": maps.heat_map(data),
        "line": maps.timeline(data),
    }
    said = {
        "lead": _lead(data),
        "window_words": table.window_words(explanation),
        "shams_words": table.shams_words(explanation),
        "legend": words.sentence(table.legend(explanation)),
        "left_out": table.left_out_words(explanation),
        "guilty_words": table.guilty_words(explanation.guilty),
    }
    sizes = {
        "width": axes.WIDTH,
        "left": axes.LEFT,
        "right": axes.RIGHT,
        "loss_height": figures.LOSS_HEIGHT,
        "loss_top": figures.LOSS_TOP,
        "loss_bottom": figures.LOSS_BOTTOM,
        "forest_width": figures.FOREST_WIDTH,
        "forest_height": figures.FOREST_HEIGHT,
        "labels": maps.LABELS,
    }
    page = env.get_template("replay.html.j2").render(
        d=data,
        cells=cells,
        errors=[cell for cell in cells if cell["error"]],
        facts=_facts(data),
        sections=_sections(data, drawn),
        most_classes=len(table.shown_classes(explanation.verdict)),
        json=paper.embedded(text),
        version=__version__,
        style=paper.asset("templates/style.css"),
        own_style=paper.asset("templates/replay.css"),
        replay_js=paper.asset("templates/replay.js"),
        **drawn,
        **said,
        **sizes,
    )
    return paper.ascii_html(page)


def _lead(data: Mapping[str, Any]) -> str:
    """What the verdict says beyond the headline."""
    rest = data["verdict"]["words"].removeprefix(data["headline"]).lstrip(":;. ")
    return f"{rest[:1].upper()}{rest[1:]}"


def _picks(
    curves: Sequence[figures.Curve], cells: Mapping[str, Mapping[str, Any]]
) -> list[tuple[str, list[figures.Curve]]]:
    """The curves to choose from, in groups."""
    found: dict[str, list[figures.Curve]] = {"Recorded and unchanged": []}
    found |= {title: [] for title in CURVES_OF.values()} | {"Shams": []}
    for curve in curves:
        if curve.group in ("recorded", "control"):
            found["Recorded and unchanged"].append(curve)
        elif curve.group == "sham":
            found["Shams"].append(curve)
        else:
            found[CURVES_OF[cells[curve.name]["spike"]]].append(curve)
    return list(found.items())


def _facts(data: Mapping[str, Any]) -> list[dict[str, str]]:
    """The strip under the headline."""
    controls, shams = data["controls"], data["shams"]
    ran = [cell for cell in data["cells"] if cell["spike"] and cell["family"] != "sham"]
    gone = sum(cell["spike"] == "gone" for cell in ran)
    back = f"{controls['came_back']} of {controls['runs']} spike"
    facts = [
        {"name": "Verdict", "value": data["verdict"]["kind"].replace("_", " "), "note": ""},
        {"name": "Unchanged replays", "value": back, "note": controls["kind"].replace("_", " ")},
    ]
    if shams is not None:
        facts.append({"name": "Shams", "value": f"{shams['spiking']} of {shams['number']} spike", "note": ""})
    if ran:
        facts.append({"name": "Changes tried", "value": str(len(ran)), "note": f"{gone} without the spike"})
    return [*facts, {"name": "Took", "value": words.duration(data["seconds"]), "note": ""}]


def _sections(data: Mapping[str, Any], drawn: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Links to the sections that there are."""
    there = [
        ("loss", "Loss", True),
        ("causes", "Causes", data["verdict"]["ranked"]),
        ("cells", "Changes", data["cells"]),
        ("remedies", "Remedies", data["remedies"]),
        ("places", "Where", drawn["heat"]),
        ("when", "Until when", drawn["line"]),
        ("thinking", "Predictions", data["thinking"]),
        ("rows", "Rows", data["guilty"]),
        ("method", "Notes", True),
    ]
    return [(id, title) for id, title, is_there in there if is_there]


def _step(value: int | None) -> str:
    return "-" if value is None else str(value)


def _excess(value: float | str | None) -> str:
    return table.excess_text(None if value is None else float(value))


def _effect(effect: Mapping[str, Any] | None) -> str:
    if effect is None:
        return "-"
    middle, low, high = (table.signed(float(effect[key])) for key in ("log_peak", "low", "high"))
    return f"{middle} [{low}, {high}]"


def _cost(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"


def _figure(value: float | str | None) -> str:
    """A number that may not be finite."""
    return "not finite" if isinstance(value, str) else words.number(value)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _token(text: str) -> str:
    """A token's text with its line ends to be seen."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


class BucketRow(NamedTuple):
    """One bucket at every point, None where no prediction of it was finite."""

    label: str
    count: int
    losses: list[float | None]


def _buckets(points: Sequence[Mapping[str, Any]], name: str) -> list[BucketRow]:
    found = [{bucket["low"]: bucket for bucket in point[name]} for point in points]
    rows = []
    for low, bucket in (found[0] if found else {}).items():
        high = bucket["high"] - 1
        label = f"{low}" if high == low else f"{low} to {high}"
        losses = [point[low]["loss"] if low in point else None for point in found]
        rows.append(BucketRow(label, bucket["count"], losses))
    return rows
