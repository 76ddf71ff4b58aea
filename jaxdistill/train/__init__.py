"""Training: data, checkpoints, and the loop with its run directory."""
