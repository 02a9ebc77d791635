"""The surgeries that installed distributions offer by entry point."""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, final

from stablekit import catalogue
from stablekit.arguments import parse
from stablekit.errors import StablekitWarning, UnknownPluginError
from stablekit_layers.surgery import GROUP, Surgery

__all__ = ["SurgeryInfo", "available", "create", "from_mapping", "from_text"]


@final
@dataclass(frozen=True, slots=True)
class SurgeryInfo:
    """What is known of one surgery in the catalogue."""

    name: str
    """The name it is applied by."""
    summary: str
    """First line of its docstring."""
    distribution: str
    """The distribution that provides it."""
    version: str
    """That distribution's version."""
    entry_point: str
    """``module:Class``."""
    folds: bool
    """Whether it can be computed into the plain model's weights."""
    parameters: dict[str, Any]
    """Constructor parameters and defaults; ``inspect.Parameter.empty`` where required."""


def available() -> dict[str, SurgeryInfo]:
    """Return every surgery that can be applied by name, sorted by name.

    A surgery that cannot be imported is left out with a warning that says why.

    Example:
        >>> sorted(available()) == list(available())
        True
    """
    found = {}
    for name, point in sorted(_points().items()):
        try:
            found[name] = _info(point)
        except (ImportError, AttributeError) as error:
            warnings.warn(
                f"surgery {name!r} ({point.value}) cannot be loaded: {error}",
                StablekitWarning,
                stacklevel=2,
            )
    return found


def create(name: str, /, **kwargs: Any) -> Surgery:  # noqa: ANN401 - the surgery's own arguments
    """Return a new surgery of this name, made with these constructor arguments.

    Raises:
        UnknownPluginError: No distribution provides the name; the nearest ones are listed.
        TypeError: The surgery takes no such argument; those it takes are listed.
        ValueError: The surgery refuses a value.
    """
    points = _points()
    if name not in points:
        raise UnknownPluginError(_unknown(name, sorted(points)))
    factory = points[name].load()
    signature = inspect.signature(factory)
    try:
        signature.bind(**kwargs)
    except TypeError as error:
        known = ", ".join(signature.parameters)
        raise TypeError(f"surgery {name!r}: {error}. Its arguments are {known}.") from None
    try:
        surgery: Surgery = factory(**kwargs)
    except (TypeError, ValueError) as error:
        raise type(error)(f"surgery {name!r}: {error}") from error
    return surgery


def from_text(text: str) -> Surgery:
    """Return the surgery that ``"name"`` or ``"name:key=value,key=value"`` stands for."""
    name, arguments = parse(text)
    return create(name, **arguments)


def from_mapping(given: Mapping[Any, Any]) -> Surgery:
    """Return what ``{name: arguments}`` stands for, or ``{"name": ..., "arguments": ...}``.

    The second is an entry of ``config.stablekit_surgery``.

    Raises:
        ValueError: It is neither.
    """
    if given.keys() == {"name", "arguments"}:
        given = {given["name"]: given["arguments"]}
    if len(given) != 1:
        raise ValueError(
            "a surgery's mapping has one entry, as {'qk-norm': {'per': 'projection'}}; several"
            f" surgeries are a list of mappings; got {dict(given)!r}"
        )
    ((name, arguments),) = given.items()
    if arguments is not None and not isinstance(arguments, Mapping):
        raise ValueError(f"arguments of surgery {name!r} must be a mapping, got {arguments!r}")
    return create(name, **(arguments or {}))


def _points() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _info(point: EntryPoint) -> SurgeryInfo:
    factory = point.load()
    parameters = inspect.signature(factory).parameters
    return SurgeryInfo(
        name=point.name,
        summary=(inspect.getdoc(factory) or "").partition("\n")[0],
        distribution=point.dist.name if point.dist else "",
        version=point.dist.version if point.dist else "",
        entry_point=point.value,
        folds=hasattr(factory, "fold"),
        parameters={key: parameter.default for key, parameter in parameters.items()},
    )


def _unknown(name: str, known: list[str]) -> str:
    if any(point.name == name for point in entry_points(group=catalogue.GROUP)):
        return (
            f"{name!r} is a plugin, not a surgery: it is attached to an optimizer with"
            f" stablekit.attach(optimizer, {name!r}, model=model)"
        )
    nearest = difflib.get_close_matches(name, known, n=2)
    guess = f"; did you mean {' or '.join(map(repr, nearest))}?" if nearest else "."
    return f"no installed surgery is named {name!r}{guess} Known are: {', '.join(known)}."
