"""Mean and standard deviation of the last values."""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from stablekit.scalars import like

if TYPE_CHECKING:
    from stablekit.scalars import Flag, Scalar


@final
class WindowMoments:
    """Mean and sample standard deviation of the last values that were let in.

    Both are taken afresh from the window each time, so nothing drifts and nothing that has left it
    is remembered. On the host values are floats, on a device one vector there.

    Example:
        >>> last = WindowMoments(3)
        >>> for x in (100.0, 1.0, 2.0, 3.0):
        ...     last.push(x, when=True)
        >>> last.push(1000.0, when=False)
        >>> last.moments()
        (2.0, 1.0)
    """

    def __init__(self, window: int) -> None:
        """Start empty."""
        self.window = window
        self._last: deque[float] = deque(maxlen=window)
        self._ring: Tensor | None = None
        self._places = torch.zeros(0)
        self._next: Scalar = 0
        self._count: Scalar = 0

    @property
    def count(self) -> Scalar:
        """How many values there are, at most ``window``."""
        return len(self._last) if self._ring is None else self._count

    def align(self, example: Scalar) -> None:
        """Hold the values as those that will come: floats, or tensors on their device."""
        if not isinstance(example, Tensor):
            if self._ring is not None:
                self.load(self.values())
        elif self._ring is None or self._ring.device != example.device:
            values = self.values()
            spare = torch.zeros(self.window - values.numel())
            self._ring = torch.cat([values, spare]).to(example.device)
            self._places = torch.arange(self.window, device=example.device)
            self._next = like(values.numel() % self.window, example)
            self._count = like(values.numel(), example)

    def push(self, value: Scalar, *, when: Flag) -> None:
        """Take in a finite float32 number where ``when`` is true, in place of the oldest."""
        if self._ring is None:
            if when:
                self._last.append(float(value))
            return
        here = (self._places == self._next) & when
        self._ring = torch.where(here, value, self._ring)
        self._next = (self._next + when) % self.window
        self._count = self._count + ((self._count < self.window) & when)

    def clear(self, *, when: Flag) -> None:
        """Forget all values where ``when`` is true."""
        if self._ring is None:
            if when:
                self._last.clear()
            return
        self._next = torch.where(torch.as_tensor(when), 0, self._next)
        self._count = torch.where(torch.as_tensor(when), 0, self._count)

    def moments(self) -> tuple[Scalar, Scalar]:
        """Return mean and sample standard deviation; 0 where there are too few values."""
        if self._ring is None:
            return _on_host(list(self._last))
        return _on_device(self._ring, self._places < self._count)

    def values(self) -> Tensor:
        """Return the values as a float32 vector, oldest first."""
        if self._ring is None:
            return torch.tensor(list(self._last), dtype=torch.float32)
        count, start = int(self._count), int(self._next)
        if count < self.window:
            return self._ring[:count].cpu().clone()
        return torch.cat([self._ring[start:], self._ring[:start]]).cpu()

    def load(self, values: Tensor) -> None:
        """Continue from values, oldest first; the newest are kept if there are more than fit."""
        self._ring = None
        self._last = deque(values.tolist(), maxlen=self.window)


def _on_host(values: list[float]) -> tuple[float, float]:
    if not values:
        return 0.0, 0.0
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, 0.0
    return mean, math.dist(values, [mean] * len(values)) / math.sqrt(len(values) - 1)


def _on_device(ring: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    """Compute in units of the largest value, of which neither sum nor square overflows."""
    count = held.sum()
    values = torch.where(held, ring, 0.0)
    unit = values.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
    mean = (values / unit).sum() / count.clamp(min=1)
    spread = torch.where(held, values / unit - mean, 0.0).square().sum()
    return mean * unit, (spread / (count - 1).clamp(min=1)).sqrt() * unit
