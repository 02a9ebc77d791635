"""Checks of saved values that may be negative, such as losses."""

from __future__ import annotations

from torch import Tensor


def values_of(field: str, values: object) -> Tensor:
    """Return saved numbers as a float32 vector.

    Raises:
        TypeError: They are not a tensor of floating point numbers.
        ValueError: They are not a vector of finite numbers.
    """
    if not isinstance(values, Tensor) or not values.is_floating_point():
        raise TypeError(f"{field} must be a tensor of numbers, got {values!r}")
    row = values.detach().float().cpu()
    if row.ndim != 1 or not bool(row.isfinite().all()):
        raise ValueError(f"{field} must be a vector of finite numbers, got {values!r}")
    return row
