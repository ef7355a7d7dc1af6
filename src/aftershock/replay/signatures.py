"""What each class of causes would answer: the signature matrix, as the probability of a yes to each question.

The matrix is that of the survey of causes (docs/replay.md), in steps of ALWAYS to NEVER, with what the building seeds
of the zoo showed where they showed something. Pure data; must not import the runner.
"""

from __future__ import annotations

from typing import NamedTuple

ALWAYS, OFTEN, EVEN, SELDOM, NEVER = 0.95, 0.8, 0.5, 0.2, 0.05
"""Probabilities of a yes. None is 0 or 1: one replay that goes the other way must not decide alone."""


class Question(NamedTuple):
    """One thing that is asked of an incident.

    - `cells`: it is a yes when one of these removes the spike; none of them for what `symptoms` answers
    - `yes`, `no`: what an answer says, as the rest of a sentence that begins with "because"
    - `moot`: whether a cell that means nothing for the workload is a no: what it changes is not there to be the cause
    - `after`: asked only where that question was answered by more than a no
    """

    cells: tuple[str, ...]
    yes: str
    no: str
    moot: bool = True
    after: str | None = None


QUESTIONS: dict[str, Question] = {
    "data": Question(
        ("skip", "replace", "replace:before"),
        "the spike goes with the suspect batches",
        "it comes without the suspect batches too",
    ),
    "earlier": Question(
        ("earlier",),
        "the same batches do no harm to an earlier healthy state",
        "the same batches bring it from an earlier healthy state too",
        moot=False,
        after="data",
    ),
    "content": Question(
        ("replace:content",),
        "other data in the suspect batches' place remove it",
        "what comes along with the suspect batches brings it, whatever their data",
        moot=False,
        after="data",
    ),
    "half_rate": Question(("lr*0.5",), "half the rate removes it", "half the rate does not", moot=False),
    "rate_before": Question(
        ("lr=before",), "keeping the rate as it was at the snapshot removes it", "the rate's course does not matter"
    ),
    "hold_v": Question(
        ("hold:v",), "a second moment that may not fall removes it", "holding the second moment does not help"
    ),
    "eps": Question(("eps*1e3",), "a thousandfold eps removes it", "a thousandfold eps does not"),
    "clip": Question(("clip*2",), "clipping at twice the usual norm removes it", "clipping does not", moot=False),
    "wide_loss": Question(
        ("float64:loss", "float32:loss"),
        "a loss of higher precision removes it",
        "the loss's precision does not matter",
    ),
    "wide_all": Question(
        ("float64", "float32"), "higher precision throughout removes it", "precision does not matter", moot=False
    ),
    "qk": Question(
        ("qk-norm", "qk-clip"),
        "bounding queries and keys removes it",
        "bounding queries and keys does not",
    ),
    "decay": Question(("wd*0",), "it does not come without weight decay", "it comes without weight decay too"),
    "embed_decay": Question(
        ("wd*0:embeddings",),
        "it does not come without decay of the embeddings",
        "decay of the embeddings does not matter",
    ),
    "z_loss": Question(("z-loss=1e-4",), "a z-loss removes it", "a z-loss does not"),
    "sudden": Question((), "it is there within two steps", "it builds up over several steps", moot=False),
    "rate_jumped": Question((), "the rate jumped just before", "the rate moved as a schedule does", moot=False),
    "update_first": Question(
        (),
        "the update moved and the gradient had not",
        "the update did not move ahead of its gradient",
        moot=False,
    ),
    "ahead": Question(
        (),
        "gradient and update had grown before the loss did",
        "gradient and update were calm until the loss rose",
        moot=False,
    ),
    "stale": Question(
        (),
        "Adam's second moment stood well above the squared gradients, so it could only fall",
        "Adam's second moment had kept up with the gradients",
        moot=False,
    ),
    "overflowed": Question(
        (), "a gradient was not finite though its loss was", "no gradient was lost of a finite loss", moot=False
    ),
}
"""Every question, by name; the order is that in which evidence is told."""


