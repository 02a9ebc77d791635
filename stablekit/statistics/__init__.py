"""Trackers of a running level, written once for host and device: what clippers learn from a run.

Every ``update`` or ``push`` takes ``when``, a 0-dim (or per-row) bool tensor, and changes nothing
where it is false; that is how a skipped step or a non-finite value stays out. State is plain values
and CPU tensors, the same in both modes.
"""

from stablekit.statistics._baseline import RobustBaseline, Verdict
from stablekit.statistics._growing import GrowingQuantile
from stablekit.statistics._moments import RunningMoments
from stablekit.statistics._named import NamedValues
from stablekit.statistics._saved import history_of, scalar_of
from stablekit.statistics._window import LONGEST, WindowQuantile, window_quantile
from stablekit.statistics._window_moments import WindowMoments

__all__ = [
    "LONGEST",
    "GrowingQuantile",
    "NamedValues",
    "RobustBaseline",
    "RunningMoments",
    "Verdict",
    "WindowMoments",
    "WindowQuantile",
    "history_of",
    "scalar_of",
    "window_quantile",
]
