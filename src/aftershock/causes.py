"""The classes of causes of loss spikes, numbered as the survey of causes numbers them (docs/replay.md).

Pure data; imports nothing.
"""

from __future__ import annotations

CAUSES: dict[str, str] = {
    "C1": "second-moment lag: Adam's v decays faster than the gradient it divides",
    "C2": "correlated large Adam updates",
    "C3": "landscape too sharp for the step size",
    "C4": "attention-logit growth",
    "C5": "output-logit or final-norm drift",
    "C6": "embedding or residual scale",
    "C7": "degenerate data",
    "C8": "data and state together",
    "C9": "numerics",
    "C10": "silent data corruption",
    "C11": "resume or state fault",
    "C12": "routing",
    "C13": "weight decay against normalisation",
    "C14": "structural: relapses whatever is done to data or optimizer",
}
"""What each class is, in a few words."""
