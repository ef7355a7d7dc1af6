"""What a replay can do otherwise, one file per kind of change; `replay.cells` gives them their names.

Every edit says first whether it means anything for this workload, then changes the run, and leaves in `run.undo` what
puts all of it back. Must not import the lab or the runner.
"""
