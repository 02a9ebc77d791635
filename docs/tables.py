"""The tables of the README, made from the catalogue and the hook specifications by cog."""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING, Any

import stablekit
import stablekit_layers
from stablekit import hookspecs
from stablekit.hookspecs import HOOKS

if TYPE_CHECKING:
    from collections.abc import Mapping

_PACKAGES = (
    "stablekit_clipping",
    "stablekit_recovery",
    "stablekit_monitors",
    "stablekit_updates",
    "stablekit_logits",
)


def plugin_tables() -> str:
    """Return one table a package of the catalogue, under what the package says of itself."""
    by_package: dict[str, list[stablekit.PluginInfo]] = {}
    for info in stablekit.available().values():
        by_package.setdefault(info.entry_point.partition(".")[0].partition(":")[0], []).append(info)
    known = [name for name in _PACKAGES if name in by_package]
    others = sorted(by_package.keys() - set(known))
    return "\n".join(_package_table(name, by_package[name]) for name in (*known, *others))


def _package_table(package: str, infos: list[stablekit.PluginInfo]) -> str:
    about = (inspect.getdoc(importlib.import_module(package)) or "").partition("\n")[0]
    head = [f"`{package}` - {about}", "", "| plugin | what it does | cost a step |"]
    return "\n".join([*head, "| --- | --- | --- |", *map(_plugin_row, infos)]) + "\n"


def _plugin_row(info: stablekit.PluginInfo) -> str:
    cost = getattr(_class_of(info.entry_point), "cost", "")
    return f"| `{info.name}`<br>`{_arguments(info.parameters)}` | {info.summary} | {cost} |"


def _arguments(parameters: Mapping[str, Any]) -> str:
    return ", ".join(
        key if default is inspect.Parameter.empty else f"{key}={default!r}"
        for key, default in parameters.items()
        if key != "name"
    )


def surgery_table() -> str:
    """Return one row a surgery of the catalogue."""
    rows = ["| surgery | what it does |", "| --- | --- |"]
    for info in stablekit_layers.available().values():
        rows.append(f"| `{info.name}`<br>`{_arguments(info.parameters)}` | {info.summary} |")
    return "\n".join(rows) + "\n"


def hook_table() -> str:
    """Return one row a hook, in firing order: exact arguments, and when it fires."""
    rows = ["| hook | when it fires |", "| --- | --- |"]
    for name in HOOKS:
        function = getattr(hookspecs, name)
        arguments = ", ".join(inspect.signature(function).parameters)
        summary = (inspect.getdoc(function) or "").partition("\n")[0]
        rows.append(f"| `{name}({arguments})` | {summary} |")
    return "\n".join(rows) + "\n"


def _class_of(entry_point: str) -> type:
    module, _, attribute = entry_point.partition(":")
    cls: type = getattr(importlib.import_module(module), attribute)
    return cls
