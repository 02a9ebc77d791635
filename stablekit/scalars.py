"""Arithmetic written once for numbers that are floats on the host and 0-dim tensors elsewhere.

``step.scalar(tensor)`` gives the one or the other. The operators ``+ - * < >`` and ``&`` take both;
here is what else a plugin needs. On the host a step's worth of it costs microseconds, where each
operation on a 0-dim tensor would cost one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["Flag", "Scalar", "invert", "is_finite", "like", "minimum", "ratio", "sqrt", "where"]

Scalar = float | Tensor
"""A number: a float in host mode, a 0-dim tensor in device mode."""

Flag = bool | Tensor
"""A decision: a bool in host mode, a 0-dim bool tensor in device mode."""


def where(condition: Flag, chosen: Scalar, otherwise: Scalar) -> Scalar:
    """Return ``chosen`` where the condition holds.

    Example:
        >>> where(True, 1.0, 2.0), where(torch.tensor(False), 1.0, 2.0)
        (1.0, tensor(2.))
    """
    if isinstance(condition, Tensor):
        return torch.where(condition, chosen, otherwise)
    return chosen if condition else otherwise


def minimum(a: Scalar, b: Scalar) -> Scalar:
    """Return the smaller of two numbers; NaN if ``a`` is NaN.

    Example:
        >>> minimum(1.0, 2.0), minimum(torch.tensor(3.0), 2.0)
        (1.0, tensor(2.))
    """
    return where(b < a, b, a)


def ratio(a: Scalar, b: Scalar) -> Scalar:
    """Return ``a / b``, infinite or NaN where ``b`` is 0, as tensors have it.

    Example:
        >>> ratio(1.0, 0.0), ratio(torch.tensor(1.0), 0.0)
        (inf, tensor(inf))
    """
    if isinstance(a, Tensor) or isinstance(b, Tensor) or b:
        return a / b
    return math.copysign(math.inf, a) if a else math.nan


def sqrt(a: Scalar) -> Scalar:
    """Return the square root of a number of at least 0.

    Example:
        >>> sqrt(4.0), sqrt(torch.tensor(4.0))
        (2.0, tensor(2.))
    """
    return a.sqrt() if isinstance(a, Tensor) else math.sqrt(a)


def is_finite(a: Scalar) -> Flag:
    """Tell whether a number is neither NaN nor infinite.

    Example:
        >>> is_finite(1.0), is_finite(torch.tensor(float("nan")))
        (True, tensor(False))
    """
    return a.isfinite() if isinstance(a, Tensor) else math.isfinite(a)


def invert(flag: Flag) -> Flag:
    """Return the opposite decision.

    Example:
        >>> invert(True), invert(torch.tensor(True))
        (False, tensor(False))
    """
    return ~flag if isinstance(flag, Tensor) else not flag


def like(value: Scalar, example: Scalar) -> Scalar:
    """Return a number in the form of another one, a float or a 0-dim tensor where that one is.

    What was loaded from a checkpoint is a float in either mode. Were it used as such with tensors,
    the first step after a resume would round elsewhere than the same step without one.

    Example:
        >>> like(2.0, torch.tensor(0.5)), like(torch.tensor(2.0), 0.5)
        (tensor(2.), 2.0)
    """
    if isinstance(example, Tensor):
        if isinstance(value, Tensor):
            return value.to(example.device)
        kind = torch.float32 if isinstance(value, float) else torch.int64
        return torch.full((), value, dtype=kind, device=example.device)
    return value.item() if isinstance(value, Tensor) else value
