"""Reproduce: data, models, optimizers, fleets, interventions and sweeps at the edge of stability."""