class Signature(NamedTuple):
    """What one way of one class of causes looks like: `yes` holds probabilities of a yes; NEVER where it has none.

    `needs`: the question whose cells must mean something for the workload: what they change is the cause itself.
    """

    cause: str
    way: str
    yes: dict[str, float]
    needs: str | None = None


SIGNATURES: tuple[Signature, ...] = (
    Signature(
        "C1",
        "a second moment that lags behind",
        {
            "earlier": EVEN,
            "half_rate": ALWAYS,
            "hold_v": OFTEN,
            "eps": EVEN,
            "clip": EVEN,
            "update_first": OFTEN,
            "qk": SELDOM,
            "decay": SELDOM,
            "z_loss": SELDOM,
            "sudden": SELDOM,
            "ahead": SELDOM,
            "stale": OFTEN,
        },
        needs="hold_v",
    ),
    Signature(
        "C1",
        "a second moment that has long lagged behind",
        {
            "earlier": EVEN,
            "half_rate": ALWAYS,
            "hold_v": EVEN,
            "eps": SELDOM,
            "clip": OFTEN,
            "update_first": EVEN,
            "qk": SELDOM,
            "decay": SELDOM,
            "z_loss": SELDOM,
            "sudden": SELDOM,
            "ahead": EVEN,
            "stale": ALWAYS,
        },
        needs="hold_v",
    ),
    Signature(
        "C3",
        "a rate at the edge of stability",
        {
            "earlier": OFTEN,
            "half_rate": ALWAYS,
            "rate_before": EVEN,
            "hold_v": SELDOM,
            "eps": EVEN,
            "clip": OFTEN,
            "qk": SELDOM,
            "decay": SELDOM,
            "z_loss": SELDOM,
            "update_first": SELDOM,
            "sudden": SELDOM,
            "ahead": ALWAYS,
            "stale": SELDOM,
        },
    ),
    Signature(
        "C3",
        "a rate that jumped",
        {
            "earlier": SELDOM,
            "half_rate": SELDOM,
            "rate_before": ALWAYS,
            "hold_v": SELDOM,
            "eps": SELDOM,
            "sudden": OFTEN,
            "rate_jumped": ALWAYS,
            "update_first": ALWAYS,
            "stale": EVEN,
        },
    ),
    Signature(
        "C4",
        "attention logits that grew",
        {
            "data": SELDOM,
            "earlier": OFTEN,
            "half_rate": SELDOM,
            "rate_before": EVEN,
            "hold_v": SELDOM,
            "eps": SELDOM,
            "clip": SELDOM,
            "qk": ALWAYS,
            "sudden": SELDOM,
            "update_first": SELDOM,
            "ahead": EVEN,
            "stale": EVEN,
        },
    ),
    Signature(
        "C5",
        "output logits that drifted",
        {
            "earlier": OFTEN,
            "half_rate": EVEN,
            "z_loss": ALWAYS,
            "wide_loss": EVEN,
            "eps": SELDOM,
            "clip": SELDOM,
            "stale": EVEN,
        },
    ),
    Signature(
        "C6",
        "embeddings that shrank",
        {
            "earlier": EVEN,
            "half_rate": OFTEN,
            "decay": ALWAYS,
            "embed_decay": ALWAYS,
            "eps": SELDOM,
            "clip": EVEN,
            "qk": SELDOM,
            "hold_v": SELDOM,
            "ahead": EVEN,
            "sudden": EVEN,
            "stale": EVEN,
        },
    ),
    Signature(
        "C7",
        "bad batches",
        {
            "data": ALWAYS,
            "content": ALWAYS,
            "earlier": NEVER,
            "half_rate": SELDOM,
            "clip": SELDOM,
            "sudden": ALWAYS,
            "stale": EVEN,
        },
    ),
    Signature(
        "C8",
        "batches that harm this state only",
        {
            "data": ALWAYS,
            "content": ALWAYS,
            "earlier": ALWAYS,
            "half_rate": OFTEN,
            "clip": OFTEN,
            "eps": EVEN,
            "hold_v": EVEN,
            "qk": EVEN,
            "sudden": EVEN,
            "stale": EVEN,
        },
    ),
    Signature(
        "C9",
        "a loss computed too coarsely",
        {
            "earlier": OFTEN,
            "half_rate": OFTEN,
            "eps": EVEN,
            "wide_loss": ALWAYS,
            "wide_all": ALWAYS,
            "clip": SELDOM,
            "update_first": SELDOM,
            "sudden": SELDOM,
            "hold_v": SELDOM,
            "z_loss": SELDOM,
            "ahead": EVEN,
            "stale": SELDOM,
        },
    ),
    Signature(
        "C9",
        "precision somewhere before the loss",
        {
            "earlier": EVEN,
            "half_rate": EVEN,
            "eps": EVEN,
            "wide_all": ALWAYS,
            "clip": SELDOM,
            "sudden": EVEN,
            "qk": SELDOM,
            "stale": EVEN,
        },
    ),
    Signature(
        "C9",
        "a gradient that overflowed",
        {
            "data": EVEN,
            "content": EVEN,
            "earlier": EVEN,
            "wide_all": EVEN,
            "wide_loss": EVEN,
            "sudden": ALWAYS,
            "overflowed": ALWAYS,
            "stale": EVEN,
        },
    ),
    Signature(
        "C13",
        "normalised weights that decay shrank",
        {
            "earlier": EVEN,
            "half_rate": OFTEN,
            "decay": ALWAYS,
            "clip": OFTEN,
            "eps": SELDOM,
            "hold_v": SELDOM,
            "sudden": SELDOM,
            "ahead": EVEN,
            "z_loss": SELDOM,
            "stale": EVEN,
        },
    ),
    Signature("C14", "nothing that was changed helps", {"sudden": EVEN, "update_first": SELDOM, "stale": EVEN}),
)
"""The classes that a replay can tell. C2 and C12 are not among them: the zoo has nothing to hold them to."""

