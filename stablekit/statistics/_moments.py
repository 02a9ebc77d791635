"""Mean and variance of a stream of numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch

from stablekit.arguments import number, whole
from stablekit.scalars import like, ratio, where

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stablekit.scalars import Flag, Scalar

_LARGEST = torch.finfo(torch.float32).max


@final
class RunningMoments:
    """Mean and population variance: exact over the first values, exponential averages after.

    For value number ``t > warmup``: ``mean = alpha * mean + (1 - alpha) * x``, then
    ``var = alpha * var + (1 - alpha) * (x - mean)**2`` with the new mean. A value with which the
    variance would overflow float32 is left out.

    Example:
        >>> moments = RunningMoments(warmup=2, alpha=0.9)
        >>> for x in (1.0, 3.0):
        ...     moments.update(x, when=True)
        >>> moments.mean, moments.var
        (2.0, 1.0)
    """

    def __init__(self, *, warmup: int, alpha: float) -> None:
        """Start empty."""
        self.warmup = warmup
        self.alpha = alpha
        self.count: Scalar = 0
        self.mean: Scalar = 0.0
        self.var: Scalar = 0.0

    @property
    def ready(self) -> Flag:
        """Whether the warm-up is complete."""
        return self.count >= self.warmup

    def align(self, example: Scalar) -> None:
        """Hold the numbers as the values that will come: floats, or tensors on their device."""
        self.count, self.mean, self.var = (
            like(held, example) for held in (self.count, self.mean, self.var)
        )

    def update(self, value: Scalar, *, when: Flag) -> None:
        """Take in a number where ``when`` is true."""
        weight = where(self.ready, 1.0 - self.alpha, ratio(1.0, self.count + 1))
        delta = value - self.mean
        mean = self.mean + delta * weight
        after = value - mean
        spread = after * where(self.ready, after, delta)
        var = self.var + (spread - self.var) * weight
        when = when & (var < _LARGEST)
        self.mean = where(when, mean, self.mean)
        self.var = where(when, var, self.var)
        self.count = self.count + when

    def state_dict(self) -> dict[str, Any]:
        """Return count, mean and variance as numbers."""
        return {"count": int(self.count), "mean": float(self.mean), "var": float(self.var)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from saved numbers.

        Raises:
            TypeError: A field is not a number.
            ValueError: A field is not finite, or is negative.
        """
        count = whole("count", state["count"])
        mean, var = number("mean", state["mean"]), number("var", state["var"], at_least=0)
        if not (abs(mean) < _LARGEST and var < _LARGEST):
            raise ValueError(f"mean and var must be float32 numbers, got {mean!r} and {var!r}")
        self.count, self.mean, self.var = count, mean, var
