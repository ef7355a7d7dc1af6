"""Every claim, in the order of the scoreboard. One file per source holds the data; this one gathers and finds."""

from __future__ import annotations

from collections.abc import Sequence

from aftershock.claims.claim import Claim, ScoreTrial
from aftershock.claims.phenomena import PHENOMENA
from aftershock.claims.proxies import PROXIES
from aftershock.claims.spikes import SPIKES
from aftershock.config import nearest

CLAIMS: tuple[Claim, ...] = (*PROXIES, *SPIKES, *PHENOMENA)

ALL = "all"


def find_claim(claim_id: str) -> Claim:
    """The claim of this id, in any case. Raises ValueError with the nearest id when there is none."""
    by_id = {claim.id: claim for claim in CLAIMS}
    if claim_id.upper() not in by_id:
        raise ValueError(f"unknown claim {claim_id!r}{nearest(claim_id.upper(), by_id)}")
    return by_id[claim_id.upper()]


def choose_claims(ids: str | Sequence[str], *, with_scores: bool = True) -> list[Claim]:
    """The claims to judge, each once: by id, or every one that has a study for `all`.

    Without scores at hand, `all` leaves out those that are judged on them; by id they are chosen all the same.
    Raises ValueError for no id, an unknown one, or a claim that has no study yet.
    """
    names = [ids] if isinstance(ids, str) else list(ids)
    if not names:
        raise ValueError(f"name the claims to judge, such as P1, or {ALL}")
    every = [claim for claim in CLAIMS if claim.trial and (with_scores or not isinstance(claim.trial, ScoreTrial))]
    chosen: dict[str, Claim] = {}
    for name in names:
        found = every if name == ALL else [find_claim(name)]
        for claim in found:
            if claim.trial is None:
                ready = ", ".join(c.id for c in CLAIMS if c.trial)
                raise ValueError(f"claim {claim.id} has no study yet; those with one: {ready}")
            chosen[claim.id] = claim
    return list(chosen.values())
