"""Checks of saved statistics: what is taken back from a checkpoint has the form it was saved in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stablekit.arguments import number


def scalar_of(field: str, value: float, *, at_least: float | None = None) -> Tensor:
    """Return a saved number as a 0-dim float32 tensor.

    Raises:
        TypeError: It is not a number.
        ValueError: It is not finite in float32, or too small.

    Example:
        >>> scalar_of("mean", 0.5)
        tensor(0.5000)
    """
    scalar = torch.tensor(number(field, value, at_least=at_least), dtype=torch.float32)
    if not scalar.isfinite():
        raise ValueError(f"{field} must be a finite float32 number, got {value!r}")
    return scalar


def history_of(field: str, values: object) -> Tensor:
    """Return saved norms as a float32 vector on the CPU.

    Raises:
        TypeError: They are not a tensor of floating point numbers.
        ValueError: They are not a vector of finite numbers of at least 0.

    Example:
        >>> history_of("history", torch.tensor([1.0, 0.0]))
        tensor([1., 0.])
    """
    if not isinstance(values, Tensor) or not values.is_floating_point():
        raise TypeError(f"{field} must be a tensor of norms, got {values!r}")
    row = values.detach().to("cpu", torch.float32)
    if row.ndim != 1 or not bool((row.isfinite() & (row >= 0)).all()):
        raise ValueError(f"{field} must be a vector of finite norms, got {values!r}")
    return row


def rows_of(field: str, values: object) -> Mapping[str, Any]:
    """Return saved values by parameter name.

    Raises:
        TypeError: They are not a mapping from names.
    """
    if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
        raise TypeError(f"{field} must map parameter names to values, got {values!r}")
    return values
