"""`aftershock replay`: explain a spike of a guarded run, of a run of the lab, or of a specimen of the zoo.

Runs and zoo are the lab's and the page the report's, which this room may not import: whoever runs the command hands
them in.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from tyro.conf import Positional, arg

if TYPE_CHECKING:
    from aftershock.replay.explain import Explanation
    from aftershock.replay.rerun import Rerun
    from aftershock.replay.subject import Subject

ZOO = "zoo:"
Part = Literal["places", "no_return", "thinking", "rows"]
"""As in `explain`, which is not imported for a help text: it loads torch."""
Decode = Callable[[Sequence[int]], str]


class Chosen(NamedTuple):
    """What to explain: the subject, tokens' ids to text where there is text, and a sentence on the choice."""

    subject: Subject
    decode: Decode | None
    words: str


Zoo = Callable[[str, int], Chosen]
"""Trains the specimen of a name with a seed until it spikes."""
Lab = Callable[[Path, bool], "Rerun | None"]
"""The run of the lab in a folder, None where there is none; True: also where it is not what it was."""
WritePage = Callable[["Explanation", Path], Path]
"""Writes the page of an explanation into a folder; returns its path. `report.replay.write_replay_page` is one."""


def no_lab(folder: Path, anyway: bool) -> Rerun | None:
    """For who has no runs of the lab."""
    return None


@dataclass(frozen=True)
class Replay:
    """Explain a spike: the same steps again with one thing changed at a time, beside controls and shams.

    A run of the lab (made by `aftershock sweep` or `aftershock run`) is built from its own config. The workload of any
    other is built by your own function, as the recorded run began:

        from aftershock.workload import Workload

        def build():
            model = Net()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            return Workload(model=model, optimizer=optimizer, batch=lambda i: data[i], loss=loss)

    where loss(model, batch) is the mean loss. It may also return a Hugging Face Trainer, or a LightningModule and its
    DataLoader. A function `decode(ids)` beside it turns tokens into text.

    To see it work: aftershock replay zoo:slingshot
    """

    incident: Positional[Annotated[str, arg(metavar="RUN_OR_INCIDENT")]]
    """A run's folder of the lab; an incident's folder; a guard's or a guarded run's, for its newest incident with a
    snapshot; or zoo:NAME."""
    step: int | None = None
    """Of a run of the lab: the spike under way at this step, or one that begins there; by default its first."""
    workload: Annotated[str, arg(metavar="FILE.py:FUNCTION")] = ""
    """The function that builds the workload; or package.module:FUNCTION."""
    cells: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = ()
    """Only these changes, such as skip lr*0.5 sham:ulp#1; by default the 40 most informative (docs/replay.md)."""
    minutes: float | None = None
    """What is not reached by then is left out, the least informative first."""
    parts: tuple[Part, ...] = ("places", "no_return", "thinking", "rows")
    """Asked beside the cells: where it began, until when it could be averted, what the model predicted meanwhile, which
    rows are guilty; --parts alone asks none of them."""
    processes: int = 2
    """Replays at a time, of one thread each."""
    seed: int = 0
    """Of the specimen."""
    snapshot: Annotated[Path | None, arg(metavar="FOLDER")] = None
    """Another snapshot of the run from before the spike, where the incident has none."""
    anyway: bool = False
    """Go on although code or config have changed since the recording."""
    json: bool = False
    """Print everything that was found as JSON, and nothing else."""
    out: Path = Path("out/replay")
    """Folder for the page."""

    def run(self, write_page: WritePage, zoo: Zoo, lab: Lab = no_lab) -> int:
        """Exit status."""
        from aftershock.replay.explain import replay
        from aftershock.replay.table import print_explanation
        from aftershock.replay.written import explanation_json

        asked = self._zoo(zoo) if self.incident.startswith(ZOO) else self._recorded(lab)
        if asked.words:
            sys.stderr.write(asked.words + "\n")
        found = replay(
            asked.subject,
            cells=self.cells,
            minutes=self.minutes,
            processes=self.processes,
            parts=self.parts,
            decode=asked.decode,
            on_progress=_Lines(),
        )
        page = write_page(found, self.out)
        if self.json:
            sys.stdout.write(explanation_json(found) + "\n")
            return 0
        print_explanation(found)
        sys.stdout.write(f"\npage: {page}\n")
        return 0

    def _zoo(self, zoo: Zoo) -> Chosen:
        if self.workload or self.snapshot or self.anyway or self.step is not None:
            raise ValueError(
                f"{self.incident} brings its own workload: leave out --workload, --snapshot, --anyway and --step"
            )
        name = self.incident.removeprefix(ZOO)
        sys.stderr.write(f"training {name} with seed {self.seed} until it spikes\n")
        return zoo(name, self.seed)

    def _recorded(self, lab: Lab) -> Chosen:
        from aftershock.replay.given import RETURNS, find_incident, load_workload
        from aftershock.replay.subject import Subject

        run = None if self.workload or self.snapshot else lab(Path(self.incident), self.anyway)
        if run is not None:
            return self._retrained(run)
        if self.step is not None:
            raise ValueError(f"--step is of a run of the lab's, and {self.incident} is none: an incident has its step")
        found = find_incident(self.incident)
        if not self.workload:
            raise ValueError(
                f"--workload FILE.py:function is missing: its function takes nothing and returns {RETURNS}, built as "
                "the recorded run began; `aftershock replay --help` shows one"
            )
        given = load_workload(self.workload)
        subject = Subject.from_incident(found.folder, given.workload, snapshot=self.snapshot, anyway=self.anyway)
        return Chosen(subject, given.decode, found.words)

    def _retrained(self, run: Rerun) -> Chosen:
        from aftershock.replay.rerun import retrain

        sys.stderr.write(f"training {run.name} again until it spikes\n")
        found = retrain(run, step=self.step)
        return Chosen(found.subject, None, found.words)


class _Lines:
    """Progress on the error stream: a line each tenth of the way of what is under way."""

    def __init__(self) -> None:
        self._what, self._next = "", 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self._what:
            self._what, self._next = what, 0.0
        if total == 1:  # one question: there is nothing between its beginning and its end
            sys.stderr.write("" if done else f"{what}\n")
        elif done >= self._next * total:
            sys.stderr.write(f"{what}: {done}/{total}\n")
            self._next = (10 * done // total + 1) / 10
