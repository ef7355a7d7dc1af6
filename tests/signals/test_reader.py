"""The late reader: order, lateness, values frozen at the push."""

from __future__ import annotations

import torch

from aftershock.signals.reader import MAX_WAITING, LateReader


def test_one_step_late_and_nothing_lost() -> None:
    reader, late = LateReader(), []
    value = torch.zeros(2)
    for step in range(5):
        value.fill_(step)
        reader.push(step, value)
        late += reader.ready()
        assert [arrival.step for arrival in late] == list(range(step))
    late += reader.drain()
    assert [arrival.values.tolist() for arrival in late] == [[step, step] for step in range(5)]
    assert reader.drain() == []
    assert late[0].values.dtype == "float64"


def test_unread_values_wait_without_end() -> None:
    reader = LateReader()
    for step in range(3 * MAX_WAITING):
        reader.push(step, torch.tensor([float(step)]))
    assert [arrival.step for arrival in reader.ready()] == list(range(3 * MAX_WAITING - 1))
