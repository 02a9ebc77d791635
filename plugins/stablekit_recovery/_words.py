"""Arguments that are several words: a sequence, or one string as the command line has it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def words(name: str, value: str | Iterable[str], allowed: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return the words of ``"loss+norm"``, or of a sequence, each of them once.

    Raises:
        TypeError: A word is not a string.
        ValueError: A word is empty, or is not one of the allowed ones.
    """
    given = value.split("+") if isinstance(value, str) else list(value)
    for word in given:
        if not isinstance(word, str):
            raise TypeError(f"{name} must be words, got {word!r}")
        if not word or (allowed and word not in allowed):
            known = f"some of {', '.join(map(repr, allowed))}" if allowed else "words, not empty"
            raise ValueError(f"{name} must be {known}, got {value!r}")
    return tuple(dict.fromkeys(given))
