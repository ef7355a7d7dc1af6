"""What PaLM reported about loss spikes, and what people guess about them. No studies yet."""

from __future__ import annotations

from aftershock.claims import arms_study, counted_criteria, course_criteria, incident_criteria
from aftershock.claims.claim import Claim, LineTrial

PALM = "Chowdhery et al. 2022, arXiv 2204.02311, section 5.1"
GUESS = "guesses about that section"

SPIKES: tuple[Claim, ...] = (
    Claim(
        id="S0",
        source=PALM,
        statement="Sham control: skipping as many random batches, or 1 ulp of noise, removes the spike just as "
        "often as skipping the suspects",
        criterion="rates with intervals; if equal, S1 can at most be inconclusive",
        trial=LineTrial(study="incidents", criterion=incident_criteria.shams_do_as_well),
    ),
    Claim(
        id="S1",
        source=PALM,
        statement="Rewinding about 100 steps and skipping the batches around the spike removes it",
        criterion="removal rate above the sham's, interval of the difference excludes 0, per cause class",
        trial=LineTrial(study="incidents", criterion=incident_criteria.skipping_removes),
    ),
    Claim(
        id="S2",
        source=PALM,
        statement="The same batches from a different, earlier checkpoint cause no spike",
        criterion="2x2 {suspect, other batches} x {suspect, healthy state}: only suspect/suspect spikes",
        trial=LineTrial(study="incidents", criterion=incident_criteria.batches_and_state_together),
    ),
    Claim(
        id="S3",
        source=PALM,
        statement="Spikes occur in spite of gradient clipping",
        criterion="at least one cause class spikes with clip 1.0",
        trial=LineTrial(study="counted", criterion=counted_criteria.spikes_though_clipped),
    ),
    Claim(
        id="S4",
        source=PALM,
        statement="Larger models spike more often at the same settings",
        criterion="spikes per 1e6 tokens against N, batch, depth, beta2 half-life in tokens",
        trial=LineTrial(study="counted", criterion=counted_criteria.larger_spike_more),
    ),
    Claim(
        id="H1",
        source=GUESS,
        statement="Weight decay damages sharp internal structure and so triggers spikes: replayed with less "
        "and less decay the spike shrinks",
        criterion="peak excess against decay {1, 0.5, 0.25, 0.1, 0}: monotone and decreasing",
        trial=LineTrial(study="incidents", criterion=incident_criteria.less_decay_shrinks),
    ),
    Claim(
        id="H2",
        source=GUESS,
        statement="Momentum and dropout change whether the spike comes",
        criterion="effect of beta1, beta2, dropout cells against controls",
        trial=LineTrial(study="incidents", criterion=incident_criteria.momentum_and_dropout_matter),
    ),
    Claim(
        id="H3",
        source=GUESS,
        statement="The spike starts in a definite subset of the network",
        criterion="the same place moves first in at least 70 % of the spikes of one cause class",
        trial=LineTrial(study="incidents", criterion=course_criteria.same_place_first),
    ),
    Claim(
        id="H4",
        source=GUESS,
        statement="How long do spikes last?",
        criterion="distribution of duration and recovery per cause class, reported",
        trial=LineTrial(study="incidents", criterion=course_criteria.spikes_last),
    ),
    Claim(
        id="H5",
        source=GUESS,
        statement="A spike is grokking: pushing through ends in a lower held-out loss than never spiking",
        criterion="paired held-out loss at equal tokens 10 spike-lengths later, at least 20 spikes, per cause class",
        trial=LineTrial(study="arms", criterion=arms_study.judge_h5),
    ),
    Claim(
        id="H6",
        source=GUESS,
        statement="Rewind-and-skip is counterproductive against pushing through",
        criterion="same arms plus rewind-and-skip; next-spike hazard too",
        trial=LineTrial(study="arms", criterion=arms_study.judge_h6),
    ),
    Claim(
        id="H7",
        source=GUESS,
        statement="Larger, better models have sharper internals and so spike",
        criterion="preconditioned sharpness at equal loss against N, and hazard against sharpness",
        trial=LineTrial(study="counted", criterion=counted_criteria.sharper_and_spikier),
    ),
    Claim(
        id="H8",
        source=GUESS,
        statement="During a spike the model believes something different rather than nothing",
        criterion="in the spike: entropy, KL to unigram and bigram, agreement with the pre-spike model, by "
        "token frequency",
        trial=LineTrial(study="incidents", criterion=course_criteria.something_else_believed),
    ),
)
