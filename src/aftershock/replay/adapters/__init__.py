"""Workloads from other people's trainers: one file each. Must not import a trainer: each file needs its own only."""
