"""Constructor arguments: read from text, and checked in the same words by every plugin."""

from __future__ import annotations

import ast
import math
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["choice", "flag", "fraction", "number", "one_of", "parse", "plugin_name", "whole"]

_WORDS = {
    "true": True,
    "false": False,
    "none": None,
    "null": None,
    "inf": float("inf"),
    "nan": float("nan"),
}


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
    low = above if above is not None else at_least
    bound = "" if low is None else f" {'above' if above is not None else 'of at least'} {low:g}"
    checked = _real(name, value)
    is_low = (above is not None and checked <= above) or (
        at_least is not None and checked < at_least
    )
    if is_low or not math.isfinite(checked):
        raise ValueError(f"{name} must be a finite number{bound}, got {value!r}")
    return checked


def fraction(name: str, value: float, *, closed: bool = False, scale: float = 1.0) -> float:
    """Return a number between 0 and ``scale``, the ends included if ``closed``.

    Raises:
        TypeError: It is not a real number.
        ValueError: It is out of range.

    Example:
        >>> fraction("beta", 0.99)
        0.99
    """
    checked = _real(name, value)
    inside = 0.0 <= checked <= scale if closed else 0.0 < checked < scale
    if not inside:
        ends = "from 0 to" if closed else "strictly between 0 and"
        raise ValueError(f"{name} must be a number {ends} {scale:g}, got {value!r}")
    return checked


def whole(name: str, value: int, *, at_least: int = 0, at_most: int | None = None) -> int:
    """Return an integer within its bounds.

    Raises:
        TypeError: It is not an integer.
        ValueError: It is too small or too large.

    Example:
        >>> whole("warmup_steps", 25)
        25
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < at_least or (at_most is not None and value > at_most):
        end = "" if at_most is None else f" and at most {at_most}"
        raise ValueError(f"{name} must be an integer of at least {at_least}{end}, got {value!r}")
    return int(value)


def flag(name: str, value: bool) -> bool:
    """Return a bool; a word like "no" is not taken for one, since it would count as true.

    Raises:
        TypeError: It is not True or False.

    Example:
        >>> flag("per_tensor", True)
        True
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def choice(name: str, value: str, allowed: Collection[str]) -> str:
    """Return one of the allowed words.

    Raises:
        TypeError: It is not a string.
        ValueError: It is another word; the message lists the allowed ones.

    Example:
        >>> choice("mode", "zscore", ("zscore", "percentile"))
        'zscore'
    """
    words = ", ".join(map(repr, allowed))
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {words}, got {value!r}")
    if value not in allowed:
        raise ValueError(f"{name} must be one of {words}, got {value!r}")
    return value


def one_of(name: str, value: float, allowed: Collection[float]) -> float:
    """Return one of the allowed numbers.

    Raises:
        TypeError: It is not a real number.
        ValueError: It is another number; the message lists the allowed ones.

    Example:
        >>> one_of("norm_type", 2, (2.0, math.inf))
        2.0
    """
    checked = _real(name, value)
    if checked not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")
    return checked


def plugin_name(name: str | None, default: str) -> str:
    """Return the name a plugin goes by in its session: the one given, or its usual one.

    Raises:
        TypeError: It is neither a string nor None.
        ValueError: It is empty.

    Example:
        >>> plugin_name(None, "zclip")
        'zclip'
    """
    if name is None:
        return default
    if not isinstance(name, str):
        raise TypeError(f"name must be a string or None, got {name!r}")
    if not name:
        raise ValueError(f"name must be a string of at least one character, got {name!r}")
    return name


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """Split ``"name:key=value,key=value"`` into the name and its keyword arguments.

    Raises:
        ValueError: A part is not ``key=value``.

    Example:
        >>> parse("zclip:z_thresh=3.0,mode=percentile,max_grad_norm=none")
        ('zclip', {'z_thresh': 3.0, 'mode': 'percentile', 'max_grad_norm': None})
    """
    name, _, rest = text.partition(":")
    arguments = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"expected key=value after {name + ':'!r}, got {item!r} in {text!r}")
        arguments[key.strip()] = _value(value.strip())
    return name.strip(), arguments


def _real(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _value(text: str) -> Any:  # noqa: ANN401 - any plain value
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
