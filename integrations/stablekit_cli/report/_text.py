"""Numbers and counts as people read them; the same in the page, the tables and the terminal."""

from __future__ import annotations

import math

__all__ = ["counted", "listed", "number", "percent"]


def number(value: float | None) -> str:
    """Return a number with four significant digits.

    Example:
        >>> number(0.123456), number(1234567.0), number(12), number(float("nan")), number(None)
        ('0.1235', '1.235e+06', '12', 'nan', '-')
    """
    if value is None:
        return "-"
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    return f"{value:.4g}" if 1e-3 <= abs(value) < 1e5 else f"{value:.3e}"


def percent(share: float) -> str:
    """Return a share in percent, without rounding a small one to nothing.

    Example:
        >>> percent(0.5), percent(0.00003), percent(0.0), percent(0.99996)
        ('50%', '< 0.1%', '0%', '> 99.9%')
    """
    if 0 < share < 0.001:
        return "< 0.1%"
    if 0.999 < share < 1:
        return "> 99.9%"
    return f"{100 * share:.1f}".removesuffix(".0") + "%"


def counted(count: int, one: str, many: str | None = None) -> str:
    """Return a count with its noun.

    Example:
        >>> counted(1, "spike"), counted(2, "spike"), counted(1200, "step"), counted(0, "skip")
        ('1 spike', '2 spikes', '1,200 steps', 'no skips')
    """
    noun = one if count == 1 else many or f"{one}s"
    return f"{count:,} {noun}" if count else f"no {noun}"


def listed(parts: list[str]) -> str:
    """Join parts of a sentence.

    Example:
        >>> listed(["a", "b", "c"]), listed(["a"])
        ('a, b and c', 'a')
    """
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))
