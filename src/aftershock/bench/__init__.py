"""What detectors are worth on runs whose trouble is known: corpus, scoring, tuning, and the record of it."""
