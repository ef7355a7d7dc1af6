"""The page of a replay: its numbers are the JSON's, it opens offline, in both colour schemes, and is read by keys."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aftershock.replay.explain import Explanation
from aftershock.replay.table import print_explanation
from aftershock.replay.verdict import Verdict
from aftershock.replay.written import explanation_data
from aftershock.report import replay_figures, replay_maps
from aftershock.report.replay import render_replay, write_replay_page
from aftershock.report.replay_axes import Axis, round_values

ARGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


@pytest.fixture(scope="module")
def page(explanation: Explanation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_replay_page(explanation, tmp_path_factory.mktemp("replay"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as tools:
        chromium = tools.chromium.launch(executable_path="/usr/bin/chromium", args=ARGS)
        yield chromium
        chromium.close()


def _open(browser: Any, path: Path, *, width: int = 1200, scheme: str = "light") -> tuple[Any, list[str]]:
    """The page from file://, and everything that it complained about or asked for."""
    page, faults = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme), list[str]()
    page.on("console", lambda message: faults.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: faults.append(f"error: {error}"))
    page.on("request", lambda asked: None if asked.url.startswith(("file:", "data:")) else faults.append(asked.url))
    page.goto(path.resolve().as_uri())
    return page, faults


def _embedded(html: str) -> Any:
    found = re.search(r'<script type="application/json" id="numbers"[^>]*>(.*?)</script>', html, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


# ------------------------------------------------------------------------------------------------------ without one


def test_the_page_holds_the_explanation(page: Path, explanation: Explanation) -> None:
    """equivalence: what is embedded is the explanation's JSON; nothing points outside; it is small."""
    html = page.read_text(encoding="ascii")
    data = _embedded(html)
    whole = explanation_data(explanation)
    assert {name: data[name] for name in whole if name not in ("curves", "recorded")} == {
        name: value for name, value in whole.items() if name not in ("curves", "recorded")
    }
    assert re.findall(r"""(?:src|href)\s*=\s*["'](?!#|data:)""", html) == []
    assert re.findall(r"@import|url\((?!data:)", html) == []
    assert len(html) < 300_000


def test_a_large_one_stays_small(explanation: Explanation) -> None:
    """contract: 60 cells of 5,000 steps and 400 places of 500 steps are below 1 MB."""
    assert explanation.places is not None
    curve = {step: 1 + math.sin(step / 9) ** 2 for step in range(5000)}
    move = explanation.places.moves[-1]
    wide = explanation.places.z_KPT[:, -1:, :1].repeat(400, axis=1).repeat(500, axis=2)
    places = explanation.places._replace(
        steps=range(500), moves=tuple(move._replace(place=f"a.module.{i}.weight") for i in range(400)), z_KPT=wide
    )
    cells = tuple(explanation.cells[3]._replace(name=f"lr*{i}") for i in range(60))
    many = explanation._replace(recorded=curve, curves={cell.name: curve for cell in cells}, cells=cells, places=places)
    assert len(render_replay(many)) < 1_000_000


def test_names_cannot_break_the_page(explanation: Explanation) -> None:
    """planted: a script in a note, in a cell's name, and the end of the JSON block."""
    evil = "</script><script>alert(1)</script>"
    cells = (explanation.cells[0]._replace(name=evil), *explanation.cells[1:])
    html = render_replay(explanation._replace(notes=(evil,), cells=cells))
    assert "<script>alert" not in html
    assert _embedded(html)["notes"] == [evil]


def test_what_is_not_finite_or_not_there_is_drawn_too(explanation: Explanation) -> None:
    """contract: a diverging run, shams without a finite peak, no answers, no parts: no figure asks for more."""
    response = explanation.cells[0].response
    assert response is not None
    lost = response._replace(peak_excess=math.inf, nonfinite_at=response.peak_step)
    cells = tuple(one._replace(response=lost) if one.family == "sham" else one for one in explanation.cells)
    curves = explanation.curves | {"lr*0.5": {80: 1.0, 81: math.nan, 82: 2.0}}
    base = explanation.baseline._replace(height=math.inf)
    html = render_replay(explanation._replace(cells=cells, curves=curves, baseline=base))
    assert "not finite" in html
    assert 'class="x-mark"' in html
    verdict = Verdict("not_reproducible", (), 1.0, (), (), "Not reproducible: it does not come back.")
    bare = explanation._replace(
        verdict=verdict, cells=(), remedies=(), places=None, no_return=None, thinking=None, guilty=None, left_out={},
        curves={"control#1": explanation.curves["control#1"]},
    )  # fmt: skip
    html = render_replay(bare)
    assert re.findall(r'<section id="(\w+)"', html) == ["loss", "method"]
    assert ">Not reproducible</h1>" in html


# ---------------------------------------------------------------------------------------------------------- geometry


def test_an_axis_keeps_order_and_ends() -> None:
    """property: linear and by logs; what lies beyond is drawn just beyond."""
    for log in (False, True):
        low, high = (math.log(0.1), math.log(100.0)) if log else (0.1, 100.0)
        axis = Axis(low, high, 10.0, 110.0, log)
        assert axis.at(0.1) == pytest.approx(10.0)
        assert axis.at(100.0) == pytest.approx(110.0)
        assert 10 < axis.at(1.0) < axis.at(2.0) < 110
        assert axis.at(1e9) == pytest.approx(115.0)
    assert round_values(0.0, 1.0, most=5) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]


