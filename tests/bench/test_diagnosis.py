"""The benchmark of verdicts: captured, judged without being told, resumed, summed up, on file."""

from __future__ import annotations

from pathlib import Path

import pytest

from aftershock.bench import diagnosis
from aftershock.bench.diagnosis import BUILDING, JUDGED, Incident, capture, diagnose, read_incidents
from aftershock.bench.diagnosis_record import (
    Diagnoses,
    confidently_wrong,
    make_record,
    read_diagnoses,
    reliability,
    within,
    write_diagnoses,
)
from aftershock.bench.diagnosis_table import headline, markdown, rows
from aftershock.lab.zoo.registry import UNSEEN, specimen
from aftershock.store.folder import to_json


def incident(name: str, seed: int, cause: str, *ranked: tuple[str, float], verdict: str = "decided") -> Incident:
    return Incident(
        specimen=name,
        seed=seed,
        cause=cause,
        spiked=bool(ranked),
        window=[1, 2, 3, 4],
        controls="deterministic",
        identical=True,
        verdict=verdict,
        ranked=[list(one) for one in ranked],
        unknown=0.1,
        answers=[["data", 1.0]],
        remedy="skip",
        cells=12,
        seconds=3.0,
    )


SOME = [
    incident("a", 8, "C7", ("C7", 0.97), ("C8", 0.02)),
    incident("a", 7, "C7", ("C8", 0.6), ("C7", 0.3), verdict="undecided"),
    incident("b", 8, "C1", ("C3", 0.9), ("C1", 0.05)),
    incident("b", 7, "C1"),
]


def test_a_flipped_bit_is_captured_and_judged() -> None:
    """planted: weights struck in one step of 1,400; the verdict says so, and that the replays have the other bits."""
    found = diagnose(specimen("flipped_bit"), 1)
    assert (found.controls, found.verdict) == ("not_reproducible", "undecided")
    assert found.place == 1
    assert found.identical  # up to the step at which it struck
    assert found.window[1] == 1000


def test_a_healthy_twin_has_nothing_to_capture() -> None:
    """planted: without the fault there is no incident."""
    one = specimen("garbage_labels")
    healthy = type(one)(**{**vars(one), "build": lambda seed, faulty=True: one.build(seed, faulty=False)})
    assert capture(healthy, 0) is None


def test_rates_are_counted(tmp_path: Path) -> None:
    """oracle: first, top two, confidently wrong and reliability of four incidents, counted by hand."""
    first, two = within(SOME, 1), within(SOME, 2)
    assert (first.count, first.total, two.count, two.total) == (1, 3, 3, 3)  # one run did not spike
    assert confidently_wrong(SOME).count == 1
    bins = {(one.low, one.right.count, one.right.total) for one in reliability(SOME)}
    assert bins == {(0.95, 1, 1), (0.5, 0, 1), (0.8, 0, 1)}
    record = make_record(SOME, unseen=["b"], command="none")
    assert [len(record.incidents), len(record.unseen)] == [2, 2]
    assert "1 of 2" in headline(record)
    assert rows(record.incidents)[0][:4] == ["a", "C7", "1/2", "2/2"]
    assert "b (unseen)" in markdown(record)


def test_a_record_comes_back(tmp_path: Path) -> None:
    """round trip: what is written is read."""
    record = make_record(SOME, unseen=["b"], command="none")
    write_diagnoses(tmp_path, record)
    assert read_diagnoses(tmp_path) == record
    (tmp_path / "replay.json").write_text("{}")
    with pytest.raises(ValueError, match="not a record"):
        read_diagnoses(tmp_path)


def test_building_seeds_do_not_count() -> None:
    """contract: no verdict on a seed that the matrix was built on is reported."""
    assert not set(BUILDING) & set(JUDGED)
    with pytest.raises(ValueError, match="built the signature matrix"):
        make_record([SOME[0]._replace(seed=BUILDING[0])], unseen=[], command="none")


def test_an_interrupted_study_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """round trip: incidents of the same code are not judged again, those of other code are."""
    code = diagnosis.code_digest()
    lines = [to_json(SOME[0]._asdict() | {"code": code}), to_json(SOME[1]._asdict() | {"code": "older"})]
    (tmp_path / diagnosis.RUNS).write_text("\n".join(lines) + "\n")
    assert read_incidents(tmp_path) == [SOME[0]]


def test_a_healthy_specimen_is_refused(tmp_path: Path) -> None:
    """contract: nothing to explain."""
    with pytest.raises(ValueError, match="healthy specimen"):
        diagnosis.diagnose_zoo(tmp_path, specimens=["cosine"])


def test_the_record_keeps_what_it_promises() -> None:
    """contract: the record of the package is of judged seeds only, and holds the unseen causes apart."""
    record: Diagnoses = read_diagnoses()
    assert not set(record.seeds) & set(BUILDING)
    assert {one.specimen for one in record.unseen} == set(UNSEEN)
    assert len({(one.specimen, one.seed) for one in record.incidents}) == len(record.incidents)
