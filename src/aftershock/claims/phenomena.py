"""Grokking, learning Life, double descent, emergence, regularisation and the rest. Emergence alone has studies yet."""

from __future__ import annotations

from aftershock.claims.claim import Claim
from aftershock.claims.emergence_criteria import SCORE_TRIALS

PHENOMENA: tuple[Claim, ...] = (
    Claim(
        id="G1",
        source="Power et al. 2022, arXiv 2201.02177",
        statement="Small transformers on modular arithmetic generalise long after they fit",
        criterion="val99 / train99 at least 3 in at least 4 of 5 seeds",
    ),
    Claim(
        id="G2",
        source="Power et al. 2022, arXiv 2201.02177",
        statement="Weight decay is the intervention that saves most data",
        criterion="data fraction needed at fixed steps: at least halved against no decay, and against dropout, "
        "noise, smaller LR",
    ),
    Claim(
        id="G3",
        source="Power et al. 2022, arXiv 2201.02177",
        statement="Division groks as readily as addition",
        criterion="time ratio within 2",
    ),
    Claim(
        id="G4",
        source="Power et al. 2022, arXiv 2201.02177",
        statement="Less data, much later generalisation",
        criterion="log(steps) against fraction: slope below 0, interval excludes 0",
    ),
    Claim(
        id="G5",
        source="Thilak et al. 2022",
        statement="Without decay, grokking comes with slingshot spikes",
        criterion="share of grokking onsets within one slingshot",
    ),
    Claim(
        id="L1",
        source="Springer and Kenyon 2020",
        statement="A minimal CNN that can hold n steps of Life rarely learns them; the overcompleteness needed "
        "rises with n",
        criterion="success probability over 64 seeds for n = 1, 2, 3 and m",
    ),
    Claim(
        id="L2",
        source="Springer and Kenyon 2020",
        statement="Success peaks at a critical density of live cells",
        criterion="peak inside [0.3, 0.45]",
    ),
    Claim(
        id="L3",
        source="Springer and Kenyon 2020",
        statement="Near-minimal nets are sensitive to the sign of one weight",
        criterion="success with one sign flipped at the start",
    ),
    Claim(
        id="D1",
        source="Nakkiran et al. 2019",
        statement="Test error peaks where training error first reaches zero, against model size",
        criterion="peak within 20 % of the interpolation threshold",
    ),
    Claim(
        id="D2",
        source="Nakkiran et al. 2019",
        statement="More data can hurt",
        criterion="an interval of n over which error rises by at least 0.1",
    ),
    Claim(
        id="D3",
        source="Nakkiran et al. 2019",
        statement="Epoch-wise second descent",
        criterion="tiny scale: inconclusive expected; gpu scale defined",
    ),
    Claim(
        id="E1",
        source="a reader of Vance 2022",
        statement="A logit fit over the range [0.9 min, 1 - 0.9 (1 - max)] predicts better than a straight "
        "line, yet little",
        criterion="held-out error of both, R2 with interval",
        trial=SCORE_TRIALS["E1"],
    ),
    Claim(
        id="E2",
        source="Vance 2022",
        statement="The last improvement says almost nothing about the next",
        criterion="R2 below 0.1",
        trial=SCORE_TRIALS["E2"],
    ),
    Claim(
        id="E3",
        source="Schaeffer et al. 2023",
        statement="A jump may be in the metric only: accuracy of an L-part answer is about p^L",
        criterion="smooth companion monotone while the sharp metric jumps",
        trial=SCORE_TRIALS["E3"],
    ),
    Claim(
        id="E4",
        source="a reader of Vance 2022",
        statement="A task is a mixture of a few shared logit curves",
        criterion="held-out error of the mixture against one logit, per task",
        trial=SCORE_TRIALS["E4"],
    ),
    Claim(
        id="R1",
        source="common belief",
        statement="L1, L2 and dropout make a network more compressible",
        criterion="accuracy against sparsity and bits, per regulariser",
    ),
    Claim(
        id="R2",
        source="Filan et al. 2021",
        statement="L1 gives more clusterable networks than L2 or dropout",
        criterion="n-cut against shuffles, after pruning",
    ),
    Claim(
        id="R3",
        source="Breiman 2001; Marx et al. 2020",
        statement="Networks of equal loss differ inside (Rashomon)",
        criterion="ambiguity, discrepancy, CKA with intervals",
    ),
    Claim(
        id="T1",
        source="DeepNet, Wang et al. 2022",
        statement="Networks of a thousand layers can be trained stably",
        criterion="which schemes leave the unigram plateau at 12, 100, 300, 1,000 layers",
    ),
    Claim(
        id="M1",
        source="Carlini et al. 2022",
        statement="Memorisation grows log-linearly with model size, repeats and prompt length",
        criterion="three slopes with intervals",
    ),
    Claim(
        id="I1",
        source="common belief",
        statement="A network fits y = x^2 inside its data and fails outside",
        criterion="error ratio outside/inside, and for a network that is given x^2",
    ),
)
