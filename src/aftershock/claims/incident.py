"""One recorded spike and how its replays answered, as a value and as a JSON line; the same of a run whose spikes are
counted.

Pure data. Must not import torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from aftershock.claims.claim import Line


class Answer(NamedTuple):
    """What one replay did; see `replay.response.Response`. `peak_excess` is inf where the loss was not finite."""

    family: str
    present: bool
    peak_excess: float
    peak_step: int
    duration: int
    stopped: str


class FirstPlace(NamedTuple):
    """The place of one level that moved first, of `num_places`; `times` of `replays` it was first or among the first.
    `place` None: none moved before the peak. `clear`: see `replay.ordering.First`."""

    place: str | None
    num_places: int
    times: int
    replays: int
    clear: bool


class Mind(NamedTuple):
    """What a model believed at one step, of the same calm batches: see `replay.thinking.Point`, in nats.

    `by_frequency`: loss by how often the target had been seen ("10 to 99" times).
    """

    entropy: float
    from_unigram: float
    from_bigram: float
    agreement: float
    by_frequency: Mapping[str, float]


class Belief(NamedTuple):
    """`kind` is the verdict of `replay.thinking.Thinking`; `minds` by point: "before", "onset", "peak", .."""

    kind: str
    minds: Mapping[str, Mind]


@dataclass(frozen=True, kw_only=True)
class Incident:
    """One line of the study of incidents.

    - `window`: start, onset, peak and end of the spike, None where no spike came in `steps` steps; `ended`: whether it
      was over within them. Heights are excesses over the level before it, in the unit of `replay.response`
    - `controls`: what the unchanged replays are, see `replay.controls.Kind`; "" without a spike
    - `recovery`: steps from peak to the first of 5 calm ones, None where there were none
    - `answers`: by cell; `left_out`: cells that mean nothing here, and why
    - `first`: by level, of `replay.localise`; `belief`: of a language model. Where they cannot be read they are empty
      and None, with the reason in `left_out` under "localise" and "thinking"
    """

    id: str
    name: str
    cause: str
    kind: str
    seed: int
    share: float
    clip: float | None
    num_params: int
    steps: int
    seconds: float
    window: tuple[int, int, int, int] | None = None
    ended: bool = False
    height: float = math.nan
    band: float = math.nan
    threshold: float = math.nan
    unit: str = ""
    recovery: int | None = None
    controls: str = ""
    answers: Mapping[str, Answer] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    first: Mapping[str, FirstPlace] = field(default_factory=dict)
    belief: Belief | None = None

    @property
    def reproducible(self) -> bool:
        """Whether there is a spike, and every unchanged replay has it: only then does a replay without it say that the
        change removed it."""
        controls = [answer for answer in self.answers.values() if answer.family == "control"]
        return bool(controls) and all(answer.present for answer in controls)

    def to_line(self) -> dict[str, Any]:
        """JSON, but for numbers that are not finite, which `store.folder.to_json` spells."""
        plain = dataclasses.asdict(self)
        return plain | {
            "answers": {name: answer._asdict() for name, answer in self.answers.items()},
            "first": {level: place._asdict() for level, place in self.first.items()},
            "belief": None if self.belief is None else _belief_line(self.belief),
        }

    @staticmethod
    def from_line(line: Line) -> Incident:
        """The incident of a line. Raises ValueError, naming its id, when a field is missing or unknown."""
        read: dict[str, Any] = _fields(Incident, line)
        read |= {name: float(read[name]) for name in ("height", "band", "threshold")}
        read["window"] = None if read["window"] is None else tuple(read["window"])
        read["answers"] = {
            name: Answer(**answer | {"peak_excess": float(answer["peak_excess"])})
            for name, answer in line["answers"].items()
        }
        read["first"] = {level: FirstPlace(**place) for level, place in line["first"].items()}
        read["belief"] = None if line["belief"] is None else _belief(line["belief"])
        return Incident(**read)


class Level(NamedTuple):
    """The preconditioned sharpness right after the first `step` whose loss was at a level or below: `edge_share`, see
    `signals.curvature.Sharpness`."""

    step: int
    edge_share: float


@dataclass(frozen=True, kw_only=True)
class Counted:
    """One line of the study of counted spikes: a whole run, `spikes` as (onset, peak, end).

    - `family`: the runs that are compared with each other; `setting`: what they differ in
    - `samples`: that it trained on: tokens, or examples where there are no tokens; `half_life`: of the second moment,
      in the same unit, inf without one
    - `clipped`: of each spike, whether clipping was at work between 40 steps before its onset and its peak
    - `levels`: by loss level as text, see `Level`; where it was not measured or not reached there is none
    """

    id: str
    family: str
    setting: str
    cause: str
    seed: int
    num_params: int
    depth: int
    batch: int
    half_life: float
    clip: float | None
    steps: int
    samples: int
    finite: bool
    seconds: float
    spikes: Sequence[tuple[int, int, int]] = ()
    clipped: Sequence[bool] = ()
    levels: Mapping[str, Level] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Spikes per 1e6 samples."""
        return 1e6 * len(self.spikes) / self.samples

    def to_line(self) -> dict[str, Any]:
        """JSON, but for numbers that are not finite, which `store.folder.to_json` spells."""
        return dataclasses.asdict(self) | {"levels": {name: level._asdict() for name, level in self.levels.items()}}

    @staticmethod
    def from_line(line: Line) -> Counted:
        """The run of a line. Raises ValueError, naming its id, when a field is missing or unknown."""
        read = _fields(Counted, line)
        read["half_life"] = float(read["half_life"])
        read["spikes"] = tuple(tuple(spike) for spike in line["spikes"])
        read["clipped"] = tuple(line["clipped"])
        read["levels"] = {
            name: Level(level["step"], float(level["edge_share"])) for name, level in line["levels"].items()
        }
        return Counted(**read)


def read_incidents(lines: Iterable[Line]) -> list[Incident]:
    """Of all lines, in their order."""
    return [Incident.from_line(line) for line in lines]


def read_counted(lines: Iterable[Line]) -> list[Counted]:
    """Of all lines, in their order."""
    return [Counted.from_line(line) for line in lines]


def by_cause(incidents: Sequence[Incident]) -> dict[str, list[Incident]]:
    """Incidents by the class of their cause, in the order of the classes' numbers."""
    causes = sorted({incident.cause for incident in incidents}, key=lambda cause: int(cause.removeprefix("C")))
    return {cause: [incident for incident in incidents if incident.cause == cause] for cause in causes}


def _fields(kind: type, line: Line) -> dict[str, Any]:
    names = {one.name for one in dataclasses.fields(kind)}
    wrong = names.symmetric_difference(line.keys() - {"code"})
    if wrong:
        raise ValueError(f"the line {line.get('id')} has other fields than it should: {', '.join(sorted(wrong))}")
    return {name: line[name] for name in names}


def _belief_line(belief: Belief) -> dict[str, Any]:
    return {"kind": belief.kind, "minds": {name: mind._asdict() for name, mind in belief.minds.items()}}


def _belief(line: Mapping[str, Any]) -> Belief:
    minds = {}
    for name, mind in line["minds"].items():
        by_frequency = {bucket: float(loss) for bucket, loss in mind["by_frequency"].items()}
        rest = {field: float(mind[field]) for field in Mind._fields[:-1]}
        minds[name] = Mind(**rest, by_frequency=by_frequency)
    return Belief(line["kind"], minds)
