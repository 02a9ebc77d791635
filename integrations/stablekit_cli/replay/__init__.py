"""``stablekit replay``: what plugins would have done on a recorded run, without training."""
