"""The page of the fault injection study: one self-contained HTML file with its tables.

Drawn from the record alone, which it repeats in `script#numbers`. jinja2 is imported inside.
"""

from __future__ import annotations

from pathlib import Path

from aftershock._version import __version__
from aftershock.bench import survival_table as table
from aftershock.bench.survival import DEFAULT
from aftershock.bench.survival_record import KINDS, Row, Study, study_json
from aftershock.report import paper

NAME = "guard.html"


def write_survival_page(study: Study, folder: str | Path) -> Path:
    """Write `guard.html` of a study into `folder`; it opens offline.

    Example:
        path = write_survival_page(read_study(), "out/bench")
    """
    return paper.write_whole(Path(folder) / NAME, render_survival(study))


def render_survival(study: Study) -> str:
    """The page as ASCII HTML."""
    env = paper.environment()
    page = env.get_template("survival.html.j2").render(
        study=study,
        headline=table.headline(study),
        legend=table.legend(study),
        columns=table.COLUMNS,
        cells=table.cells,
        policies=_by_policy(study),
        specimens=table.specimens_of(study, DEFAULT),
        other_half=table.specimens_of(study, DEFAULT, half="tuning"),
        matrices=table.matrices(study),
        survived=table.survived,
        default=DEFAULT,
        json=paper.embedded(study_json(study)),
        version=__version__,
        style=paper.asset("templates/style.css"),
    )
    return paper.ascii_html(page)


def _by_policy(study: Study) -> list[Row]:
    """The rows of all specimens of a kind, by policy."""
    found = [table.total(study, policy, kind) for policy in table.policies_of(study) for kind in KINDS]
    return [row for row in found if row is not None]
