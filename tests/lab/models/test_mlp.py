"""mlp: the grokking model, against plain modules and by what it must not look at."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aftershock.lab.models import Probe, build_model
from aftershock.lab.models.layout import Layout
from aftershock.lab.models.mlp import Mlp
from aftershock.lab.models.ops import token_loss
from aftershock.lab.recipe import MlpConfig, PrecisionConfig

CPU = torch.device("cpu")
P = 7  # modulus; the vocabulary has two more tokens


def build(precision: PrecisionConfig | None = None) -> Mlp:
    precision = precision or PrecisionConfig(params="float64", loss="float64")
    return Mlp(MlpConfig(embed=6, hidden=10), vocab_size=P + 2, context=4, precision=precision, device=CPU)


def start(model: Mlp, *seeds: int) -> dict[str, Tensor]:
    layout = Layout(model.specs())
    return layout.views(layout.init(seeds, dtype=model.dtypes.params, device=CPU))


def equations(replicas: int, num: int = 5) -> tuple[Tensor, Tensor]:
    a, b = torch.randint(P, (2, replicas, num), generator=torch.Generator().manual_seed(0))
    inputs = torch.stack([a, torch.full_like(a, P), b, torch.full_like(a, P + 1)], dim=-1)
    targets = torch.full_like(inputs, -1)
    targets[..., -1] = (a + b) % P
    return inputs, targets.flatten(1)


def plain(params: dict[str, Tensor], k: int, inputs_BT: Tensor) -> Tensor:
    """Replica k's logits after `=`: embed both operands, join, one ReLU layer, head without a bias."""
    joined = torch.cat([params["embed.a"][k][inputs_BT[:, 0]], params["embed.b"][k][inputs_BT[:, 2]]], dim=-1)
    return F.linear(joined, params["hidden"][k].T, params["hidden_bias"][k]).clamp(min=0) @ params["head"][k]


@pytest.mark.parametrize("replicas", [1, 3])
def test_equivalence_with_plain_layers(replicas: int) -> None:
    """equivalence: loss and every gradient, in float64 to 1e-10."""
    model = build()
    params = {name: value.requires_grad_() for name, value in start(model, *range(replicas)).items()}
    with torch.no_grad():
        params["hidden_bias"].normal_(generator=torch.Generator().manual_seed(1))
    inputs, targets = equations(replicas)
    z_K = torch.full((replicas,), 1e-2, dtype=torch.float64)
    loss = token_loss(model(params, inputs), targets, z_K, dtype=torch.float64)
    expected = []
    for k in range(replicas):
        out = plain(params, k, inputs[k])
        ce = F.cross_entropy(out, targets[k].view(-1, 4)[:, -1])
        expected.append(ce + 1e-2 * out.logsumexp(-1).square().mean())
    torch.testing.assert_close(loss.total_K, torch.stack(expected), rtol=1e-10, atol=1e-10)
    grads = [
        torch.autograd.grad(total, list(params.values())) for total in (loss.total_K.sum(), torch.stack(expected).sum())
    ]
    for name, ours, theirs in zip(params, *grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10, msg=name)


def test_positions_that_are_not_scored_get_zeros() -> None:
    """contract: logits stand at the last position; the operation and the equals sign are not looked at."""
    model = build()
    params = start(model, 0, 1)
    inputs, _ = equations(2)
    out = model(params, inputs).view(2, 5, 4, P + 2)
    assert (out[:, :, :3] == 0).all()
    assert (out[:, :, 3] != 0).any(-1).all()
    swapped = inputs.clone()
    swapped[..., 1], swapped[..., 3] = 0, 1
    assert torch.equal(model(params, swapped).view_as(out), out)


def test_the_probe_changes_nothing_and_sees_the_hidden_layer() -> None:
    model, probe = build(), Probe(2)
    params, (inputs, _) = start(model, 0, 1), equations(2)
    assert torch.equal(model(params, inputs, probe), model(params, inputs))
    assert set(probe.values) == {"output/blocks.0/rms"}
    joined = torch.cat([params["embed.a"][1][inputs[1, :, 0]], params["embed.b"][1][inputs[1, :, 2]]], dim=-1)
    expected = (joined @ params["hidden"][1]).square().mean().sqrt()
    torch.testing.assert_close(probe.values["output/blocks.0/rms"][1], expected)


def test_default_size() -> None:
    """contract: 103k parameters at modulus 97, as phenomena's base row has; unit embeddings, head without bias."""
    shared = {"vocab_size": 99, "context": 4, "precision": PrecisionConfig(), "device": CPU}
    specs = build_model(MlpConfig(), **shared).specs()
    sizes = {spec.name: spec.size for spec in specs}
    # Operands are residues: two rows of each embedding and two columns of the head belong to the operator and `=`.
    assert sum(sizes.values()) - 2 * 2 * 128 - 2 * 256 == 97 * 128 * 2 + 256 * 256 + 256 + 256 * 97
    assert {spec.name: spec.std for spec in specs if spec.name.startswith("embed")} == {"embed.a": 1.0, "embed.b": 1.0}


def test_bf16_stays_close() -> None:
    """equivalence: one matmul over 12 inputs rounded at 2^-9; logits are of order 1."""
    inputs, _ = equations(2)
    outs = []
    for matmul in ("params", "bfloat16"):
        model = build(PrecisionConfig(matmul=matmul))
        params = start(model, 0, 1)
        params["hidden"] = params["hidden"].to(model.dtypes.matmul)
        outs.append(model(params, inputs))
    assert outs[1].dtype == torch.float32
    assert 0 < (outs[0] - outs[1]).abs().max() < 0.05
