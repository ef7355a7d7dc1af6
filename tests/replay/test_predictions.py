"""How a model's predictions are found in its batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aftershock.replay.predictions import Asking, reading

SIZE, ROWS, LENGTH = 12, 4, 8
SMALL: dict[str, Any] = {
    "vocab_size": SIZE,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
}


def _tokens() -> Tensor:
    return torch.randint(SIZE, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "name", ["GPT2LMHeadModel", "LlamaForCausalLM", "BertForMaskedLM", "BertForSequenceClassification"]
)
def test_models_of_hugging_face_are_read_as_they_train(name: str) -> None:
    """equivalence: the cross-entropy of what is read is the model's own loss: shifted, aligned, or one a row."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = {
        "GPT2LMHeadModel": lambda: transformers.GPT2Config(
            n_positions=16, n_embd=8, n_layer=1, n_head=1, vocab_size=SIZE
        ),
        "LlamaForCausalLM": lambda: transformers.LlamaConfig(**SMALL, max_position_embeddings=16),
        "BertForMaskedLM": lambda: transformers.BertConfig(**SMALL),
        "BertForSequenceClassification": lambda: transformers.BertConfig(**SMALL, num_labels=3),
    }[name]()
    model = getattr(transformers, name)(config).eval()
    tokens = _tokens()
    labels = tokens[:, 0] % 3 if name.endswith("Classification") else tokens.clone()
    if labels.ndim == 2:
        labels[1, 2] = -100
    batch = {"input_ids": tokens, "labels": labels, "num_items_in_batch": torch.tensor(1.0)}
    logits, targets = reading(model, batch, None, None)
    found = nn.functional.cross_entropy(logits(model, batch).flatten(0, -2), targets(batch).flatten())
    own = model(input_ids=tokens, labels=labels).loss
    assert found.item() == pytest.approx(own.item(), rel=1e-6)  # float32 means
    ask = Asking(model, [batch], logits, targets)
    assert (ask.sequences, ask.num) == (labels.ndim == 2, int((targets(batch) >= 0).sum()))


class Table(nn.Module):
    """The next token from this one."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(SIZE, SIZE)

    def forward(self, input_ids: Tensor) -> Any:
        return self.table(input_ids)


class Odd(Table):
    def forward(self, input_ids: Tensor) -> Any:
        return (self.table(input_ids),)


@pytest.mark.parametrize(
    ("model", "batch", "words"),
    [
        (Table(), [_tokens(), _tokens(), torch.zeros(1)], "neither a dict with labels nor a pair"),
        (Table(), {"input_ids": _tokens(), "labels": _tokens()}, "whether the labels of Table are shifted"),
        (Table(), (_tokens(), _tokens()[:, 1:]), "do not fit targets"),
        (Table(), (_tokens(), torch.rand(ROWS, LENGTH)), "regressions have none"),
        (Table(), (_tokens(), torch.full((ROWS, LENGTH), -100)[:0]), "hold no target"),
        (Odd(), (_tokens(), _tokens()), "no logits in a model's output"),
    ],
)
def test_what_cannot_be_told_is_refused(model: nn.Module, batch: Any, words: str) -> None:
    """planted: with what to give."""
    with pytest.raises(ValueError, match=words):
        Asking(model, [batch], *reading(model, batch, None, None))


def test_what_is_given_is_taken() -> None:
    """contract: each of the two functions alone, and both."""
    batch = (_tokens(), _tokens())
    for logits, targets in ((_logits, None), (None, _targets), (_logits, _targets)):
        found = reading(Table(), batch, logits, targets)
        assert (logits is not None, targets is not None) == (found[0] is _logits, found[1] is _targets)


def _logits(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0])


def _targets(batch: Any) -> Tensor:
    return batch[1]
