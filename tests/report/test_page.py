from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aftershock.report.page import write_report
from aftershock.store.study import RunRef, write_manifest

ARGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class Seen:
    """A page opened from file:// with everything it complained about or asked for."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.faults: list[str] = []
        page.on("console", lambda message: self.faults.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        page.on("request", lambda request: self._ask(request.url))

    def _ask(self, url: str) -> None:
        if not url.startswith(("file:", "data:")):
            self.faults.append(f"request: {url}")

    def open(self, path: Path) -> Any:
        self.page.goto(path.resolve().as_uri())
        return self.page


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as tools:
        chromium = tools.chromium.launch(executable_path="/usr/bin/chromium", args=ARGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def report(full_study: Path) -> Path:
    return write_report(full_study).html


def _open(browser: Any, path: Path, *, width: int = 1200, scheme: str = "light") -> Seen:
    seen = Seen(browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme))
    seen.open(path)
    return seen


def _embedded(html: str) -> Any:
    found = re.search(r'<script type="application/json" id="numbers"[^>]*>(.*?)</script>', html, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_the_page_holds_report_json(report: Path) -> None:
    """equivalence: page and file, and both are ASCII."""
    html = report.read_text(encoding="ascii")
    assert _embedded(html) == json.loads(report.with_name("report.json").read_text(encoding="ascii"))


def test_nothing_in_the_page_points_outside(report: Path) -> None:
    html = report.read_text(encoding="ascii")
    assert re.findall(r"""(?:src|href)\s*=\s*["'](?!#|data:)""", html) == []
    assert re.findall(r"@import|url\((?!data:)", html) == []


def test_written_where_asked_and_whole(build_study: Callable[..., Path], tmp_path: Path) -> None:
    """contract: with figures on request, without leftovers."""
    pytest.importorskip("matplotlib")
    folder, out = build_study(sizes=["w32-d2"], rates=[0.01, 0.1], seeds=[0], tensors=False), tmp_path / "deep" / "er"
    paths = write_report(folder, out=out)
    assert paths == (out / "report.html", out / "report.json", ())
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.json"]
    figures = write_report(folder, out=out, figures="on").figures
    assert [path.parent for path in figures] == [out / "figures"] * 6


def test_a_remote_study_needs_a_place() -> None:
    with pytest.raises(ValueError, match="out=FOLDER"):
        write_report("memory://study")


def test_names_cannot_break_the_page(tmp_path: Path) -> None:
    """planted: a script in a title, in an arm, and the end of the JSON block."""
    evil = "</script><script>alert(1)</script>"
    write_manifest(tmp_path, name=evil, title=evil, runs=[RunRef(run_id="a", size="s", arm=evil, lr=0.1, seed=0)])
    html = write_report(tmp_path).html.read_text(encoding="ascii")
    assert "<script>alert" not in html
    assert _embedded(html)["study"]["title"] == evil


def test_a_title_beyond_ascii_is_kept(tmp_path: Path) -> None:
    """round trip."""
    title = "na\u00efve \u03ba"
    write_manifest(tmp_path, name="x", title=title, runs=[RunRef(run_id="a", size="s", arm="a", lr=0.1, seed=0)])
    html = write_report(tmp_path).html.read_text(encoding="ascii")
    assert "<title>na&#239;ve &#954;</title>" in html
    assert _embedded(html)["study"]["title"] == title


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_offline_without_a_word(browser: Any, report: Path, scheme: str) -> None:
    seen = _open(browser, report, scheme=scheme)
    seen.page.wait_for_selector("[data-testid=explorer] canvas")
    assert seen.page.locator("[data-testid=explorer] canvas").count() == 4
    background = seen.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) > 600) == (scheme == "light")
    assert seen.faults == []


