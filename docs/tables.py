"""The tables of the README, made from the catalogue and the hook specifications by cog."""

from __future__ import annotations

import inspect

import stablekit
from stablekit import hookspecs
from stablekit.hookspecs import HOOKS


def plugin_table() -> str:
    """Return one row a plugin: name and arguments, what it does, what it costs."""
    rows = ["| plugin | what it does | cost a step |", "| --- | --- | --- |"]
    for info in stablekit.available().values():
        arguments = ", ".join(
            key if default is inspect.Parameter.empty else f"{key}={default!r}"
            for key, default in info.parameters.items()
            if key != "name"
        )
        cost = getattr(_class_of(info.entry_point), "cost", "")
        rows.append(f"| `{info.name}`<br>`{arguments}` | {info.summary} | {cost} |")
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
    cls: type = getattr(__import__(module, fromlist=[attribute]), attribute)
    return cls
