"""The package version: part of every run id, so a change of numerics must change it."""

__version__ = "0.1.0"
