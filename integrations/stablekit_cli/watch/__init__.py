"""``stablekit watch``: a recorded run in the terminal while it grows."""
