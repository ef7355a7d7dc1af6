"""The documents quote the committed records, word for word: a new record without new documents fails here."""

from __future__ import annotations

from pathlib import Path

from aftershock.bench import diagnosis_table, survival_table, table
from aftershock.bench.diagnosis_record import read_diagnoses
from aftershock.bench.records import checkout_folder, read_record
from aftershock.bench.survival_record import read_study

DOCS = Path(__file__).parents[2] / "docs"


def test_the_detectors_page_is_the_records() -> None:
    """equivalence."""
    folder = checkout_folder()
    assert folder is not None
    assert table.markdown(read_record(folder)) in (DOCS / "detectors.md").read_text(encoding="utf-8")


def test_the_guard_page_is_the_studys() -> None:
    """equivalence."""
    folder = checkout_folder()
    assert folder is not None
    assert survival_table.markdown(read_study(folder)) in (DOCS / "guard.md").read_text(encoding="utf-8")


def test_the_replay_page_is_the_records() -> None:
    """equivalence: the tables in the docs are those of the record of verdicts."""
    folder = checkout_folder()
    assert folder is not None
    assert diagnosis_table.markdown(read_diagnoses(folder)) in (DOCS / "replay.md").read_text(encoding="utf-8")
