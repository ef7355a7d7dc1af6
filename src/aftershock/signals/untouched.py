"""A forward pass beside the training: afterwards no random state, buffer, mode or gradient has changed by one bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def untouched(model: nn.Module, *, evaluate: bool) -> Iterator[Callable[[], None]]:
    """Inside, `model` may run freely; on leaving, random states, buffers and each module's mode are as before.

    `evaluate`: dropout off, as in `model.eval()`; else modes stay as they are. Yields a function that sets random
    states and buffers back to what they were on entry, for a second pass that must draw the same dropout.
    Cost: a copy of the buffers.
    """
    devices = sorted({t.device.index for t in (*model.parameters(), *model.buffers()) if t.device.type == "cuda"})
    modes = {module: module.training for module in model.modules()}
    # A forward pass may write into a buffer, or put another tensor in its place.
    slots = {module: dict(module._buffers) for module in modes}
    buffers = [(buffer, buffer.detach().clone(), buffer._version) for buffer in model.buffers()]
    with torch.random.fork_rng(devices):
        cpu = torch.get_rng_state()
        cuda = {index: torch.cuda.get_rng_state(index) for index in devices}

        def as_on_entry() -> None:
            torch.set_rng_state(cpu)
            for index, state in cuda.items():
                torch.cuda.set_rng_state(state, index)
            with torch.no_grad():
                for buffer, before, version in buffers:
                    # Batch norm writes without raising the version; a copy that changes nothing would raise it, and
                    # spoil a backward pass that has saved the buffer.
                    if buffer._version != version or not torch.equal(buffer, before):
                        buffer.copy_(before)

        try:
            if evaluate:
                model.eval()
            yield as_on_entry
        finally:
            for module, training in modes.items():
                module.training = training
                module._buffers.clear()
                module._buffers.update(slots[module])
            as_on_entry()
