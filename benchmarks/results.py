"""The sections of RESULTS.md that a command writes: what stands between two marks, and nothing else."""

from __future__ import annotations

from pathlib import Path

RESULTS = Path(__file__).with_name("RESULTS.md")


def write(lines: list[str], *, mark: str) -> None:
    """Put `lines` between `<!-- mark -->` and `<!-- /mark -->`; at the end where the file has no such section."""
    begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    text = RESULTS.read_text() if RESULTS.exists() else "# Speed\n"
    if begin not in text:
        text += f"\n{begin}\n{end}\n"
    before, after = text.split(begin)[0], text.split(end)[1]
    RESULTS.write_text(f"{before}{begin}\n" + "\n".join(lines).rstrip("\n") + f"\n{end}{after}")
    print(f"written to {RESULTS}")
