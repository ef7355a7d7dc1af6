"""Specimens that spike by themselves: settings alone bring it about, at a step that nobody chose.

`build(seed, faulty=False)` gives the twin from which the known cause is removed and nothing else: same weights, same
data. Numbers in `about`: how many of the seeds 0 to 9 spike by `labels.label`, with the cause and without, on one CPU
thread. Legend: B sequences, N examples, D features.
Imports workloads, nets and the specimen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import LambdaLR

from aftershock.lab.zoo import nets
from aftershock.lab.zoo.nets import ByteLM, Curve, ModularMlp, TanhNet, Text, seeded, token_loss
from aftershock.lab.zoo.specimen import Specimen, Trial
from aftershock.lab.zoo.workloads import Words, held_out
from aftershock.workload import Workload

MODULUS = 59
"""Addition mod 59: 1,740 pairs to train on, a full batch in 2 ms."""

# --------------------------------------------------------------------------------------------- C9: numerics


def _slingshot(seed: int, *, faulty: bool = True) -> Trial:
    train, rest = nets.sums(MODULUS, seed=seed)
    model = seeded(seed, lambda: ModularMlp(MODULUS)).to(torch.float32 if faulty else torch.float64)
    optimizer = Adam(model.parameters(), lr=1e-2, betas=(0.9, 0.95), fused=True)
    return _trial(model, optimizer, lambda index: train, nets.sum_loss, rest)


def _bf16_loss(seed: int, *, faulty: bool = True) -> Trial:
    train, rest = nets.sums(MODULUS, seed=seed)
    model = seeded(seed, lambda: ModularMlp(MODULUS))
    optimizer = Adam(model.parameters(), lr=2e-3, betas=(0.9, 0.95), fused=True)

    def loss(model: nn.Module, batch: nets.Sums) -> Tensor:
        logits_NV = model(batch.a_N, batch.b_N).to(torch.bfloat16 if faulty else torch.float32)
        return F.cross_entropy(logits_NV, batch.sum_N).float()

    return _trial(model, optimizer, lambda index: train, loss, rest)


# --------------------------------------------------------------------------------- C1: lag of the second moment


def _memorising(seed: int, *, faulty: bool = True) -> Trial:
    text = Text(seed=seed, batch_size=16)
    whole = text.batch(0)
    model = seeded(seed, ByteLM)
    optimizer = Adam(model.parameters(), lr=1e-2, betas=(0.9, 0.99), amsgrad=not faulty, fused=True)
    return _trial(model, optimizer, lambda index: whole, token_loss, text.held_out())


def _lag_99(seed: int, *, faulty: bool = True) -> Trial:
    model = seeded(seed, TanhNet)
    optimizer = Adam(model.parameters(), lr=1e-2, betas=(0.9, 0.99), amsgrad=not faulty, fused=True)
    return _curve_trial(model, optimizer, None)


def _lag_999(seed: int, *, faulty: bool = True) -> Trial:
    model = seeded(seed, TanhNet)
    optimizer = Adam(model.parameters(), lr=1e-2, betas=(0.9, 0.999), eps=1e-8 if faulty else 1e-2, fused=True)
    return _curve_trial(model, optimizer, None)


# ------------------------------------------------------------------------------------- C3, C13: too sharp a place


def _edge_of_stability(seed: int, *, faulty: bool = True) -> Trial:
    model = seeded(seed, TanhNet)
    optimizer = SGD(model.parameters(), lr=0.01 if faulty else 0.005)
    return _curve_trial(model, optimizer, LambdaLR(optimizer, lambda step: 1 + 0.003 * step))


def _norm_against_decay(seed: int, *, faulty: bool = True) -> Trial:
    (x_ND, label_N), model = _clusters(seed), seeded(seed, _normalised_mlp)
    optimizer = SGD(model.parameters(), lr=0.5, weight_decay=0.01 if faulty else 0.0)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    train, rest = (x_ND[:400], label_N[:400]), (x_ND[400:], label_N[400:])
    return _trial(model, optimizer, lambda index: train, loss, rest)


def _clusters(seed: int) -> tuple[Tensor, Tensor]:
    """800 points around 20 centres in 64 dimensions, each of variance 1 about a centre from N(0, 1)."""
    random = torch.Generator().manual_seed(seed)
    centre_KD = torch.randn(20, 64, generator=random)
    label_N = torch.arange(800) % 20
    return centre_KD[label_N] + torch.randn(800, 64, generator=random), label_N


def _normalised_mlp() -> nn.Module:
    hidden = [nn.Linear(64, 128, bias=False), nn.LayerNorm(128), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(128, 128, bias=False), nn.LayerNorm(128), nn.ReLU(), nn.Linear(128, 20))


# ------------------------------------------------------------------------------------------- C4, C6: transformers


def _logit_growth(seed: int, *, faulty: bool = True) -> Trial:
    words = Words(seed=seed, batch_size=16)
    model = seeded(seed, lambda: ByteLM(context=32, qk_norm=not faulty))
    growing, rest = _split(model, lambda name: "query_key" in name)
    optimizer = AdamW([{"params": rest}, {"params": growing}], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def warm_up(step: int) -> float:
        return min(1.0, (step + 1) / 50)

    def grow(step: int) -> float:
        return warm_up(step) * 2 ** min(max(0, step - 300) / 20, 12)

    workload = _trial(model, optimizer, words.batch, token_loss, words.held_out()).workload
    workload.scheduler, workload.clip_norm = LambdaLR(optimizer, [warm_up, grow]), 1.0
    return Trial(workload, None)


def _embedding_decay(seed: int, *, faulty: bool = True) -> Trial:
    text = Text(seed=seed, batch_size=8)
    whole = text.batch(0)
    model = seeded(seed, ByteLM)
    tables, rest = _split(model, lambda name: name in ("embed.weight", "position.weight"))
    groups = [{"params": tables, "weight_decay": 5.0 if faulty else 0.0}, {"params": rest, "weight_decay": 0.0}]
    optimizer = AdamW(groups, lr=6e-4, betas=(0.9, 0.99), amsgrad=True, fused=True)
    return _trial(model, optimizer, lambda index: whole, token_loss, text.held_out())


# --------------------------------------------------------------------------------------------------------- pieces


def _split(model: nn.Module, chosen: Callable[[str], bool]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    named = list(model.named_parameters())
    return [p for name, p in named if chosen(name)], [p for name, p in named if not chosen(name)]


def _trial(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Callable[[int], Any],
    loss: Callable[[nn.Module, Any], Tensor],
    rest: Any,
) -> Trial:
    return Trial(
        Workload(model=model, optimizer=optimizer, batch=batch, loss=loss, held_out=held_out(loss, rest)), None
    )


def _curve_trial(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: LambdaLR | None) -> Trial:
    """Full batches of 200 points; held out are the 199 midpoints."""
    fine = nets.two_sines(399)
    points, between = Curve(fine.x_N1[::2], fine.y_N1[::2]), Curve(fine.x_N1[1::2], fine.y_N1[1::2])
    workload = _trial(model, optimizer, lambda index: points, nets.curve_loss, between).workload
    workload.scheduler = scheduler
    return Trial(workload, None)


# ------------------------------------------------------------------------------------------------------ specimens

SLINGSHOT = Specimen(
    name="slingshot",
    kind="spontaneous",
    cause="C9",
    about="Learned by heart in float32, the right class's probability rounds to 1 and its gradient to 0, others' do "
    "not; the loss falls to 5e-8 and jumps to 0.1 (10 of 10, first peak at 769 to 794); in float64 it goes on falling "
    "(0 of 10).",
    source="Thilak et al. 2022, arXiv 2206.04817; arXiv 2605.06152 (absorption in the softmax)",
    steps=1000,
    build=_slingshot,
)
BF16_LOSS = Specimen(
    name="bf16_loss",
    kind="spontaneous",
    cause="C9",
    about="The loss is computed in bf16 (10 of 10, from step 308 to 319: it turns and keeps rising to the end); in "
    "float32 it goes on falling (0 of 10).",
    source="arXiv 2605.06152 (absorption in the softmax), here 2^-8 instead of 2^-23",
    steps=800,
    build=_bf16_loss,
)
MEMORISING = Specimen(
    name="memorising",
    kind="spontaneous",
    cause="C1",
    about="A language model has learned 16 sequences by heart; gradients shrink and Adam's v decays after them (9 of "
    "10, first at 166 to 943, most after 800); AMSGrad, whose v never decays, has none (0 of 10).",
    source="arXiv 2506.04805",
    steps=1000,
    build=_memorising,
)
LAG_99 = Specimen(
    name="lag_99",
    kind="spontaneous",
    cause="C1",
    about="Gradients shrink and Adam's v decays after them, beta2 0.99 (10 of 10, first at 1,068 to 1,558); AMSGrad, "
    "whose v never decays, has none (0 of 10).",
    source="arXiv 2506.04805",
    steps=2000,
    build=_lag_99,
)
LAG_999 = Specimen(
    name="lag_999",
    kind="spontaneous",
    cause="C1",
    about="As lag_99 with beta2 0.999 (10 of 10, first at 931 to 1,677); eps 1e-2 bounds the step where v has decayed "
    "(0 of 10), but also slows the learning. AMSGrad, whose v torch divides by a bias correction that still grows, is "
    "no full remedy here (6 of 10); eps 1e-3 only delays (10 of 10).",
    source="arXiv 2506.04805",
    steps=2000,
    build=_lag_999,
)
EDGE_OF_STABILITY = Specimen(
    name="edge_of_stability",
    kind="spontaneous",
    cause="C3",
    about="The rate of gradient descent grows slowly until it passes 2 / sharpness, and the loss is catapulted (10 of "
    "10, first at 592 to 705); at half of every rate it is not (0 of 10).",
    source="Cohen et al. 2021, arXiv 2103.00065; Lewkowycz et al. 2020, arXiv 2003.02218",
    steps=1000,
    build=_edge_of_stability,
)
NORM_AGAINST_DECAY = Specimen(
    name="norm_against_decay",
    kind="spontaneous",
    cause="C13",
    about="Weight decay shrinks weights that a LayerNorm follows, so the loss around them sharpens (9 of 10, first at "
    "549 to 1,438); without decay nothing happens (0 of 10).",
    source="arXiv 2605.16622 (weight decay moves the edge of stability of MLPs)",
    steps=1600,
    build=_norm_against_decay,
)
LOGIT_GROWTH = Specimen(
    name="logit_growth",
    kind="spontaneous",
    cause="C4",
    about="From step 300 on the rate of W_q and W_k doubles every 20 steps; attention logits grow from 20 past 1,000 "
    "and attention comes apart (10 of 10, at 388 to 416, no recovery); with q and k normalised, at the same rates, the "
    "logits stay below 10 and nothing happens (0 of 10).",
    source="Dehghani et al. 2023, arXiv 2302.05442; Wortsman et al. 2023, arXiv 2309.14322, section 3.1",
    steps=600,
    build=_logit_growth,
)
EMBEDDING_DECAY = Specimen(
    name="embedding_decay",
    kind="spontaneous",
    cause="C6",
    about="Weight decay on the embeddings alone shrinks them until a step is large against them (10 of 10, first at "
    "323 to 597); without it, and nothing else changed, nothing happens (0 of 10). AMSGrad in both, so that the lag of "
    "lag_99 has no part in it.",
    source="OLMo 2, arXiv 2501.00656, section 3; Takase et al. 2023, arXiv 2312.16903",
    steps=700,
    build=_embedding_decay,
)

SPONTANEOUS: tuple[Specimen, ...] = (
    SLINGSHOT,
    BF16_LOSS,
    MEMORISING,
    LAG_99,
    LAG_999,
    EDGE_OF_STABILITY,
    NORM_AGAINST_DECAY,
    LOGIT_GROWTH,
    EMBEDDING_DECAY,
)