@pytest.mark.browser
def test_the_numbers_on_the_page_are_those_of_report_json(browser: Any, report: Path) -> None:
    """equivalence: every visible loss, sensitivity and status against the file."""
    numbers = json.loads(report.with_name("report.json").read_text(encoding="ascii"))
    page = _open(browser, report).page
    assert page.get_by_test_id("headline").inner_text() == numbers["headline"]["main"]
    assert page.get_by_test_id("details").inner_text() == " ".join(numbers["headline"]["details"])
    rows = page.locator("[data-testid=results] tbody tr").all()
    table = page.locator("[data-testid=sensitivity] tbody tr").all()
    assert len(rows) == len(table) == len(numbers["groups"])
    for row, sensitivity, group in zip(rows, table, numbers["groups"], strict=True):
        cells = [cell.inner_text().split()[0] for cell in row.locator("td.num").all()]
        losses = ["\u00d7" if p["num_diverged"] == p["num_judged"] else f"{p['loss']:.3f}" for p in group["points"]]
        assert [cell[: len(text)] for cell, text in zip(cells, losses, strict=True)] == losses
        assert sensitivity.locator("b").inner_text() == f"{group['lr_sensitivity']:.3f}"
    runs = page.evaluate(
        "[...document.querySelectorAll('#run-table tbody tr')].map(r => [r.dataset.run, r.cells[5].innerText, "
        "r.cells[6].dataset.value === '' ? null : Number(r.cells[6].dataset.value)])"
    )
    for (run_id, status, loss), run in zip(runs, numbers["runs"], strict=True):
        assert (run_id, loss) == (run["run_id"], run["final_loss"])
        assert status.startswith(run["status"])


@pytest.mark.browser
@pytest.mark.parametrize("width", [360, 760, 1600])
def test_no_width_makes_the_page_scroll_sideways(browser: Any, report: Path, width: int) -> None:
    page = _open(browser, report, width=width).page
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.browser
def test_curves_choose_and_read_by_keyboard(browser: Any, report: Path) -> None:
    seen = _open(browser, report)
    page = seen.page
    page.get_by_test_id("pick-signal").select_option("output/blocks.1/rms")
    page.get_by_test_id("pick-size").select_option("w32-d2")
    page.get_by_test_id("pick-arm").get_by_text("no-qk-norm", exact=True).focus()
    page.keyboard.press("Enter")
    page.get_by_test_id("pick-rate").get_by_text("0.01", exact=True).click()
    assert page.locator("[data-testid=explorer] figure").count() == 1
    plot = page.locator(".plot").nth(1)
    assert plot.get_attribute("aria-label") == "output/blocks.1/rms, 2 runs; arrow keys read values"
    plot.focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
    numbers = json.loads(report.with_name("report.json").read_text(encoding="ascii"))
    run = next(r for r in numbers["runs"]
               if (r["size"], r["arm"], r["lr"], r["seed"]) == ("w32-d2", "no-qk-norm", 0.01, 1))  # fmt: skip
    value = numbers["series"]["runs"][run["run_id"]]["signals"]["output/blocks.1/rms"][1][2]
    shown = page.locator(".readout").nth(1).inner_text()
    assert shown == f"{float(f'{value:.4g}'):g} at step 20, rate 0.01, seed 1"
    assert seen.faults == []


@pytest.mark.browser
def test_runs_sort_filter_and_open_their_config(browser: Any, report: Path) -> None:
    seen = _open(browser, report)
    page = seen.page
    first = page.locator("#run-table tbody tr th").first
    page.get_by_role("button", name="Final loss").click()
    losses = page.evaluate("[...document.querySelectorAll('#run-table tbody tr')].map(r => r.cells[6].dataset.value)")
    known = [float(text) for text in losses if text]
    assert known == sorted(known)
    assert losses[-10:] == [""] * 10
    page.get_by_test_id("filter").fill("diverged 0.03")
    assert page.locator("#filter-count").inner_text() == "2 of 56 runs"
    page.get_by_test_id("filter").fill("")
    first.get_by_role("button").click()
    config = page.get_by_test_id("config")
    assert "optim.weight_decay" in config.inner_text()
    assert any("model.qk_norm" in text for text in config.locator(".own").all_inner_texts())
    first.get_by_role("button").click()
    assert config.count() == 0
    assert seen.faults == []


@pytest.mark.browser
@pytest.mark.parametrize("state", ["missing", "open"])
def test_a_study_without_results_still_opens(browser: Any, build_study: Callable[..., Path], state: str) -> None:
    folder = build_study(sizes=["w32-d2"], rates=[0.01, 0.1], seeds=[0], leave=lambda ref: state, tensors=False)
    seen = _open(browser, write_report(folder).html)
    assert seen.page.get_by_test_id("headline").inner_text().startswith("No run has finished yet: 4 ")
    assert seen.faults == []


@pytest.mark.browser
def test_one_size_one_arm_one_seed(browser: Any, build_study: Callable[..., Path]) -> None:
    folder = build_study(sizes=["w32-d2"], arms=["qk-norm"], rates=[0.01, 0.1], seeds=[0], tensors=False)
    seen = _open(browser, write_report(folder).html, width=390)
    assert seen.page.get_by_test_id("headline").inner_text().startswith("No run fails")
    assert seen.faults == []
