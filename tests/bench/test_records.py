from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from aftershock.bench import detectors, recorded
from aftershock.bench.alarms import run_alarms
from aftershock.bench.command import Bench
from aftershock.bench.corpus import Trace
from aftershock.bench.detectors import make_record, split
from aftershock.bench.records import NAME, Record, read_record, write_record
from aftershock.bench.table import print_record, record_json
from aftershock.bench.words import headline, standing
from aftershock.report.detectors import render_detectors
from aftershock.signals.detect.registry import OURS

JUDGED = (OURS, "lightning", "zclip", "olmo-skip")


@pytest.fixture(scope="module")
def record(traces: list[Trace]) -> Record:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detectors, "SWEEPS", {name: detectors.SWEEPS[name] for name in JUDGED})
        patch.setattr(recorded, "SEEDS", range(3))
        alarms = [run_alarms(trace, JUDGED) for trace in traces]
        halves = (split(traces, alarms, (0, 2)), split(traces, alarms, (1, 3)))
        return make_record(*halves, tuning_seeds=(0, 2), scoring_seeds=(1, 3))


def test_a_record_comes_back(record: Record, tmp_path: Path) -> None:
    """round trip: through the file, figures without value included; and a folder without one falls to the package's."""
    path = write_record(tmp_path / "a", record)
    assert read_record(tmp_path / "a") == record
    assert path.name == NAME
    assert any(row.lead_onset is None for row in record.rows)


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text('{"schema": 1, "rows": []}')
    with pytest.raises(ValueError, match=f"{NAME}: not a record of the benchmark"):
        read_record(tmp_path)
    (tmp_path / NAME).write_text('{"schema": 7}')
    with pytest.raises(ValueError, match="schema 7, this version reads 1"):
        read_record(tmp_path)


def test_the_figures_of_a_corpus_that_is_known(record: Record) -> None:
    """planted: four spikes on two scored runs, all of them foretold by the gradient norm and shown by the loss."""
    row = next(row for row in record.rows if row.detector == OURS and row.signals == ["grad/all/norm"])
    assert (row.area[1], row.recall[1], row.precision[1], row.false_rate) == (1.0, 1.0, 1.0, 0.0)
    assert (row.lead_onset, row.lead_peak) == (3.0, 6.0)
    assert row.caught == {"spiky": 4}
    loose = next(row for row in record.rows if row.detector == "zclip" and row.setup == "default")
    assert loose.false_rate > 100
    assert record.specimens["quiet"] == {
        "kind": "healthy", "runs": 2, "targets": 0, "catchable": 0, "healthy_steps": 840,
    }  # fmt: skip


def test_words_follow_the_numbers(record: Record) -> None:
    """planted: the same record with our figures made worse says that ours loses."""
    assert "trails" not in headline(record)
    weak = [row._replace(area=[0.1] * 5) if row.detector == OURS else row for row in record.rows]
    rivals = [rival._replace(area=-0.9, area_span=(-1.0, -0.8)) for rival in record.rivals]
    worse = record._replace(rows=weak, rivals=rivals)
    assert headline(worse).startswith("Ours trails the best other detector")
    assert "noise" not in headline(worse)
    title = "area under the precision-recall curve at lead >= 1: 0.1"
    assert any(s.startswith(title) for s in standing(worse).behind)
    assert not any(s.startswith(title) for s in standing(record).behind)


def test_table_and_json_hold_every_detector(record: Record) -> None:
    shown = io.StringIO()
    print_record(record, console=Console(width=200, file=shown))
    text = shown.getvalue()
    assert all(name in text for name in JUDGED)
    assert headline(record) in text.replace("\n", " ")
    assert len(json.loads(record_json(record))["rows"]) == len(record.rows)


def test_the_page_opens_offline(record: Record, tmp_path: Path) -> None:
    """contract: nothing in it points outside, it is ASCII, and it has a curve for each lead."""
    html = render_detectors(record)
    assert html.isascii()
    assert "http" not in html.replace("http://www.w3.org", "")
    assert html.count('class="chart curve"') == len(record.leads)
    assert all(f">{name}<" in html for name in JUDGED)


def test_the_command_shows_the_record_of_its_folder(
    record: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_record(tmp_path, record)
    shown: list[Path] = []

    def write_page(given: Record, folder: Path) -> Path:
        assert given == record
        shown.append(folder)
        return folder / "page.html"

    assert Bench(what="detectors", out=tmp_path, json=True).run(write_page) == 0
    assert json.loads(capsys.readouterr().out)["headline"] == headline(record)
    assert shown == [tmp_path]
