"""The guard in Hugging Face's Trainer: one argument. A NaN is planted at step 60; the run goes on without that step.

python examples/hf_trainer.py
"""

from __future__ import annotations

import argparse
import inspect
import math
import tempfile
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from aftershock.guard.adapters.hf import GuardCallback

calls = iter(range(10**9))


def plant_a_nan(model: nn.Module, args: Any, output: Any) -> None:
    """What the guard is for."""
    if model.training and next(calls) == 60:
        output["loss"] = output["loss"] * math.nan


torch.manual_seed(0)
text = torch.tensor(list(inspect.getsource(argparse).encode()[: 200 * 32])).view(200, 32)
model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=32, n_embd=64, n_layer=1, n_head=4))
model.register_forward_hook(plant_a_nan)
guard = GuardCallback()  # mode="restart" together with guarded_train(trainer) takes the data back as well
trainer = Trainer(
    model,
    TrainingArguments(output_dir=tempfile.mkdtemp(), max_steps=100, save_strategy="no", report_to="none", use_cpu=True),
    train_dataset=[{"input_ids": row, "labels": row} for row in text],  # pyright: ignore[reportArgumentType]
    callbacks=[guard],
)
trainer.train()
print(guard.guard.report())
