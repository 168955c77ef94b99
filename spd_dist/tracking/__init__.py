"""What a run shows while it goes on: metrics, their mirror on Weights & Biases, progress and log lines."""
