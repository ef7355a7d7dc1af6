"""For users: does the guard hold in *your* loop? See `check_guard`."""

from aftershock.testing.check import Check, Checks, check_guard, loop_of
from aftershock.testing.faults import FAULTS

__all__ = ["FAULTS", "Check", "Checks", "check_guard", "loop_of"]
