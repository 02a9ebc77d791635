"""Mistakes in the plugins that are asked for, found before training begins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import stablekit
from stablekit.arguments import parse
from stablekit.catalogue import PRESETS

if TYPE_CHECKING:
    from collections.abc import Iterable

_SELECTION = ("include", "exclude", "groups")


def refuse_misspelt(plugins: Iterable[Any]) -> None:
    """Make the plugins that strings and mappings name, once for nothing.

    Forms that are not known are left to :func:`stablekit.attach`.

    Raises:
        ValueError: A string names no plugin, or one with arguments out of range.
        TypeError: It has arguments of the wrong kind.
    """
    for one in plugins:
        if isinstance(one, (list, tuple)):
            refuse_misspelt(one)
        elif isinstance(one, str) and one not in PRESETS:
            name, arguments = parse(one)
            stablekit.create(name, **arguments)
        elif isinstance(one, Mapping) and len(one) == 1:
            ((name, given),) = one.items()
            stablekit.create(name, **_without_selection(given))


def _without_selection(given: Any) -> dict[str, Any]:  # noqa: ANN401 - as the user wrote it
    arguments = dict(given) if isinstance(given, Mapping) else {}
    return {key: arguments[key] for key in arguments if key not in _SELECTION}
