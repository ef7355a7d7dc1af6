"""layout: every parameter has one place; what starts there depends on the seed and the spec alone."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from aftershock.lab.models.layout import TRUNCATED_STD, Layout, ParamSpec

CPU = torch.device("cpu")
SPECS = [
    ParamSpec("embed", (5, 4), "params", 0.5, truncated=False),
    ParamSpec("gain", (4,), "params", None),
    ParamSpec("in", (4, 6), "matmul", 0.3, lr_scale=2.0),
    ParamSpec("q", (4, 4), "matmul", 0, lr_scale=2.0),
    ParamSpec("out", (6, 4), "matmul", 0.2),
    ParamSpec("head", (4, 5), "logits", 0.1, lr_scale=0.5),
]


def test_views_round_trip() -> None:
    """round trip: what is written through a view is read through the buffer at its place, and nowhere else."""
    layout = Layout(SPECS)
    buffer = torch.zeros(3, layout.size)
    for i, view in enumerate(layout.views(buffer).values()):
        view.fill_(i + 1)
    assert (buffer > 0).all()
    for i, place in enumerate(layout.places):
        assert (buffer[:, place.start : place.stop] == i + 1).all()
        assert layout.views(buffer)[place.spec.name].shape == (3, *place.spec.shape)
        assert place.stop - place.start == math.prod(place.spec.shape)
    assert layout.size == sum(math.prod(spec.shape) for spec in SPECS)


def test_matmul_weights_come_first() -> None:
    """contract: they are cast as one block, and the views of that block are all there are."""
    layout = Layout(SPECS)
    assert layout.matmul_size == 24 + 16 + 24
    work = torch.zeros(2, layout.matmul_size)
    assert set(layout.views(work)) == {"in", "q", "out"}
    assert all(place.stop <= layout.matmul_size for place in layout.places if place.spec.role == "matmul")


def test_sections_cover_every_column_once() -> None:
    """contract: whole or per tensor; a merged section has one learning-rate factor and no neighbour of the same."""
    layout = Layout(SPECS)
    for sections in (layout.sections(), layout.sections(per_tensor=True)):
        assert [start for start, _, _ in sections] == [0, *(stop for _, stop, _ in sections[:-1])]
        assert sections[-1][1] == layout.size
        for start, stop, scale in sections:
            inside = [p.spec.lr_scale for p in layout.places if p.start >= start and p.stop <= stop]
            assert set(inside) == {scale}
    merged = layout.sections()
    assert all(a[2] != b[2] for a, b in itertools.pairwise(merged))
    assert len(layout.sections(per_tensor=True)) == len(SPECS)


def test_two_specs_of_one_name_are_refused() -> None:
    with pytest.raises(AssertionError, match="unique"):
        Layout([SPECS[0], SPECS[0]])


def test_oracle_rms() -> None:
    layout = Layout(SPECS)
    buffer = torch.randn(2, layout.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rms = layout.rms(buffer)
    for i, name in enumerate(layout.names):
        for k in range(2):
            values = layout.views(buffer)[name][k].flatten().tolist()
            assert rms[k, i].item() == pytest.approx(math.sqrt(sum(v * v for v in values) / len(values)), rel=1e-12)


def test_a_row_depends_on_its_seed_alone() -> None:
    """contract: to the bit, whoever the neighbours are, however many."""
    layout = Layout(SPECS)
    one = layout.init([7], dtype=torch.float32, device=CPU)
    many = layout.init([3, 7, 0, 7], dtype=torch.float32, device=CPU)
    assert torch.equal(many[1], one[0])
    assert torch.equal(many[3], one[0])
    assert not torch.equal(many[0], one[0])
    assert not torch.equal(many[2], one[0])


def test_float64_starts_at_the_same_values() -> None:
    layout = Layout(SPECS)
    single, double = (layout.init([1, 2], dtype=d, device=CPU) for d in (torch.float32, torch.float64))
    assert torch.equal(single.double(), double)


def test_the_start_does_not_depend_on_rates() -> None:
    """contract: muParam sorts the columns by rate; the values drawn are the same, name by name."""
    flat = [spec._replace(lr_scale=1.0) for spec in SPECS]
    scaled, plain = Layout(SPECS), Layout(flat)
    assert scaled.names != plain.names, "the sample must be sorted differently for the test to mean something"
    rows = [layout.views(layout.init([5], dtype=torch.float32, device=CPU)) for layout in (scaled, plain)]
    for name in plain.names:
        assert torch.equal(rows[0][name], rows[1][name]), name


def test_init_has_the_standard_deviation_asked_for() -> None:
    """oracle: 200,000 draws: the sample's std is within 4 / sqrt(2 n) = 0.6 %; forgetting the truncation is 12 %."""
    specs = [
        ParamSpec("truncated", (400, 500), "matmul", 400**-0.5),
        ParamSpec("normal", (400, 500), "params", 500**-0.5, truncated=False),
        ParamSpec("zero", (10,), "matmul", 0),
        ParamSpec("one", (10,), "params", None),
    ]
    layout = Layout(specs)
    values = layout.views(layout.init([0], dtype=torch.float32, device=CPU))
    for name, std in (("truncated", 400**-0.5), ("normal", 500**-0.5)):
        assert values[name].std().item() == pytest.approx(std, rel=0.006)
        assert abs(values[name].mean().item()) < 4 * std / math.sqrt(200_000)
    assert values["truncated"].abs().max() <= 2 * 400**-0.5 / TRUNCATED_STD
    assert values["normal"].abs().max() > 3 * 500**-0.5
    assert (values["zero"] == 0).all()
    assert (values["one"] == 1).all()


def test_oracle_truncated_std() -> None:
    """oracle: std of a unit normal cut at two sigma, 1 - 2 * 2 phi(2) / (2 Phi(2) - 1), by quadrature."""
    x = torch.linspace(-2, 2, 200_001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2)
    variance = torch.trapezoid(x.square() * density, x) / torch.trapezoid(density, x)
    assert math.sqrt(variance) == pytest.approx(TRUNCATED_STD, abs=1e-9)
