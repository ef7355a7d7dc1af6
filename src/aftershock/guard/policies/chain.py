"""Several policies, one after the other.

Must not import the guard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aftershock.guard.policies.saved import packed, unpacked
from aftershock.guard.policy import Action, Continue, Live, Policy, ScaleLR, Seen


@dataclass(eq=False)
class Chain(Policy):
    """Asks each policy in turn; the first that says skip, rewind or stop ends the round.

    Later ones then do not see the step, so put what judges before what edits: Chain([Ladder(), ZClip()]); a switch that
    is to see the alarm stands before the ladder. A step that is taken (`Continue`, `ScaleLR`) is seen by all, and the
    first `ScaleLR` wins. Reasons of all that acted are joined.

    Example:
        guard = Guard(model, optimizer, policy=Chain([Ladder(), MomentumReset(), ZClip()]))
    """

    policies: Sequence[Policy]

    def __post_init__(self) -> None:
        self.policies = tuple(self.policies)
        if not self.policies:
            raise ValueError("Chain: no policies given; it would do nothing")

    def before_step(self, seen: Seen, live: Live) -> Action:
        return self._ask(lambda policy: policy.before_step(seen, live))

    def after_step(self, seen: Seen, live: Live) -> Action:
        """All see it, even after one asked for a rewind: each has to finish with the step it began."""
        return self._ask(lambda policy: policy.after_step(seen, live), to_the_end=True)

    def after_rewind(self, step: int) -> None:
        for policy in self.policies:
            policy.after_rewind(step)

    def state_dict(self) -> dict[str, Any]:
        return packed(self, policies=[policy.state_dict() for policy in self.policies])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        states = unpacked(self, state, ("policies",))["policies"]
        if len(states) != len(self.policies):
            raise ValueError(f"state of a Chain of {len(states)} policies; this one has {len(self.policies)}")
        for policy, one in zip(self.policies, states, strict=True):
            policy.load_state_dict(one)

    def _ask(self, ask: Callable[[Policy], Action], *, to_the_end: bool = False) -> Action:
        reasons: list[str] = []
        slower: ScaleLR | None = None
        ended: Action | None = None
        for policy in self.policies:
            action = ask(policy)
            if isinstance(action, Continue):
                reasons += [action.reason] if action.reason else []
            elif isinstance(action, ScaleLR):
                slower = slower or action
            else:
                ended = ended or action
                if not to_the_end:
                    break
        if ended is not None:
            return ended
        if slower is not None:
            return slower._replace(reason="; ".join([slower.reason, *reasons]))
        return Continue("; ".join(reasons))
