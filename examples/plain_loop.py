"""The guard in a loop of your own: five lines. A NaN is planted at batch 60; the run goes on without that step.

python examples/plain_loop.py
"""

from __future__ import annotations

import argparse
import inspect
import math

import torch
from torch import nn

from aftershock.guard.guard import Guard

torch.manual_seed(0)
text = torch.tensor(list(inspect.getsource(argparse).encode()[: 100 * 8 * 32])).view(100, 8, 32)
model = nn.Sequential(nn.Embedding(256, 64), nn.Linear(64, 256))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(text))

guard = Guard(model, optimizer, scheduler=scheduler, clip_norm=1.0)
for i, batch in enumerate(guard.batches(list(text))):
    loss = nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
    loss = loss * (math.nan if i == 60 else 1.0)
    loss.backward()
    guard.step(loss)
guard.close()
print(guard.report())