def test_the_forest_is_the_effects(explanation: Explanation) -> None:
    """equivalence: marks in the order of the effects, shams in their band, what is gone on the shaded side."""
    data = explanation_data(explanation)
    drawn = replay_figures.forest(data)
    assert drawn is not None
    assert drawn.band is not None
    assert drawn.gone is not None
    by_effect = sorted(data["cells"], key=lambda cell: cell["effect"]["log_peak"])
    places = [drawn.rows[cell["name"]].x for cell in by_effect]
    assert places == sorted(places)
    for cell in data["cells"]:
        x = drawn.rows[cell["name"]].x
        assert (x < drawn.gone) == (cell["spike"] == "gone")
        # Both were rounded to six digits, which is less than a hundredth of a unit.
        assert cell["family"] != "sham" or drawn.band[0] - 0.01 <= x <= drawn.band[1] + 0.01


def test_the_heat_map_has_a_stroke_where_a_place_is_out_of_its_band(explanation: Explanation) -> None:
    """equivalence: painted steps, counted from the strokes, are those with |z| of 1 and more."""
    data = explanation_data(explanation)
    drawn = replay_maps.heat_map(data)
    assert drawn is not None
    assert [row.title for row in drawn.rows] == [move["place"] for move in data["places"]["moves"]]
    start, stop = data["places"]["steps"]
    for kind, panel, paths in zip(("gradient", "update"), drawn.panels, drawn.paths, strict=True):
        ends = [(float(a), float(b)) for a, b in re.findall(r"M([\d.]+) [\d.]+H([\d.]+)", "".join(paths))]
        painted = sum(b - a for a, b in ends) / (panel[1] - panel[0]) * (stop - start)
        wanted = sum(abs(float(z)) >= 1 for row in data["places"]["z"][kind] for z in row)
        assert painted == pytest.approx(wanted, abs=0.01 * len(ends) + 1e-9)  # a tenth of a unit at each end


def test_the_timeline_ends_where_the_remedy_does(explanation: Explanation) -> None:
    """equivalence."""
    data = explanation_data(explanation)
    drawn = replay_maps.timeline(data)
    assert drawn is not None
    assert [row.name for row in drawn.rows] == ["a change of 1 ulp", *data["no_return"]["remedies"]]
    skip = drawn.rows[1]
    assert skip.can is not None
    assert skip.open is None
    assert max(skip.yes) < skip.can[1]
    assert all(x > skip.can[1] for x in skip.no)
    assert replay_maps.timeline(data | {"no_return": None}) is None


# ------------------------------------------------------------------------------------------------------- in a browser


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_offline_without_a_word(browser: Any, page: Path, scheme: str) -> None:
    """contract: no request, no complaint, ground and ink as the reader's system has them."""
    opened, faults = _open(browser, page, scheme=scheme)
    colours = opened.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    ground, ink = (sum(map(int, re.findall(r"\d+", colour))) for colour in colours)
    assert (ground > 600 > 300 > ink) if scheme == "light" else (ground < 150 < 600 < ink)
    assert opened.locator("svg .curve").count() == len(_embedded(page.read_text("ascii"))["curves"]) + 1
    assert faults == []


