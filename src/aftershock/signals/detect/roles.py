"""What a signal is, by its name: the role decides which rules read it, what better means, and what it can prove.

Names are ours (`grad/all/norm`), or what people's logs call things (`grad_norm`, `train/loss`, `Val Accuracy`).
Must not import anything else of aftershock.
"""

from __future__ import annotations

import re
from typing import Literal

Role = Literal["loss", "gradient", "update", "rms_t", "curvature", "logit", "log_z", "accuracy", "setting", "other"]

ROLES: tuple[tuple[Role, str], ...] = (
    ("accuracy", r"\bacc\b|accuracy|reward|\bscore\b|\bf1\b|\bbleu\b"),
    ("rms_t", r"\brms[ _]?t\b"),
    ("curvature", r"curvature|sharpness|hessian|lambda[ _](max|grad)"),
    ("log_z", r"\blog[ _]?z\b|log partition"),
    ("logit", r"logit"),
    ("update", r"\bupdate\b"),
    ("gradient", r"\bgrad|gnorm|gradient"),
    ("loss", r"loss|\bce\b|cross entropy|perplexity|\bppl\b|\bnll\b|\bbpb\b"),
    ("setting", r"^(lr|beta ?[12]|wd)\b|\b(lr|learning rate|epoch|weight decay|batch size|momentum)\b"),
    (
        "setting",
        r"\b(time|timestamp|runtime|seconds?|elapsed|eta|tokens?|samples|segment|seed|rank|index|wall|date|memory|mem"
        r"|flops|tflops|mfu|throughput|speed|tok s|per second|rewind)\b",
    ),
)
"""The first pattern found in the name, in lower case with separators as blanks, decides. `setting` is what someone
chose or a clock, never a sign of trouble."""


def role_of(name: str) -> Role:
    """The role of the signal `name`; `other` when no pattern fits.

    >>> role_of("grad/all/norm"), role_of("train_loss"), role_of("lr")
    ('gradient', 'loss', 'setting')
    """
    text = re.sub(r"[^a-z0-9]+", " ", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()).strip()
    for role, pattern in ROLES:
        if re.search(pattern, text):
            return role
    return "other"
