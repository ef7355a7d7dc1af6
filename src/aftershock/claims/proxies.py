"""The claims of `Small-scale proxies for large-scale Transformer training instabilities`, and their studies.

Wortsman et al. 2023, arXiv 2309.14322. All studies draw on one pool of runs, so an arm that several need trains once.
Tiny scale: 200 steps of 8 x 64 bytes, the paper's warm-up of 5 %, widths 16 to 96 (P5: 192), heads of 16, three seeds.
"""

from __future__ import annotations

import dataclasses

from aftershock.claims import criteria, growth
from aftershock.claims.claim import Claim, Trial
from aftershock.claims.forecast_criteria import FORECAST_TRIALS
from aftershock.lab.presets import tiny_run
from aftershock.lab.recipe import PAPER_LRS, RunConfig
from aftershock.lab.sweep import SweepSpec

PAPER = "Wortsman et al. 2023, arXiv 2309.14322"
SEEDS = (0, 1, 2)
STEPS = 200
WIDTHS = ("16x2", "32x2", "64x2")
WIDE = (*WIDTHS, "96x2")

TINY = tiny_run(steps=STEPS)


def _decaying(steps: int) -> RunConfig:
    """A base whose independent decay shrinks weights over the run as the paper's does, by about e^-5.

    The paper's 1e-4 for 1e5 steps becomes 10 / steps; 1e-4 itself would do nothing in a run this short.
    """
    base = tiny_run(steps=steps)
    return dataclasses.replace(base, optim=dataclasses.replace(base.optim, weight_decay=1e-4 * 1e5 / steps))


def _sweep(
    name: str,
    title: str,
    *,
    sizes: tuple[str, ...] = WIDTHS,
    arms: tuple[str, ...] = ("baseline",),
    lrs: tuple[float, ...] = PAPER_LRS,
    base: RunConfig = TINY,
) -> SweepSpec:
    return SweepSpec(name=name, title=title, base=base, sizes=sizes, arms=arms, lrs=lrs, seeds=SEEDS)


