"""precursors on disk and in words: the record survives, is small, is what the docs quote, and the command prints it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aftershock.bench.command import Bench
from aftershock.bench.foresight import BASELINES
from aftershock.bench.indicators import BASELINE, INDICATORS
from aftershock.bench.precursors_record import NAME, Precursors, Share, read_precursors, write_precursors
from aftershock.bench.precursors_run import make_record
from aftershock.bench.precursors_table import headline, lead_text, markdown, precursors_json, share_text
from aftershock.bench.records import checkout_folder
from aftershock.forecast.hazard import SETS, SHIPPED, WITHIN, read_hazards
from tests.bench.test_precursors import make_runs

DOCS = Path(__file__).parents[2] / "docs"
MOST_BYTES = 150_000


@pytest.fixture(scope="module")
def shipped() -> Precursors:
    """The package's record."""
    folder = checkout_folder()
    assert folder is not None
    return read_precursors(folder)


def test_the_precursors_page_is_the_records(shipped: Precursors) -> None:
    """equivalence: a new record without a new page fails here."""
    assert markdown(shipped) in (DOCS / "precursors.md").read_text(encoding="utf-8")


def test_the_record_holds_every_indicator(shipped: Precursors) -> None:
    """contract: under each horizon, every specimen of the zoo, every forecast, and in few bytes."""
    for horizon in shipped.horizons:
        rows = {row.indicator: row for row in shipped.rows if row.horizon == horizon}
        assert {one.name for one in INDICATORS} <= rows.keys()
        assert rows[BASELINE].at[0].gain_early == Share(0.0, 0.0, 0.0)
    assert len(shipped.specimens) == 32
    assert not set(shipped.tuning_seeds) & set(shipped.scoring_seeds)
    assert len(shipped.forecasters) == (len(SETS) + len(BASELINES)) * len(WITHIN)
    assert len(read_hazards()) == len(SHIPPED)
    folder = checkout_folder()
    assert folder is not None
    assert (folder / NAME).stat().st_size < MOST_BYTES


def test_a_record_survives_the_disk(tmp_path: Path, shipped: Precursors) -> None:
    """round trip; and a damaged file is refused by name."""
    assert read_precursors(write_precursors(tmp_path, shipped).parent) == shipped
    (tmp_path / NAME).write_text('{"schema": 1, "rows": 3}')
    with pytest.raises(ValueError, match=r"precursors\.json: not a record of the benchmark of precursors"):
        read_precursors(tmp_path)


def test_runs_become_a_record() -> None:
    """planted: the gradient norm leads by five steps, which the headline says; nothing judged is missing."""
    found = make_record(make_runs(third=5), tuning_seeds=(0, 2), scoring_seeds=(1, 3), processes=1)
    assert [hazard.signals for hazard in found.hazards] == list(SHIPPED)
    row = found.record.rows[0]
    assert (row.indicator, row.horizon) == (BASELINE, 32)
    assert lead_text(row.at[0]) == "5 (5 to 5)"
    assert "the gradient norm warns before the onset of 1.00 [1.00, 1.00]" in headline(found.record)
    assert found.record.command.endswith("--rerun --seeds 4")
    assert json.loads(precursors_json(found.record))["specimens"]["quiet"]["kind"] == "healthy"


def test_the_command_prints_the_record(capsys: pytest.CaptureFixture[str], tmp_path: Path, shipped: Precursors) -> None:
    """contract: as a table and as JSON, from a folder without a record the package's own."""

    def page(*_: object) -> Path:
        raise AssertionError("precursors have no page")

    assert Bench("precursors", out=tmp_path).run(page) == 0
    assert "gradient norm" in capsys.readouterr().out
    assert Bench("precursors", out=tmp_path, json=True).run(page) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == len(shipped.rows)


def test_figures_in_words() -> None:
    """oracle."""
    assert share_text(Share(0.5, 0.25, None)) == "0.50 [0.25, -]"
    assert share_text(Share(None, None, None)) == "-"
