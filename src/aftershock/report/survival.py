"""The page of the fault injection study: one self-contained HTML file with its tables.

Drawn from the record alone, which it repeats in `script#numbers`. jinja2 is imported inside.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from aftershock._version import __version__
from aftershock.bench import survival_table as table
from aftershock.bench.survival import DEFAULT
from aftershock.bench.survival_record import KINDS, Row, Study, study_json

NAME = "guard.html"


def write_survival_page(study: Study, folder: str | Path) -> Path:
    """Write `guard.html` of a study into `folder`; it opens offline.

    Example:
        path = write_survival_page(read_study(), "out/bench")
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(render_survival(study), encoding="ascii")
    partial.replace(path)
    return path


def render_survival(study: Study) -> str:
    """The page as ASCII HTML."""
    import jinja2
    from markupsafe import Markup

    home = resources.files("aftershock.report") / "templates"
    env = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (home / name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = env.get_template("survival.html.j2").render(
        study=study,
        headline=table.headline(study),
        legend=table.legend(study),
        columns=table.COLUMNS,
        cells=table.cells,
        policies=_by_policy(study),
        specimens=table.specimens_of(study, DEFAULT),
        other_half=table.specimens_of(study, DEFAULT, half="tuning"),
        default=DEFAULT,
        # Inside <script> only "</" and "<!--" could end the JSON early; \\u003c is the same string to a JSON parser.
        json=Markup(study_json(study).replace("<", "\\u003c")),
        version=__version__,
        style=Markup((home / "style.css").read_text(encoding="utf-8")),
    )
    return page.encode("ascii", "xmlcharrefreplace").decode("ascii")


def _by_policy(study: Study) -> list[Row]:
    """The rows of all specimens of a kind, by policy."""
    found = [table.total(study, policy, kind) for policy in table.policies_of(study) for kind in KINDS]
    return [row for row in found if row is not None]
