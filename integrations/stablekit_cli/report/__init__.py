"""``stablekit report``: one HTML file that shows what happened in a recorded run."""
