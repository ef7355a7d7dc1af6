"""Speed as ratios: ours against a plain PyTorch loop on the same work, in one process on one core."""
