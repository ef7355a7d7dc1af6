"""Explain a spike: run its steps again with one thing changed at a time, beside controls and shams.

Must not import the lab: what is replayed may be anybody's model.
"""
