"""A quantile of everything ever seen."""

from __future__ import annotations

import heapq
import math
from array import array
from typing import final

import torch
from torch import Tensor


@final
class GrowingQuantile:
    """The exact quantile of all values ever seen, on the host, in O(log n) a value.

    Two heaps meet at the quantile's place, so neither past values nor their number slow a step.
    Zeros are counted apart, as in :class:`WindowQuantile`.

    Example:
        >>> seen = GrowingQuantile(0.5)
        >>> for x in (4.0, 1.0, 3.0):
        ...     seen.push(x)
        >>> seen.value()
        3.0
    """

    def __init__(self, quantile: float) -> None:
        """Start with no value."""
        self.quantile = quantile
        self._low: list[float] = []
        self._high: list[float] = []
        self._zeros = 0
        self._seen = array("f")

    def push(self, value: float) -> None:
        """Take in a finite float32 value of at least 0."""
        self._seen.append(value)
        if value == 0.0:
            self._zeros += 1
        elif self._low and value <= -self._low[0]:
            heapq.heappush(self._low, -value)
        else:
            heapq.heappush(self._high, value)

    def value(self) -> float:
        """Return the quantile, linearly interpolated; infinite where nothing positive was seen."""
        positive = len(self._low) + len(self._high)
        if not positive:
            return math.inf
        place = (positive + self._zeros - 1) * self.quantile - self._zeros
        if place < 0:
            place = (positive - 1) * self.quantile
        whole = math.floor(place)
        self._balance(whole + 1)
        low = -self._low[0]
        high = self._high[0] if self._high else low
        return low + (high - low) * (place - whole)

    def _balance(self, size: int) -> None:
        while len(self._low) < size:
            heapq.heappush(self._low, -heapq.heappop(self._high))
        while len(self._low) > size:
            heapq.heappush(self._high, -heapq.heappop(self._low))

    def values(self) -> Tensor:
        """Return everything seen as a float32 vector, oldest first."""
        if not self._seen:
            return torch.zeros(0)
        return torch.frombuffer(self._seen, dtype=torch.float32).clone()

    def load(self, values: Tensor) -> None:
        """Continue from values, oldest first."""
        self._zeros = int((values == 0).sum())
        self._low, self._high = [], sorted(values[values > 0].tolist())
        self._seen = array("f", values.tolist())
