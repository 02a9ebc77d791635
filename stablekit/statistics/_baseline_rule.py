"""What a robust baseline is made of, whether its numbers are floats or tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, final

if TYPE_CHECKING:
    from stablekit.scalars import Flag, Scalar

RISE, FALL, SPREAD = 0.05, 0.2, 0.01
"""By how much of its distance a value moves the level, and its deviation the spread."""
NOISE, LOG_NOISE = 0.01, 0.05
"""The least spread, as a part of the level, or of logarithms."""
DEPTH = 0.1
"""The part of the highest level that counts as the level where that is lower."""
DOUBT = 10.0
"""How many values it takes until the spread is believed by half."""
GAUSSIAN = math.sqrt(math.pi / 2)
"""A standard deviation over a mean absolute deviation."""
TINY = 1e-30


class Verdict(NamedTuple):
    """What a baseline says of a value, before it has learned from it."""

    value: Scalar
    """The value itself."""
    score: Scalar
    """How many standard deviations above the level; 0 in the warm-up. Of a value that is not finite
    it is infinite, or 0 on the scale "log"."""
    baseline: Scalar
    """The level, in the units of the value."""
    limit: Scalar
    """The value above which the score exceeds the threshold; infinite in the warm-up."""
    position: Scalar
    """The value on the baseline's scale: itself, or its logarithm."""
    level: Scalar
    """The level on that scale."""
    margin: Scalar
    """The distance at which the score is the threshold."""
    is_known: Flag
    """Whether there is anything to learn from it."""


class Past(NamedTuple):
    """What is kept of all values: floats, or tensors."""

    seen: Any = 0
    """How many entered since the level was last given up."""
    strain: Any = 0
    """By how many outliers outnumber other values."""
    level: Any = 0.0
    spread: Any = 0.0
    last: Any = 0.0
    """The latest value that entered, on the baseline's scale."""
    highest: Any = 0.0
    """The largest level so far, in absolute value."""


@final
@dataclass(frozen=True)
class Rule:
    """The settings of a :class:`~stablekit.statistics.RobustBaseline`."""

    threshold: float
    warmup: int
    patience: int
    is_log: bool
