"""Predict: LR sensitivity, and what small runs say of large ones."""
