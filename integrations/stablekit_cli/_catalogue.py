"""The tables behind ``stablekit plugins`` and ``stablekit show``."""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
from dataclasses import asdict
from typing import Any, TypeAlias

from rich.table import Table
from rich.text import Text

import stablekit
import stablekit_layers
from stablekit import PluginInfo
from stablekit_layers import SurgeryInfo

__all__ = ["UnknownNameError", "as_json", "as_table", "describe"]


Info: TypeAlias = PluginInfo | SurgeryInfo
"""What is known of something that is installed by name."""


class UnknownNameError(ValueError):
    """Nothing installed has this name; the message lists the nearest and the known ones."""


def as_table() -> Table:
    """Return the installed plugins and surgeries, one a row."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("name", "summary", "distribution", "hooks"):
        made.add_column(heading, overflow="fold")
    for info in _known().values():
        cells = (info.name, info.summary, _origin(info), "\n".join(_hooks(info)))
        made.add_row(*map(Text, cells))
    return made


def as_json() -> str:
    """Return the fields of every ``PluginInfo`` and ``SurgeryInfo``, with ``kind``.

    A parameter without a default is null in ``parameters`` and named in ``required``.
    """
    return json.dumps([_fields(info) for info in _known().values()], indent=2)


def describe(name: str) -> str:
    """Return everything about one plugin or surgery, as text.

    Raises:
        UnknownNameError: There is neither.
    """
    known = _known()
    if name not in known:
        raise UnknownNameError(_unknown(name, sorted(known)))
    info = known[name]
    factory = _load(info)
    parts = (
        f"{info.name}: {info.summary}",
        f"  {_constructor(info)}\n  from {_origin(info)}, {info.entry_point}",
        *_nature(info, factory),
        _section("Documentation", _documentation(factory)),
    )
    return "\n\n".join(parts)


def _known() -> dict[str, Info]:
    """Return plugins, then surgeries; of one name the plugin."""
    found: dict[str, Info] = dict(stablekit.available())
    for name, info in stablekit_layers.available().items():
        found.setdefault(name, info)
    return found


def _hooks(info: Info) -> tuple[str, ...]:
    return info.hooks if isinstance(info, PluginInfo) else ("(before training)",)


def _nature(info: Info, factory: Any) -> tuple[str, ...]:  # noqa: ANN401 - a class or a function
    """Return what tells when something acts and what it costs."""
    if isinstance(info, PluginInfo):
        return (
            _section("Hooks", ", ".join(info.hooks) or "none"),
            _section("Cost of a step", getattr(factory, "cost", "not stated")),
        )
    conflicts = ", ".join(sorted(getattr(factory, "conflicts", ()))) or "none"
    return (
        _section("Surgery", f"stablekit_layers.apply(model, {info.name!r}), before the optimizer"),
        _section("Folds into the plain model", "yes" if info.folds else "no"),
        _section("Not together with", conflicts),
    )


def _constructor(info: Info) -> str:
    arguments = [
        key if default is inspect.Parameter.empty else f"{key}={default!r}"
        for key, default in info.parameters.items()
    ]
    return f"{info.entry_point.rpartition(':')[2]}({', '.join(arguments)})"


def _documentation(factory: Any) -> str:  # noqa: ANN401 - a class or a function
    """Return the docstring of the class and that of its module, which cites the paper."""
    module = inspect.getmodule(factory)
    return "\n\n".join(filter(None, (inspect.getdoc(factory), inspect.getdoc(module))))


def _fields(info: Info) -> dict[str, Any]:
    required = [key for key, value in info.parameters.items() if value is inspect.Parameter.empty]
    parameters = {
        key: None if key in required else _plain(value) for key, value in info.parameters.items()
    }
    kind = "plugin" if isinstance(info, PluginInfo) else "surgery"
    return {**asdict(info), "kind": kind, "parameters": parameters, "required": required}


def _plain(value: Any) -> Any:  # noqa: ANN401 - the default of any argument
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return repr(value)
    return value


def _load(info: Info) -> Any:  # noqa: ANN401 - a class or a function
    module, _, attribute = info.entry_point.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _origin(info: Info) -> str:
    return f"{info.distribution} {info.version}"


def _section(heading: str, text: str) -> str:
    return f"{heading}\n" + "\n".join(f"  {line}".rstrip() for line in text.splitlines())


def _unknown(name: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    guess = f"; did you mean {nearest[0]}?" if nearest else "."
    return f"nothing installed is named {name!r}{guess} Known: {', '.join(known)}."
