"""The tables behind ``stablekit plugins`` and ``stablekit show``."""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

import stablekit

if TYPE_CHECKING:
    from stablekit import PluginInfo

__all__ = ["UnknownNameError", "as_json", "as_table", "describe"]


class UnknownNameError(ValueError):
    """No installed plugin has this name; the message lists the nearest and the known ones."""


def as_table() -> Table:
    """Return the installed plugins, one a row."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("name", "summary", "distribution", "hooks"):
        made.add_column(heading, overflow="fold")
    for info in stablekit.available().values():
        cells = (info.name, info.summary, _origin(info), "\n".join(info.hooks))
        made.add_row(*map(Text, cells))
    return made


def as_json() -> str:
    """Return the fields of every ``PluginInfo``.

    A parameter without a default is null in ``parameters`` and named in ``required``.
    """
    return json.dumps([_fields(info) for info in stablekit.available().values()], indent=2)


def describe(name: str) -> str:
    """Return everything about one plugin, as text.

    Raises:
        UnknownNameError: There is no such plugin.
    """
    known = stablekit.available()
    if name not in known:
        raise UnknownNameError(_unknown(name, sorted(known)))
    info = known[name]
    factory = _load(info)
    parts = (
        f"{info.name}: {info.summary}",
        f"  {_constructor(info)}\n  from {_origin(info)}, {info.entry_point}",
        _section("Hooks", ", ".join(info.hooks) or "none"),
        _section("Cost of a step", getattr(factory, "cost", "not stated")),
        _section("Documentation", _documentation(factory)),
    )
    return "\n\n".join(parts)


def _constructor(info: PluginInfo) -> str:
    arguments = [
        key if default is inspect.Parameter.empty else f"{key}={default!r}"
        for key, default in info.parameters.items()
    ]
    return f"{info.entry_point.rpartition(':')[2]}({', '.join(arguments)})"


def _documentation(factory: Any) -> str:  # noqa: ANN401 - a class or a function
    """Return the docstring of the class and that of its module, which cites the paper."""
    module = inspect.getmodule(factory)
    return "\n\n".join(filter(None, (inspect.getdoc(factory), inspect.getdoc(module))))


def _fields(info: PluginInfo) -> dict[str, Any]:
    required = [key for key, value in info.parameters.items() if value is inspect.Parameter.empty]
    parameters = {
        key: None if key in required else _plain(value) for key, value in info.parameters.items()
    }
    return {**asdict(info), "parameters": parameters, "required": required}


def _plain(value: Any) -> Any:  # noqa: ANN401 - the default of any argument
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return repr(value)
    return value


def _load(info: PluginInfo) -> Any:  # noqa: ANN401 - a class or a function
    module, _, attribute = info.entry_point.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _origin(info: PluginInfo) -> str:
    return f"{info.distribution} {info.version}"


def _section(heading: str, text: str) -> str:
    return f"{heading}\n" + "\n".join(f"  {line}".rstrip() for line in text.splitlines())


def _unknown(name: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    guess = f"; did you mean {nearest[0]}?" if nearest else "."
    return f"no installed plugin is named {name!r}{guess} Known: {', '.join(known)}."
