"""Checks of constructor arguments, so that every plugin refuses a bad value in the same words."""

from __future__ import annotations

from numbers import Integral, Real
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["choice", "fraction", "number", "whole"]


def number(
    name: str, value: float, *, above: float | None = None, at_least: float | None = None
) -> float:
    """Return a finite real number within its bounds.

    Raises:
        TypeError: It is not a real number.
        ValueError: It is not finite or out of bounds; the message names argument, value and range.

    Example:
        >>> number("max_norm", -1, above=0)
        Traceback (most recent call last):
            ...
        ValueError: max_norm must be a finite number above 0, got -1
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    low = above if above is not None else at_least
    bound = "" if low is None else f" {'above' if above is not None else 'of at least'} {low:g}"
    number = float(value)
    is_low = (above is not None and number <= above) or (at_least is not None and number < at_least)
    if is_low or number != number or number in (float("inf"), float("-inf")):
        raise ValueError(f"{name} must be a finite number{bound}, got {value!r}")
    return number


def fraction(name: str, value: float, *, closed: bool = False, scale: float = 1.0) -> float:
    """Return a number between 0 and ``scale``, the ends included if ``closed``.

    Raises:
        TypeError: It is not a real number.
        ValueError: It is out of range.

    Example:
        >>> fraction("beta", 0.99)
        0.99
    """
    checked = number(name, value)
    inside = 0.0 <= checked <= scale if closed else 0.0 < checked < scale
    if not inside:
        ends = "from 0 to" if closed else "strictly between 0 and"
        raise ValueError(f"{name} must be {ends} {scale:g}, got {value!r}")
    return checked


def whole(name: str, value: int, *, at_least: int = 0) -> int:
    """Return an integer of at least so much.

    Raises:
        TypeError: It is not an integer.
        ValueError: It is too small.

    Example:
        >>> whole("warmup_steps", 25)
        25
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < at_least:
        raise ValueError(f"{name} must be an integer of at least {at_least}, got {value!r}")
    return int(value)


def choice(name: str, value: str, allowed: Collection[str]) -> str:
    """Return one of the allowed words.

    Raises:
        ValueError: It is another; the message lists them.

    Example:
        >>> choice("mode", "zscore", ("zscore", "percentile"))
        'zscore'
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value
