"""The guard in Lightning's Trainer: one callback. A NaN is planted at step 60; the run goes on without that step.

python examples/lightning_trainer.py
"""

from __future__ import annotations

import argparse
import inspect
import math
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from aftershock.guard.adapters.lightning import GuardCallback


class Bytes(LightningModule):
    """Predicts the next byte."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(256, 64), nn.Linear(64, 256))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss; a NaN is planted here."""
        text = batch[0]
        loss = nn.functional.cross_entropy(self.net(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        return loss * (math.nan if batch_idx == 60 else 1.0)

    def configure_optimizers(self) -> Any:
        """AdamW, as most do."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


torch.manual_seed(0)
text = torch.tensor(list(inspect.getsource(argparse).encode()[: 100 * 8 * 32])).view(-1, 32)
guard = GuardCallback()  # mode="restart" together with guarded_fit takes the data back as well
trainer = Trainer(max_epochs=1, accelerator="cpu", callbacks=[guard], logger=False, enable_checkpointing=False)
trainer.fit(Bytes(), DataLoader(TensorDataset(text), batch_size=8, shuffle=True))
print(guard.guard.report())
