"""Quantiles of the last values."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from stablekit.statistics._named import NamedValues
from stablekit.statistics._saved import history_of, rows_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

LONGEST = 1 << 23
"""The longest window: counts are float32, and run up to twice its length."""


@final
class WindowQuantile:
    """The quantile of the last values of each row, linearly interpolated; exact.

    A zero norm counts as a value, but a quantile that would rest on zeros is taken over the
    positive values alone: a threshold of zero would stop training for good.

    Example:
        >>> window = WindowQuantile(0.5, history=3)
        >>> rows = ("all",)
        >>> for x in (1.0, 2.0, 3.0, 10.0):
        ...     window.push(rows, torch.tensor([x]), when=torch.tensor(True))
        >>> window.value(rows, torch.device("cpu"))
        tensor([3.])
    """

    def __init__(self, quantile: float, *, history: int) -> None:
        """Start with empty windows."""
        self.quantile = quantile
        self.history = history
        self._values = NamedValues(default=math.inf, shape=(history,))
        self._counts = NamedValues(default=0.0)

    def push(self, names: Sequence[str], values: Tensor, *, when: Tensor) -> None:
        """Take in one value a row, ``[R]``, where ``when`` (0-dim or ``[R]``) is true."""
        kept = self._values.align(names, values.device)
        counts = self._counts.align(names, values.device)
        place = (counts % self.history).long().unsqueeze(1)
        new = torch.where(when, values, kept.gather(1, place).squeeze(1))
        self._values.set(kept.scatter(1, place, new.unsqueeze(1)))
        # Folded so that a float32 count never reaches the size at which adding 1 is lost.
        counts = counts + when
        self._counts.set(torch.where(counts >= 2 * self.history, counts - self.history, counts))

    def value(self, names: Sequence[str], device: torch.device) -> Tensor:
        """Return the quantile of each row, ``[R]``; infinite where nothing positive was seen."""
        kept = self._values.align(names, device)
        counts = self._counts.align(names, device).clamp(max=self.history)
        return window_quantile(kept, counts, self.quantile)

    def grow(self, history: int) -> None:
        """Make the window longer, without reading a value; only before it has wrapped around."""
        self._values.widen(history)
        self.history = history

    def state_dict(self) -> dict[str, Tensor]:
        """Return name -> values, oldest first, of the rows that have any."""
        counts = self._counts.state_dict()
        rows = self._values.rows()
        return {name: _oldest_first(rows[name], int(count)) for name, count in counts.items()}

    def load_state_dict(self, state: Mapping[str, Any], *, field: str) -> None:
        """Continue from saved values; the newest are kept if there are more than fit.

        Args:
            state: what :meth:`state_dict` returned.
            field: what an error message calls it.

        Raises:
            TypeError: It does not map names to tensors.
            ValueError: A row is not a vector of finite numbers of at least 0.
        """
        rows, counts = {}, {}
        for name, values in rows_of(field, state).items():
            row = history_of(f"{field}[{name!r}]", values)[-self.history :]
            counts[name] = torch.tensor(float(row.numel()))
            rows[name] = torch.cat([row, row.new_full((self.history - row.numel(),), math.inf)])
        self._values.replace(rows)
        self._counts.replace(counts)


def window_quantile(values: Tensor, counts: Tensor, quantile: float) -> Tensor:
    """Return the quantile of each row's first ``counts`` values; unused places are infinite.

    Args:
        values: ``[R, H]``, unused places ``+inf``.
        counts: float ``[R]``, how many places are in use.
        quantile: between 0 and 1.

    Example:
        >>> window_quantile(torch.tensor([[4.0, 2.0, math.inf]]), torch.tensor([2.0]), 0.25)
        tensor([2.5000])
    """
    ordered = values.sort(dim=1).values
    zeros = (values == 0).sum(dim=1)
    exact = counts.double()
    plain = (exact - 1) * quantile
    above = zeros + (exact - zeros - 1) * quantile
    place = torch.where(plain.floor() < zeros, above, plain).clamp(min=0)
    low = place.floor().long().clamp(max=values.shape[1] - 1)
    high = torch.minimum(low + 1, (counts.long() - 1).clamp(min=0))
    a = ordered.gather(1, low.unsqueeze(1)).squeeze(1)
    b = ordered.gather(1, torch.maximum(low, high).unsqueeze(1)).squeeze(1)
    between = torch.where(a.isinf(), a, a + (b - a) * (place - place.floor()).float())
    return torch.where(counts > zeros, between, math.inf)


def _oldest_first(row: Tensor, count: int) -> Tensor:
    history = row.numel()
    if count <= history:
        return row[:count].clone()
    start = count % history
    return torch.cat([row[start:], row[:start]])
