"""A policy's state as a dict: written with its class's name, taken back only by the same class and with the same keys.

Must not import a policy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from aftershock.config import nearest
from aftershock.guard.policy import Policy


def packed(policy: Policy, **fields: Any) -> dict[str, Any]:
    """`fields` with the policy's name; they must be JSON types or tensors, and copies where they are mutable."""
    return {"policy": type(policy).__name__, **fields}


def unpacked(policy: Policy, state: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The fields `names` of `state`. Raises ValueError when it is another policy's, or its keys are not `names`."""
    mine, wanted = type(policy).__name__, list(names)
    if state.get("policy") != mine:
        raise ValueError(f"policy state is of {state.get('policy')!r}, not of {mine}; start the guard with that policy")
    fields = {name: value for name, value in state.items() if name != "policy"}
    for name in fields:
        if name not in wanted:
            raise ValueError(f"state of policy {mine}: {name!r} unknown{nearest(name, wanted)}")
    missing = [name for name in wanted if name not in fields]
    if missing:
        raise ValueError(f"state of policy {mine} lacks {', '.join(missing)}; it was written by another version")
    return fields


def pair(value: Any) -> tuple[int, int]:
    """A pair of whole numbers that went through JSON, which knows lists only."""
    first, second = value
    return int(first), int(second)


def require(policy: Policy, **least: float) -> None:
    """Raises ValueError for a setting of `policy` below its least value, or one that is NaN or infinite."""
    for name, bound in least.items():
        value = getattr(policy, name)
        if not bound <= value < float("inf"):
            raise ValueError(f"{type(policy).__name__}: {name} must be a number from {bound:g} on, got {value}")
