"""What every detector is: `init() -> state`, `update(state, value) -> (state, verdict)`, a state that survives JSON.

A state is a NamedTuple of numbers, text, None and tuples of numbers: a value, never changed in place, so an old one
kept for a rewind stays good. A detector itself holds only settings.
Must not import torch or numpy: a rule runs once per signal and step, on plain floats.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Generic, Literal, NamedTuple, TypeVar

from aftershock.config import nearest
from aftershock.signals.detect.roles import Role
from aftershock.store.folder import plain, unspell

Verdict = Literal["ok", "spike", "shift", "drift", "nonfinite", "jump"]
"""ok; spike: above what is normal; shift: above it for so long that it is the new normal; drift: rising slowly;
nonfinite: NaN or infinite; jump: a sudden lasting improvement, which is no alarm."""

VERDICTS: tuple[Verdict, ...] = ("ok", "spike", "shift", "drift", "nonfinite", "jump")
ALARMS: frozenset[Verdict] = frozenset({"spike", "shift", "drift", "nonfinite"})
"""Verdicts that say something is wrong."""

StateT = TypeVar("StateT", bound=tuple)


class Step(NamedTuple, Generic[StateT]):
    """What `update` returns: the next state and what the detector says of this value."""

    state: StateT
    verdict: Verdict


class Rule(ABC, Generic[StateT]):
    """A detector. Settings are the fields of a frozen dataclass, so one rule serves any number of signals.

    Example:
        state = rule.init()
        for value in values:
            state, verdict = rule.update(state, value)
    """

    source: ClassVar[str]
    """Where the rule comes from."""
    reads: ClassVar[tuple[Role, ...]]
    """Roles of the signals that the rule is meant for (see `roles.ROLES`)."""

    @abstractmethod
    def init(self) -> StateT:
        """The state before the first value."""

    @abstractmethod
    def update(self, state: StateT, value: float) -> Step[StateT]:
        """The state after `value`, and the verdict on it. `state` itself is left as it was."""

    def rewind(self, state: StateT) -> StateT:
        """The state with which to go on after the run was rewound; unchanged where the source knows no rewinds."""
        return state

    def lag(self, state: StateT) -> int:
        """Steps between the onset of what the last verdict names and that verdict; 0 where the rule cannot tell."""
        return 0

    def to_dict(self, state: StateT) -> dict[str, Any]:
        """The state as JSON types, with the rule's name; not-finite numbers are spelled out."""
        fields = dict(zip(_fields(state), state, strict=True))
        return {"rule": type(self).__name__, "state": plain(fields, "state")}

    def from_dict(self, data: Mapping[str, Any]) -> StateT:
        """The state that `to_dict` wrote. Raises ValueError when it is another rule's, or its fields are not ours."""
        blank = self.init()
        if data.get("rule") != type(self).__name__:
            raise ValueError(f"detector state is of rule {data.get('rule')!r}, not of {type(self).__name__}")
        fields = unspell(dict(data["state"]))
        for name in fields:
            if name not in _fields(blank):
                raise ValueError(
                    f"detector state of {type(self).__name__}: {name!r} unknown{nearest(name, _fields(blank))}"
                )
        missing = [name for name in _fields(blank) if name not in fields]
        if missing:
            raise ValueError(f"detector state of {type(self).__name__} lacks {', '.join(missing)}; start with init()")
        return type(blank)(**{name: _freeze(value) for name, value in fields.items()})


def verdicts(rule: Rule[Any], values: Iterable[float]) -> list[Verdict]:
    """The verdict on each of `values`, from a fresh state."""
    state, found = rule.init(), []
    for value in values:
        state, verdict = rule.update(state, value)
        found.append(verdict)
    return found


def _fields(state: Any) -> tuple[str, ...]:
    return state._fields


def _freeze(value: Any) -> Any:
    return tuple(map(_freeze, value)) if isinstance(value, list) else value
