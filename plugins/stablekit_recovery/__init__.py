"""Getting a run through what would end it: skipping bad steps, going slower, going back."""

from stablekit_recovery.escalation import Escalation
from stablekit_recovery.lr_backoff import LRBackoff, recovered
from stablekit_recovery.nonfinite_guard import NonFiniteGuard
from stablekit_recovery.rollback import Rollback
from stablekit_recovery.skip_spikes import SkipSpikes, spike_limit

__all__ = [
    "Escalation",
    "LRBackoff",
    "NonFiniteGuard",
    "Rollback",
    "SkipSpikes",
    "recovered",
    "spike_limit",
]
