"""The guard in a loop on Accelerate, with gradient accumulation. A NaN is planted at micro-batch 60.

accelerate launch examples/accelerate_loop.py, or just python.
"""

from __future__ import annotations

import argparse
import inspect
import math

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from aftershock.guard.adapters.accelerate import guard_accelerate, plain_loader

torch.manual_seed(0)
# The guard counts micro-batches on over the end of an epoch; by default Accelerate does not.
plugin = GradientAccumulationPlugin(num_steps=2, sync_with_dataloader=False)
accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
text = torch.tensor(list(inspect.getsource(argparse).encode()[: 100 * 8 * 32])).view(-1, 32)
model = nn.Sequential(nn.Embedding(256, 64), nn.Linear(64, 256))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
loader = DataLoader(TensorDataset(text), batch_size=8, shuffle=True)
model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)

guard = guard_accelerate(accelerator, model, optimizer, scheduler=scheduler, clip_norm=1.0)
accelerator.register_for_checkpointing(guard)
for i, (batch,) in enumerate(guard.batches(plain_loader(loader))):
    with accelerator.accumulate(model):
        loss = nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss = loss * (math.nan if i == 60 else 1.0)
        accelerator.backward(loss)
        guard.step(loss / accelerator.gradient_accumulation_steps)
guard.close()
accelerator.print(guard.report())
