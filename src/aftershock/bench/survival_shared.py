"""Runs of several policies as one, up to where the first of them acts: until then they are the same run, bit for bit.

The process forks where a policy parts from the others: the child carries that policy's action out and trains on to its
end, the parent waits for it and goes on without it. What never acts shares the whole run. Only on systems that fork.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from aftershock.bench.survival import LATE, SHARING
from aftershock.bench.survival_run import SETTINGS, Ended, Happened, train
from aftershock.guard.policies import policy as policy_of
from aftershock.guard.policies.incident import is_finite
from aftershock.guard.policy import CONTINUE, Action, Live, Policy, Seen

if TYPE_CHECKING:
    from aftershock.lab.zoo.specimen import Specimen


class _AllParted(Exception):
    """Nobody is left in the run that was shared."""


class SharedStart(Policy):
    """Asks its members in turn as long as none acts. `part(name)` forks: true in the child, which goes on alone."""

    def __init__(self, members: Mapping[str, Policy], part: Callable[[str], bool]) -> None:
        self.members = dict(members)
        self.alone: str | None = None
        self._part = part

    def before_step(self, seen: Seen, live: Live) -> Action:
        return self._ask(lambda member: member.before_step(seen, live), loud=bool(seen.verdicts) or not is_finite(seen))

    def after_step(self, seen: Seen, live: Live) -> Action:
        return self._ask(lambda member: member.after_step(seen, live), loud=False)

    def after_rewind(self, step: int) -> None:
        assert self.alone is not None, "a shared run is never taken back"
        self.members[self.alone].after_rewind(step)

    def state_dict(self) -> dict[str, Any]:
        return {name: member.state_dict() for name, member in self.members.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, member in self.members.items():
            member.load_state_dict(state[name])

    def _ask(self, ask: Callable[[Policy], Action], *, loud: bool) -> Action:
        if self.alone is not None:
            return ask(self.members[self.alone])
        for name, member in list(self.members.items()):
            if name in LATE and loud:
                if self._parted(name):
                    return ask(member)
                continue
            action = ask(member)
            if action != CONTINUE and self._parted(name):
                return action
        if not self.members:
            raise _AllParted
        return CONTINUE

    def _parted(self, name: str) -> bool:
        """Whether this is the child; the parent has then seen it end."""
        if self._part(name):
            self.alone = name
            return True
        del self.members[name]
        return False


def train_together(specimen: Specimen, policies: Sequence[str], seed: int) -> list[Ended]:
    """What `train` gives for each of `policies` (of `SHARING`), in their order, but for the seconds.

    Raises ValueError for a policy that cannot share, RuntimeError when a child fails.
    """
    for name in policies:
        if name not in SHARING:
            raise ValueError(f"{name} may edit before anything is wrong, so it shares no run")
    found: dict[str, Ended] = {}
    began = time.process_time()
    pipe: int | None = None

    def part(name: str) -> bool:
        nonlocal pipe, began
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.close(reading)
            pipe, began = writing, time.process_time()
            return True
        os.close(writing)
        with os.fdopen(reading, "rb") as stream:
            text = stream.read()
        os.waitpid(child, 0)
        found[name] = _received(name, text)
        return False

    start = SharedStart({name: policy_of(name, **SETTINGS.get(name, {})) for name in policies}, part)
    try:
        ended = train(specimen, policy=start, seed=seed)
    except _AllParted:
        return [found[name] for name in policies]
    except BaseException:
        if pipe is None:
            raise
        _send(pipe, {"error": traceback.format_exc()})
    seconds = time.process_time() - began
    if pipe is not None:
        _send(pipe, ended._replace(policy=str(start.alone), seconds=round(seconds, 2))._asdict())
    for name in start.members:
        found[name] = ended._replace(policy=name, seconds=round(seconds / len(start.members), 2))
    return [found[name] for name in policies]


def _send(pipe: int, message: Mapping[str, Any]) -> NoReturn:
    """The child's last word: it must not return into its parent's program."""
    with os.fdopen(pipe, "wb") as stream:
        stream.write(json.dumps(message).encode())
    os._exit(0)


def _received(name: str, text: bytes) -> Ended:
    if not text:
        raise RuntimeError(f"the run of {name} died without a word")
    message = json.loads(text)
    if "error" in message:
        raise RuntimeError(f"the run of {name} failed:\n{message['error']}")
    return Ended(**message | {"events": [Happened(*event) for event in message["events"]]})
