"""One spike from its first step to its end, so that a log has a line for each and not for more."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, final

from stablekit.arguments import flag, number, whole

if TYPE_CHECKING:
    from collections.abc import Mapping

_COUNTS = ("start", "latest", "length", "calm", "peak_step")


@final
class Episode:
    """What is going on in one signal, in plain numbers on the host.

    Args:
        threshold: the score above which a step belongs to a spike.
        merge_steps: after so many steps without one the spike is over.

    Example:
        >>> episode = Episode(threshold=6.0, merge_steps=2)
        >>> scores = enumerate((0.0, 7.0, 20.0, 9.0, 1.0, 0.0), start=1)
        >>> [episode.follow(number, score, score) for number, score in scores]
        ['', 'mild', 'severe', '', '', 'end']
        >>> episode.start, episode.length, episode.peak
        (2, 3, 20.0)
    """

    def __init__(self, *, threshold: float, merge_steps: int) -> None:
        """Start outside of any spike."""
        self.threshold = threshold
        self.merge_steps = merge_steps
        self.is_open = False
        self.is_severe = False
        self.start = self.latest = self.length = self.calm = self.peak_step = 0
        self.peak = 0.0
        self.peak_score = 0.0

    def follow(self, step: int, score: float, value: float) -> str:
        """Take in a step; say "mild" or "severe" where that is news, "end" at the end, else ""."""
        if score > self.threshold:
            return self._rise(step, score, value)
        if not self.is_open:
            return ""
        self.calm += 1
        self.is_open = self.calm < self.merge_steps
        return "" if self.is_open else "end"

    def close(self) -> bool:
        """End the spike, whatever its score, and tell if there was one."""
        was_open, self.is_open = self.is_open, False
        return was_open

    def _rise(self, step: int, score: float, value: float) -> str:
        severe = score >= 2 * self.threshold
        is_news = not self.is_open or (severe and not self.is_severe)
        if not self.is_open:
            self.start, self.length, self.peak_score = step, 0, -math.inf
            self.is_open, self.is_severe = True, False
        self.latest, self.length, self.calm = step, self.length + 1, 0
        self.is_severe = self.is_severe or severe
        if score > self.peak_score:
            self.peak_step, self.peak_score = step, score
            self.peak = math.inf if math.isnan(value) else value
        return ("severe" if severe else "mild") if is_news else ""

    def state_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers."""
        fields = ("is_open", "is_severe", *_COUNTS, "peak", "peak_score")
        return {field: getattr(self, field) for field in fields}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a saved spike.

        Raises:
            TypeError: A field is of the wrong type.
            ValueError: A count is negative.
        """
        flags = {field: flag(field, state[field]) for field in ("is_open", "is_severe")}
        counts = {field: whole(field, state[field]) for field in _COUNTS}
        peaks = {field: _height(field, state[field]) for field in ("peak", "peak_score")}
        for field, value in {**flags, **counts, **peaks}.items():
            setattr(self, field, value)


def _height(field: str, value: float) -> float:
    """Return a number that may be infinite: a spike to NaN or Inf has such a peak."""
    return value if value == math.inf else number(field, value)
