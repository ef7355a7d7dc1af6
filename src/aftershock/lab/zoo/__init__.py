"""The zoo: training runs of seconds with a known end, and their labels: what detectors and replays are tried on."""
