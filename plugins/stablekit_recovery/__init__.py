"""Getting a run through what would end it: skipping bad steps."""

from stablekit_recovery.nonfinite_guard import NonFiniteGuard

__all__ = ["NonFiniteGuard"]
