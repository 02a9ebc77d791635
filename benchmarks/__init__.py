"""Measurements of what stablekit costs, side by side with what it replaces."""
