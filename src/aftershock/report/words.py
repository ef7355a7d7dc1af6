"""How the report writes numbers and names arms in words. Pure; knows nothing of files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class ArmWords(NamedTuple):
    """An arm in a sentence: `full` at first ("without qk-layernorm"), `short` after the other arm ("with it")."""

    full: str
    short: str


_ON_OFF: dict[str, tuple[str, Any]] = {
    "model.qk_norm": ("qk-layernorm", "off"),
    "optim.z_loss": ("z-loss", 0.0),
    "optim.weight_decay": ("weight decay", 0.0),
    "optim.warmup_steps": ("warm-up", 0),
    "optim.clip_norm": ("gradient clipping", None),
    "model.mup": ("muParam", "off"),
}
"""Settings with an off value: (what people call it, the value that means without)."""


def arm_words(arms: Mapping[str, Mapping[str, Any]]) -> dict[str, ArmWords]:
    """Words for each arm from `arms`: arm -> the settings that are constant in it, those equal in all arms left out.

    Two arms that differ in one on/off setting become "with X" and "without X"; anything else is "in arm NAME".
    """
    plain = {arm: ArmWords(f"in arm {arm}", f"in {arm}") for arm in arms}
    keys = {key for settings in arms.values() for key in settings}
    if len(arms) != 2 or len(keys) != 1 or next(iter(keys)) not in _ON_OFF:
        return plain
    key = next(iter(keys))
    thing, off_value = _ON_OFF[key]
    off = [arm for arm, settings in arms.items() if settings.get(key, off_value) == off_value]
    if len(off) != 1:
        return plain
    return {
        arm: ArmWords(f"without {thing}", "without it") if arm == off[0] else ArmWords(f"with {thing}", "with it")
        for arm in arms
    }


def rate(value: float) -> str:
    """A learning rate as people write it: 0.03, 0.3, 3e-4."""
    if value >= 0.01:
        return f"{value:.6g}"
    mantissa, exponent = f"{value:.5e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def number(value: float | None, digits: int = 3) -> str:
    """About `digits` significant digits: 9.21, 412, 3.1e4; a dash where there is none."""
    if value is None:
        return "-"
    if value != 0 and not 1e-3 <= abs(value) < 1e4:
        mantissa, exponent = f"{value:.{max(digits - 2, 0)}e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    if abs(value) < 1:
        return f"{value:.{digits}g}"
    whole = len(f"{abs(value):.0f}")
    return f"{value:.{max(digits - whole, 0)}f}"


def loss(value: float | None) -> str:
    """A loss in nats to three decimals, a dash where there is none."""
    return "-" if value is None else f"{value:.3f}"


def count(value: float | None) -> str:
    """A count with its magnitude: 950, 12.3k, 4.8M, 1.2B."""
    if value is None:
        return "-"
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def duration(seconds: float | None) -> str:
    """42 s, 3 min 20 s, 2 h 5 min."""
    if seconds is None:
        return "-"
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def plural(n: int, thing: str) -> str:
    """1 run, 2 runs."""
    return f"{n} {thing}" if n == 1 else f"{n} {thing}s"


def listed(items: Sequence[str], last: str = "and") -> str:
    """a; a and b; a, b and c."""
    if len(items) < 2:
        return "".join(items)
    return f"{', '.join(items[:-1])} {last} {items[-1]}"


def sentence(text: str) -> str:
    """First letter upper case, one full stop."""
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."
