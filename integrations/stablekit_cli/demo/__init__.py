"""``stablekit demo``: one unstable training run, repeated under different protections."""
