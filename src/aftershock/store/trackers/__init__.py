"""Adapters of experiment trackers to `aftershock.store.sinks.Sink`, one file each."""