PROXIES: tuple[Claim, ...] = (
    Claim(
        id="P1",
        source=PAPER,
        statement="Without qk-layernorm the learning rate at which training fails falls as the model grows",
        criterion="slope of log(first failing LR) against log N below 0, interval excludes 0",
        trial=Trial(
            sweep=_sweep("P1", "Where training fails against size", sizes=WIDE, arms=("baseline", "no_qk_norm")),
            criterion=criteria.failing_rate_falls,
        ),
    ),
    Claim(
        id="P2",
        source=PAPER,
        statement="With qk-layernorm LR sensitivity is lower at every size",
        criterion="paired difference below 0 at every size, interval excludes 0 at the largest",
        trial=Trial(
            sweep=_sweep(
                "P2", "LR sensitivity with and without qk-layernorm", sizes=WIDE, arms=("baseline", "no_qk_norm")
            ),
            criterion=criteria.qk_norm_lowers_sensitivity,
        ),
    ),
    Claim(
        id="P3",
        source=PAPER,
        statement="Below a critical LR the arms with and without qk-layernorm coincide",
        criterion="difference within 2 seed standard deviations below the critical LR",
        trial=Trial(
            sweep=_sweep(
                "P3", "Below the critical rate the arms coincide", sizes=WIDE, arms=("baseline", "no_qk_norm")
            ),
            criterion=criteria.arms_coincide,
        ),
    ),
    Claim(
        id="P4",
        source=PAPER,
        statement="Block-0 max attention logit at 2 % of the run separates runs that later fail",
        criterion="AUC on held-out seeds at least 0.95, threshold reported",
        trial=FORECAST_TRIALS["P4"],
    ),
    Claim(
        id="P5",
        source=PAPER,
        statement="Fitting that logit against size predicts the failing LR of a size never trained",
        criterion="predicted failing LR within one ladder step, interval given, at least two held-out sizes",
        trial=FORECAST_TRIALS["P5"],
    ),
    Claim(
        id="P6",
        source=PAPER,
        statement="Without weight decay log Z drifts at high LR; z-loss removes the drift; weight decay alone does so "
        "for larger models",
        criterion="final abs(log Z) ratio at least 10 between arms",
        trial=Trial(
            sweep=_sweep(
                "P6",
                "log Z at high rates, with and without z-loss and weight decay",
                arms=(growth.NEITHER, growth.Z_ONLY, growth.DECAY_ONLY, "baseline"),
                lrs=PAPER_LRS[-3:],
                base=_decaying(2 * STEPS),  # the drift comes late in the run
            ),
            criterion=growth.log_z_drifts,
            signals=(growth.ABS_LOG_Z,),
        ),
    ),
    Claim(
        id="P7",
        source=PAPER,
        statement="Longer warm-up lowers LR sensitivity, more so for larger models",
        criterion="monotone in warm-up length at the largest size",
        trial=Trial(
            # none, 1 %, 5 % and 20 % of the steps; the paper's own lengths are in a figure only
            sweep=_sweep("P7", "Warm-up length", arms=("warmup:0", "warmup:2", "baseline", "warmup:40")),
            criterion=criteria.warmup_lowers_sensitivity,
        ),
    ),
    Claim(
        id="P8",
        source=PAPER,
        statement="Independent weight decay lowers LR sensitivity against coupled",
        criterion="paired difference below 0, using the paper's two ranges",
        trial=Trial(
            # the paper's own coefficients, 1e-4 and 0.1, which agree at a rate of 1e-3
            sweep=_sweep(
                "P8", "Independent against coupled decay", arms=("baseline", criteria.COUPLED), lrs=(1e-4, *PAPER_LRS)
            ),
            criterion=criteria.independent_decay_lowers_sensitivity,
        ),
    ),
    Claim(
        id="P9",
        source=PAPER,
        statement="Depth raises LR sensitivity faster than width at equal N",
        criterion="slope difference above 0, interval excludes 0",
        trial=Trial(
            # N / 12: 32x2 2048; 32x4 4096 and 48x2 4608; 32x8 and 64x2 8192
            sweep=_sweep("P9", "Depth against width", sizes=("32x2", "32x4", "48x2", "32x8", "64x2")),
            criterion=criteria.depth_raises_sensitivity_faster,
        ),
    ),
    Claim(
        id="P10",
        source=PAPER,
        statement="muParam (simple) fixes the best LR over width but improves neither loss nor sensitivity",
        criterion="best-LR slope nearer 0; loss and sensitivity differences include 0 or are positive",
        trial=Trial(
            # the base width is the smallest one, as the paper's 256 is in its family
            sweep=_sweep("P10", "muParam against standard", arms=("baseline", criteria.MUP)),
            criterion=criteria.mup_fixes_the_best_rate_only,
        ),
    ),
    Claim(
        id="P11",
        source=PAPER,
        statement="Gradient RMS falls with N and LR; when it nears AdamW eps the update shrinks; lower eps cures, "
        "higher eps harms",
        criterion="signs of three slopes; update RMS at eps = measured grad RMS at least 30 % lower",
        trial=FORECAST_TRIALS["P11"],
    ),
    Claim(
        id="P12",
        source=PAPER,
        statement="Forcing attention logits to scale kappa harms from about 1e3 and at 1e4 is worse than no attention "
        "and MLP at all",
        criterion="loss at each kappa against the bigram network",
        trial=FORECAST_TRIALS["P12"],
    ),
    Claim(
        id="P13",
        source=PAPER,
        statement="Number of steps and batch size hardly matter for LR sensitivity",
        criterion="differences within 2 seed standard deviations",
        trial=Trial(
            sweep=_sweep(
                "P13",
                "Half and twice the steps; twice and four times the batch at equal tokens",
                arms=(
                    "baseline",
                    "warmup:5+steps:100",
                    "warmup:20+steps:400",
                    "batch:16+warmup:5+steps:100",
                    "batch:32+warmup:2+steps:50",  # 5 % of 50 is 2.5
                ),
            ),
            criterion=criteria.length_and_batch_hardly_matter,
        ),
    ),
    Claim(
        id="P14",
        source=PAPER,
        statement="Logit growth comes from the norms of q and k, not from their alignment",
        criterion="share of log-growth explained by norms at least 0.8",
        trial=Trial(
            sweep=_sweep("P14", "What makes attention logits grow", sizes=WIDE, arms=("no_qk_norm",)),
            criterion=growth.norms_explain_growth,
            signals=(growth.LOGIT, growth.Q_NORM, growth.K_NORM),
        ),
    ),
    Claim(
        id="P15",
        source=PAPER,
        statement="Attention without softmax (squared ReLU) grows too",
        criterion="ratio at the failing LR at least 10",
        trial=Trial(
            sweep=_sweep("P15", "Attention without softmax", arms=(growth.RELU2,)),
            criterion=growth.relu2_logits_grow,
            signals=(growth.LOGIT, growth.Q_NORM, growth.K_NORM),
        ),
    ),
    Claim(
        id="P16",
        source=PAPER,
        statement="Block-output RMS grows with LR and with depth",
        criterion="both slopes above 0",
        trial=Trial(
            sweep=_sweep("P16", "Block outputs against rate and depth", sizes=criteria.DEPTH_FAMILY),
            criterion=growth.outputs_grow,
            signals=("output/blocks.*/rms",),
        ),
    ),
    Claim(
        id="P17",
        source=PAPER,
        statement="Normalising q and k per head is at least as good as over the whole width",
        criterion="sensitivity difference at most 0",
        trial=Trial(
            # two heads at least: with one head the two are the same thing
            sweep=_sweep(
                "P17",
                "qk-layernorm per head or whole",
                sizes=criteria.WIDTH_FAMILY,
                arms=("baseline", criteria.WHOLE_WIDTH),
            ),
            criterion=criteria.per_head_is_as_good,
        ),
    ),
)
