"""Signals: named places in any nn.Module, measures of what happens there, and detectors of what it means."""
