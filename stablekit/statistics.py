"""Trackers of a running level, written once for host and device: what clippers learn from a run.

Every ``update`` takes ``when``, a 0-dim (or per-row) bool tensor, and changes nothing where it is
false; that is how a skipped step or a non-finite value stays out. State is plain values and CPU
tensors, the same in both modes.
"""

from __future__ import annotations

import heapq
import math
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["GrowingQuantile", "NamedValues", "RunningMoments", "WindowQuantile"]


@final
class RunningMoments:
    """Mean and population variance: exact over the first values, exponential averages after.

    For value number ``t > warmup``: ``mean = alpha * mean + (1 - alpha) * x``, then
    ``var = alpha * var + (1 - alpha) * (x - mean)**2`` with the new mean.

    Example:
        >>> moments = RunningMoments(warmup=2, alpha=0.9)
        >>> for x in (1.0, 3.0):
        ...     moments.update(torch.tensor(x), when=torch.tensor(True))
        >>> moments.mean, moments.var
        (tensor(2.), tensor(1.))
    """

    def __init__(self, *, warmup: int, alpha: float) -> None:
        """Start empty."""
        self.warmup = warmup
        self.alpha = alpha
        self.count = torch.zeros((), dtype=torch.int64)
        self.mean = torch.zeros(())
        self.var = torch.zeros(())

    @property
    def ready(self) -> Tensor:
        """0-dim bool: the warm-up is complete."""
        return self.count >= self.warmup

    def to(self, device: torch.device) -> None:
        """Move to the device on which values will come."""
        if self.mean.device != device:
            self.count, self.mean, self.var = (
                t.to(device) for t in (self.count, self.mean, self.var)
            )

    def update(self, value: Tensor, *, when: Tensor) -> None:
        """Take in a 0-dim value where ``when`` is true."""
        warm = self.count < self.warmup
        delta = value - self.mean
        weight = torch.where(warm, 1.0 / (self.count + 1), 1.0 - self.alpha)
        mean = self.mean + delta * weight
        spread = torch.where(warm, delta * (value - mean), (value - mean).square())
        var = self.var + (spread - self.var) * weight
        self.mean = torch.where(when, mean, self.mean)
        self.var = torch.where(when, var, self.var)
        self.count = self.count + when

    def state_dict(self) -> dict[str, Any]:
        """Return count, mean and variance as numbers."""
        return {"count": int(self.count), "mean": float(self.mean), "var": float(self.var)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from saved numbers.

        Raises:
            ValueError: A field is missing or not a finite number.
        """
        count, mean, var = (_finite(state, key) for key in ("count", "mean", "var"))
        self.count = torch.tensor(int(count))
        self.mean, self.var = torch.tensor(mean), torch.tensor(var)


@final
class NamedValues:
    """A row of values for each parameter, kept by name while parameters come and go.

    Example:
        >>> values = NamedValues(default=math.inf)
        >>> values.align(("a", "b"), torch.device("cpu"))
        tensor([inf, inf])
        >>> values.set(torch.tensor([1.0, 2.0]))
        >>> values.align(("b", "c"), torch.device("cpu"))
        tensor([2., inf])
    """

    def __init__(self, *, default: float, shape: tuple[int, ...] = ()) -> None:
        """Start without names; a new name starts at the default."""
        self.default = default
        self.shape = shape
        self._names: tuple[str, ...] = ()
        self._rows = torch.full((0, *shape), default)
        self._parked: dict[str, Tensor] = {}

    def align(self, names: Sequence[str], device: torch.device) -> Tensor:
        """Return the rows of these names, ``[len(names), *shape]``."""
        if names is not self._names and tuple(names) != self._names:
            self._parked.update(zip(self._names, self._rows.unbind(), strict=True))
            fresh = torch.full(self.shape, self.default, device=device)
            rows = [self._parked.pop(name, fresh).to(device) for name in names]
            self._rows = torch.stack(rows) if rows else fresh.new_full((0, *self.shape), 0.0)
        self._names = tuple(names)
        if self._rows.device != device:
            self._rows = self._rows.to(device)
        return self._rows

    def set(self, rows: Tensor) -> None:
        """Replace the rows of the names last aligned to."""
        self._rows = rows

    def state_dict(self) -> dict[str, Any]:
        """Return name -> number, or name -> CPU tensor where a row has a shape."""
        if not self.shape:
            parked = {name: float(row) for name, row in self._parked.items()}
            return {**parked, **dict(zip(self._names, self._rows.tolist(), strict=True))}
        rows = zip(self._names, self._rows.cpu().unbind(), strict=True)
        return {**self._parked, **{name: row.clone() for name, row in rows}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from saved rows.

        Raises:
            ValueError: A row has another shape or is not a number.
        """
        parked = {name: row_of(name, value, self.shape) for name, value in state.items()}
        self._names, self._rows = (), torch.full((0, *self.shape), self.default)
        self._parked = parked


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
        """Make the window longer; only before it has wrapped around."""
        state = self._values.state_dict()
        self._values = NamedValues(default=math.inf, shape=(history,))
        extra = torch.full((history - self.history,), math.inf)
        grown = {name: torch.cat([row, extra.to(row.device)]) for name, row in state.items()}
        self._values.load_state_dict(grown)
        self.history = history

    def state_dict(self) -> dict[str, Any]:
        """Return name -> values, oldest first."""
        counts = self._counts.state_dict()
        rows = self._values.state_dict()
        return {name: _oldest_first(row, int(counts[name])) for name, row in rows.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from saved values; the newest are kept if there are more than fit.

        Raises:
            ValueError: A row is not a vector of finite numbers of at least 0.
        """
        rows, counts = {}, {}
        for name, values in state.items():
            row = history_of(name, values)[-self.history :]
            rows[name] = torch.cat([row, torch.full((self.history - row.numel(),), math.inf)])
            counts[name] = float(row.numel())
        self._values.load_state_dict(rows)
        self._counts.load_state_dict(counts)


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
    plain = (counts - 1) * quantile
    above = zeros + (counts - zeros - 1) * quantile
    place = torch.where(plain.floor() < zeros, above, plain).clamp(min=0)
    low = place.floor().long().clamp(max=values.shape[1] - 1)
    high = torch.minimum(low + 1, (counts.long() - 1).clamp(min=0))
    a = ordered.gather(1, low.unsqueeze(1)).squeeze(1)
    b = ordered.gather(1, torch.maximum(low, high).unsqueeze(1)).squeeze(1)
    between = torch.where(a.isinf(), a, a + (b - a) * (place - place.floor()))
    return torch.where(counts > zeros, between, math.inf)


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

    def push(self, value: float) -> None:
        """Take in a finite value of at least 0."""
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
        """Return everything seen as a float32 vector, in ascending order."""
        seen = torch.tensor([*(-x for x in self._low), *self._high], dtype=torch.float32)
        return torch.cat([torch.zeros(self._zeros), seen.sort().values])

    def load(self, values: Tensor) -> None:
        """Continue from values, in any order."""
        self._zeros = int((values == 0).sum())
        self._low, self._high = [], sorted(values[values > 0].tolist())


def history_of(name: str, values: object) -> Tensor:
    """Return saved norms as a float32 vector.

    Raises:
        ValueError: They are not a vector of finite numbers of at least 0.
    """
    row = torch.as_tensor(values, dtype=torch.float32)
    if row.ndim != 1 or not bool((row.isfinite() & (row >= 0)).all()):
        raise ValueError(f"history of {name!r} must be a vector of finite norms, got {values!r}")
    return row


def row_of(name: str, value: object, shape: tuple[int, ...]) -> Tensor:
    """Return a saved row as a float32 tensor of this shape.

    Raises:
        ValueError: It is not a number or has another shape.
    """
    if isinstance(value, (str, bytes, type(None))):
        raise ValueError(f"value of {name!r} must be a number or a tensor, got {value!r}")
    row = torch.as_tensor(value, dtype=torch.float32)
    if tuple(row.shape) != shape or bool(row.isnan().any()):
        raise ValueError(f"value of {name!r} must have shape {list(shape)}, got {value!r}")
    return row


def _oldest_first(row: Tensor, count: int) -> Tensor:
    history = row.numel()
    row = row.cpu()
    if count <= history:
        return row[:count].clone()
    start = count % history
    return torch.cat([row[start:], row[:start]])


def _finite(state: Mapping[str, Any], key: str) -> float:
    value = state.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{key} must be a finite number, got {value!r}")
    return value
