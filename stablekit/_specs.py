"""The forms in which a user may name a plugin, and the plugins they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stablekit._selection import Restricted, Selection
from stablekit.arguments import parse
from stablekit.catalogue import PRESETS, create
from stablekit.hookspecs import Plugin

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_SELECTION = ("include", "exclude", "groups")


def resolve(specs: Iterable[Any]) -> list[tuple[Plugin, Selection | None]]:
    """Return the plugins that specs stand for, with their restrictions, in order.

    Raises:
        TypeError: A spec has a form that is not known.
        ValueError: A string or mapping is malformed, or a name is unknown.
    """
    return [pair for spec in specs for pair in _resolve(spec)]


def _resolve(spec: Any) -> Iterator[tuple[Plugin, Selection | None]]:  # noqa: ANN401 - see the forms
    if isinstance(spec, Restricted):
        for plugin, inner in _resolve(spec.plugin):
            if inner is not None:
                raise ValueError(f"plugin {plugin.name!r} is restricted twice; use one only(...)")
            yield plugin, spec.selection
    elif isinstance(spec, str):
        name, arguments = parse(spec)
        if name in PRESETS and not arguments:
            yield from resolve(PRESETS[name])
        else:
            yield create(name, **arguments), None
    elif isinstance(spec, Mapping):
        yield _from_mapping(spec)
    elif isinstance(spec, (list, tuple)):
        yield from resolve(spec)
    elif isinstance(spec, type):
        raise TypeError(
            f"a plugin is given as an instance: write {spec.__name__}(...), not the class"
        )
    elif isinstance(spec, Plugin):
        if not isinstance(spec.name, str) or not spec.name:
            raise TypeError(f"a plugin's name must be a non-empty string, got {spec.name!r}")
        yield spec, None
    else:
        raise TypeError(
            "a plugin is given as an instance with a name, as 'name', as 'name:key=value', or as"
            f" {{'name': {{...}}}}; got {spec!r}, which has no attribute name"
        )


def _from_mapping(spec: Mapping[Any, Any]) -> tuple[Plugin, Selection | None]:
    if len(spec) != 1:
        raise ValueError(
            "a plugin mapping has one entry, as {'zclip': {'z_thresh': 3.0}}; several plugins are a"
            f" list of mappings; got {dict(spec)!r}"
        )
    ((name, given),) = spec.items()
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(f"arguments of plugin {name!r} must be a mapping, got {given!r}")
    arguments = dict(given or {})
    chosen = {key: arguments.pop(key) for key in _SELECTION if key in arguments}
    selection = Selection(*(chosen.get(key) for key in _SELECTION)) if chosen else None
    return create(name, **arguments), selection