PRIOR: dict[str, float] = {"C14": 0.25}
"""Weights of classes before any answer, 1 where not named: that nothing helps is also what too few cells look like."""
UNKNOWN = "unknown"
"""A cause that is none of these: it answers each question as an average of all of them would."""
UNKNOWN_PRIOR = 0.1
"""How often a spike is expected to be none of the known classes; the rest is shared by `PRIOR`."""

STRUCK: dict[str, dict[str, float]] = {
    "weights": {"C10": 0.6, "C11": 0.4},
    "gradient": {"C10": 0.95, "C11": 0.05},
    "rate": {"C11": 0.97, "C10": 0.03},
    "optimizer": {"C11": 0.9, "C10": 0.1},
    "batch": {"C7": 0.95, "C10": 0.05},
}
"""Where an unchanged replay does not spike: shares of the classes by what struck the recorded run."""
STRUCK_WORDS: dict[str, str] = {
    "weights": "the loss of step {at} was otherwise though every update before it was the same: the weights were "
    "changed between two steps, by a flipped bit or by whatever wrote to them",
    "gradient": "the gradient of step {at} was otherwise for the same loss: it was corrupted on its way, as by a rank",
    "rate": "the rate of step {at} was not the schedule's, for the same gradient",
    "optimizer": "the update of step {at} was otherwise from the same gradient at the same rate: moments or settings "
    "of the optimizer were not those of the snapshot's run",
    "batch": "the batch of step {at} was another one",
}


def probability(signature: Signature, question: str) -> float:
    """Of a yes."""
    return signature.yes.get(question, NEVER)


def average(question: str) -> float:
    """Of a yes from a cause that is none of these: the mean over the classes' ways."""
    return sum(probability(one, question) for one in SIGNATURES) / len(SIGNATURES)
