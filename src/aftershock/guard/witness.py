"""The first steps after each snapshot on disk, written beside it: what a run that resumes from there must do again.

    snap-<serial>-step-<step>/after-<rank>.jsonl    one line a step: batch, loss, rates, random numbers

A resumed run takes the same steps anyway, so holding it against them costs nothing and needs no second state; it is for
a few steps after a snapshot only. Must not import the guard or a policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aftershock.guard import digest
from aftershock.guard.audit import COMPARED, AuditResult, Finding, Replayed, Tail, TailLog, TailStep, finding, judge
from aftershock.guard.state import Training
from aftershock.store import folder as fs

AFTER = "after-{rank}.jsonl"


class Witness:
    """Writes down the first `compare` steps after a snapshot; after a resume compares first, then goes on writing.

    Cost: three hashes of a few kB and one line of text for each of those steps, nothing for all others.

    Example:
        witness.follow(snapshot)            # just written
        witness.boundary(step, batch_id)    # before a batch is loaded
        witness.fetched(step, batch_id, batch)
        result = witness.judged(step, batch_id, loss, plain=True)
    """

    def __init__(self, training: Training, *, rank: int, tolerance: float, compare: int = COMPARED) -> None:
        self._log = TailLog(training, capacity=compare)
        self._rank, self._tolerance, self._compare = rank, tolerance, compare
        self._path: Path | None = None
        self._left = 0
        self._expected: tuple[TailStep, ...] = ()
        self._around: Mapping[str, Any] = {}
        self._seen: list[Replayed] = []
        self._rng: str | None = None

    def follow(self, snapshot: Path) -> None:
        """What comes now comes after `snapshot`."""
        self._path, self._left = snapshot / AFTER.format(rank=self._rank), self._compare
        self._log.clear()

    def expect(self, snapshot: Path, *, around: Mapping[str, Any]) -> int:
        """The run goes on from `snapshot`: how many steps are known that came after it. `around`: its surroundings."""
        self.follow(snapshot)
        self._expected, self._around, self._seen = steps_after(snapshot, self._rank), dict(around), []
        self._left = max(0, self._compare - len(self._expected))
        return len(self._expected)

    def boundary(self, step: int, batch_id: int) -> None:
        """Between two steps, before a batch is loaded: loading may draw random numbers."""
        self._rng = None
        if self._expected or self._left:
            self._rng = digest.of_rng()
            self._log.before(step, batch_id, rng=self._rng)

    def fetched(self, step: int, batch_id: int, batch: Any) -> None:
        """The first batch of the step, before its forward."""
        if self._rng is not None:
            self._log.before(step, batch_id, batch, rng=self._rng)

    def judged(self, step: int, batch_id: int, loss: float, *, plain: bool) -> AuditResult | None:
        """A step was judged; `plain`: it was taken and nothing else was done. A result once the comparison ends."""
        if not (self._expected or self._left):
            return None
        if not plain or not self._log.begun(batch_id):
            self._left = 0
            return self._end(f"batch {batch_id} was not simply trained on, as it was then")
        row = self._log.after(loss, batch_id=batch_id)._replace(step=step)
        if not self._expected:
            self._write(row)
            return None
        then = self._expected[len(self._seen)]
        if then.batch_id != batch_id:
            return self._end(f"batch {batch_id} came where {then.batch_id} had come, step {then.step}", "loader")
        self._seen.append(Replayed(then, row.loss, row.lr, row.rng, row.batch))
        return self._end("") if len(self._seen) == len(self._expected) else None

    def finish(self) -> AuditResult | None:
        """The run ends: what was compared so far."""
        return self._end("") if self._expected and self._seen else None

    def _end(self, fault: str, what: Any = "unexplained") -> AuditResult | None:
        expected, seen, self._expected, self._seen = self._expected, self._seen, (), []
        if not expected:
            return None
        found: list[Finding] = judge(seen, Tail(expected, None, dict(self._around), None), None, self._tolerance)
        if fault and not found:
            found.append(finding(what, fault))
        return AuditResult(not found, tuple(found), len(seen))

    def _write(self, row: TailStep) -> None:
        assert self._path is not None
        self._left -= 1
        try:
            lines = fs.JsonLines(self._path)
            try:
                lines.append((fs.to_json(fs.plain(row._asdict(), "step")) + "\n").encode())
            finally:
                lines.close()
        except OSError:
            self._left = 0  # the disk is full, or the snapshot has gone: fewer steps to compare with


def steps_after(snapshot: Path, rank: int) -> tuple[TailStep, ...]:
    """What `rank` did in the first steps after `snapshot`, as far as it got."""
    path = snapshot / AFTER.format(rank=rank)
    if not path.exists():
        return ()
    rows = [fs.unspell(row) for row in fs.read_lines(path.read_bytes(), str(path))]
    return tuple(TailStep(**(row | {"lr": tuple(row["lr"])})) for row in rows)
