"""The plugins that installed distributions offer by entry point; none runs by itself."""

from __future__ import annotations

import difflib
import inspect
import warnings
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, final

from stablekit.errors import StablekitWarning, UnknownPluginError
from stablekit.hookspecs import Plugin, hooks_of

__all__ = ["GROUP", "PRESETS", "PluginInfo", "available", "create"]

GROUP = "stablekit.plugins"
"""The entry-point group: name -> class."""

_SURGERIES = "stablekit.surgery"  # of stablekit_layers, which offers what is made on models

PRESETS: dict[str, tuple[str, ...]] = {"recommended": ("nonfinite-guard", "zclip")}
"""Names that stand for a list of plugins."""


@final
@dataclass(frozen=True, slots=True)
class PluginInfo:
    """What is known of one plugin in the catalogue."""

    name: str
    """The name it is attached by."""
    summary: str
    """First line of its docstring."""
    distribution: str
    """The distribution that provides it."""
    version: str
    """That distribution's version."""
    entry_point: str
    """``module:Class``."""
    hooks: tuple[str, ...]
    """The hooks it implements, in firing order."""
    parameters: dict[str, Any]
    """Constructor parameters and defaults; ``inspect.Parameter.empty`` where required."""


def available() -> dict[str, PluginInfo]:
    """Return every plugin that can be attached by name, sorted by name.

    A plugin that cannot be imported is left out with a warning that says why.

    Example:
        >>> available()["zclip"].hooks
        ('transform_gradients',)
    """
    found = {}
    versions: dict[str, tuple[str, str]] = {}
    for name, point in sorted(_points().items()):
        try:
            found[name] = _info(point, versions)
        except (ImportError, AttributeError) as error:
            warnings.warn(
                f"plugin {name!r} ({point.value}) cannot be loaded: {error}",
                StablekitWarning,
                stacklevel=2,
            )
    return found


def create(name: str, /, **kwargs: Any) -> Plugin:  # noqa: ANN401 - the plugin's own arguments
    """Return a new plugin of this name, made with these constructor arguments.

    Raises:
        UnknownPluginError: No distribution provides the name; the nearest ones are listed.
        TypeError: The plugin takes no such argument; those it takes are listed.
        ValueError: The plugin refuses a value.

    Example:
        >>> create("zclip", z_thresh=3.0).name
        'zclip'
    """
    points = _points()
    if name in PRESETS and name not in points:
        parts = ", ".join(PRESETS[name])
        raise UnknownPluginError(
            f"{name!r} is a preset of {parts}, without arguments of its own; list those instead"
        )
    if name not in points:
        raise UnknownPluginError(_unknown(name, sorted([*points, *PRESETS])))
    factory = points[name].load()
    signature = inspect.signature(factory)
    try:
        signature.bind(**kwargs)
    except TypeError as error:
        raise TypeError(f"plugin {name!r}: {error}{_hint(kwargs, signature)}") from None
    try:
        plugin: Plugin = factory(**kwargs)
    except (TypeError, ValueError) as error:
        raise type(error)(f"plugin {name!r}: {error}") from error
    return plugin


def _hint(kwargs: dict[str, Any], signature: inspect.Signature) -> str:
    known = list(signature.parameters)
    near = [difflib.get_close_matches(key, known, n=1) for key in kwargs if key not in known]
    guess = f"; did you mean {near[0][0]}?" if near and near[0] else "."
    if {"include", "exclude", "groups"} & kwargs.keys():
        guess = "; which parameters it sees is said with stablekit.only(...), not to the plugin."
    return f"{guess} Its arguments are {', '.join(known)}."


def _points() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _origin(point: EntryPoint, known: dict[str, tuple[str, str]]) -> tuple[str, str]:
    """Return name and version of a distribution; its metadata is parsed once, which is slow."""
    if point.dist is None:
        return "", ""
    place = str(getattr(point.dist, "_path", id(point.dist)))
    if place not in known:
        known[place] = point.dist.name, point.dist.version
    return known[place]


def _info(point: EntryPoint, versions: dict[str, tuple[str, str]]) -> PluginInfo:
    factory = point.load()
    distribution, version = _origin(point, versions)
    parameters = inspect.signature(factory).parameters
    return PluginInfo(
        name=point.name,
        summary=(inspect.getdoc(factory) or "").partition("\n")[0],
        distribution=distribution,
        version=version,
        entry_point=point.value,
        hooks=hooks_of(factory),
        parameters={key: parameter.default for key, parameter in parameters.items()},
    )


def _unknown(name: str, known: list[str]) -> str:
    if any(point.name == name for point in entry_points(group=_SURGERIES)):
        return (
            f"{name!r} is a surgery, not a plugin: it is made on a model before its optimizer"
            f" exists, with stablekit_layers.apply(model, {name!r})"
        )
    nearest = difflib.get_close_matches(name, known, n=2)
    guess = f"; did you mean {' or '.join(map(repr, nearest))}?" if nearest else "."
    return f"no installed plugin is named {name!r}{guess} Known are: {', '.join(known)}."
