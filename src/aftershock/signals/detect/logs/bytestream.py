"""The bytes of a file from its start, as they come; on request also those that are still to be written.

Must not import anything else of aftershock but `rows`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from aftershock.signals.detect.logs.rows import Follow, Problems

CHUNK = 1 << 18


def chunks(path: Path, follow: Follow | None, problems: Problems) -> Iterator[bytes]:
    """Pieces of the file. An empty piece says that the file was cut short and starts again from its first byte."""
    quiet = 0.0
    with path.open("rb") as file:
        while True:
            piece = file.read(CHUNK)
            if piece:
                quiet = 0.0
                yield piece
            elif follow is None or (follow.idle_s is not None and quiet >= follow.idle_s):
                return
            elif path.exists() and path.stat().st_size < file.tell():
                problems.add("cut", "the file was cut short while it was followed; read again from its start")
                file.seek(0)
                yield b""
            else:
                time.sleep(follow.poll_s)
                quiet += follow.poll_s


def lines(path: Path, follow: Follow | None, problems: Problems) -> Iterator[str]:
    """Lines without their ends. The last one counts without a newline too, unless more may come."""
    rest = b""
    for piece in chunks(path, follow, problems):
        if not piece:
            rest = b""
            continue
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            yield line.rstrip(b"\r").decode("utf-8", errors="replace")
    if rest.strip():
        yield rest.decode("utf-8", errors="replace")