@pytest.mark.browser
def test_the_numbers_on_the_page_are_the_jsons(browser: Any, page: Path) -> None:
    """equivalence: headline, shares, every cell, remedies, places and predictions, as they are to be seen."""
    data = _embedded(page.read_text(encoding="ascii"))
    opened, _ = _open(browser, page)
    seen = lambda name: opened.get_by_test_id(name)  # noqa: E731
    head = seen("headline").inner_text()
    assert head == data["headline"]
    assert f"{head}: {seen('verdict').inner_text()}".lower() == data["verdict"]["words"].lower()
    shares = [row.split("\t") for row in seen("causes").locator("tbody tr").all_inner_texts()]
    assert [text.strip() for text in shares.pop()[:2]] == ["none", f"{data['verdict']['unknown']:.0%}"]
    for row, one in zip(shares, data["verdict"]["ranked"][: len(shares)], strict=True):
        assert [text.strip() for text in row[:3]] == [one["cause"], f"{one['share']:.0%}", one["meaning"]]
    cells = {cell["name"]: cell for cell in data["cells"]}
    rows = [row.split("\t") for row in seen("cells").locator("tbody tr").all_inner_texts()]
    assert sorted(row[0].strip() for row in rows) == sorted(cells)
    for row in rows:
        cell = cells[row[0].strip()]
        effect = [f"{round(cell['effect'][key], 2) + 0.0:+.2f}" for key in ("log_peak", "low", "high")]
        assert row[1:5] == [
            cell["family"],
            cell["spike"],
            f"{cell['response']['peak_excess']:.2f}",
            f"{effect[0]} [{effect[1]}, {effect[2]}]",
        ]
    assert seen("remedies").locator("tbody code").all_inner_texts()[:2] == ["skip", "Ladder()"]
    assert seen("places").inner_text() == data["places"]["words"]
    points = [row.split("\t") for row in seen("thinking").locator("tbody tr").all_inner_texts()]
    assert [row[:2] for row in points] == [[p["name"], str(p["step"])] for p in data["thinking"]["points"]]
    assert "step 100: row 5." in seen("guilty").inner_text()
    signs = seen("evidence").locator("td.sign.for").count()
    shown = [one["cause"] for one in data["verdict"]["ranked"][: len(shares)]]
    assert signs == sum(a["sides"].get(cause) == "for" for a in data["verdict"]["answers"] for cause in shown)


@pytest.mark.browser
def test_curves_are_chosen_and_read_by_keyboard(browser: Any, page: Path) -> None:
    """contract: a chip shows its curve in a colour of its own, arrows walk over the steps and read the JSON."""
    data = _embedded(page.read_text(encoding="ascii"))
    opened, faults = _open(browser, page)
    curve = opened.locator('g.curve[data-curve="lr*0.5"]')
    assert not curve.is_visible()
    opened.locator('#picks button[data-curve="lr*0.5"]').focus()
    opened.keyboard.press("Enter")
    assert curve.is_visible()
    shown = opened.locator("g.curve.cell:not(.off)").evaluate_all("all => all.map(g => g.getAttribute('class'))")
    assert len({re.findall(r"arm-\d", text)[0] for text in shown}) == len(shown) == 2
    opened.get_by_test_id("loss").focus()
    for key in ("ArrowRight", "ArrowLeft", "ArrowRight"):
        opened.keyboard.press(key)
    told = opened.locator("#readout").inner_text()
    onset = data["window"]["onset"]
    assert told.startswith(f"step {onset}:")
    own = data["curves"]["lr*0.5"]
    value = own["losses"][own["steps"].index(onset)]
    assert f"lr*0.5 {float(f'{value:.4g}'):g}" in told
    opened.locator('#picks button[data-curve="recorded"]').click()
    assert not opened.locator("#readout").get_by_text("recorded").is_visible()
    assert faults == []


@pytest.mark.browser
@pytest.mark.parametrize("width", [360, 760, 1600])
def test_no_width_makes_the_page_scroll_sideways(browser: Any, page: Path, width: int) -> None:
    """contract: figures and tables scroll within themselves."""
    opened, _ = _open(browser, page, width=width)
    assert opened.evaluate("document.documentElement.scrollWidth") <= width


def test_the_terminal_says_the_same(explanation: Explanation, capsys: pytest.CaptureFixture[str], page: Path) -> None:
    """equivalence: verdict and shams are word for word on both."""
    print_explanation(explanation)
    told = " ".join(capsys.readouterr().out.split())
    html = page.read_text(encoding="ascii").replace("&#39;", "'")
    for words in (explanation.words.splitlines()[1], "Shams: 3 of 3 still spike"):
        assert words in told
        assert words in html
