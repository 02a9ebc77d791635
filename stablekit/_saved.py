"""What a saved session must look like, apart from what its plugins put into it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stablekit.errors import StateError

if TYPE_CHECKING:
    from collections.abc import Mapping

VERSION = 1
_FRAME: dict[str, type] = {
    "version": int,
    "number": int,
    "updates": int,
    "skipped": int,
    "clipped": dict,
    "events": list,
    "plugins": dict,
}
_EVENT: dict[str, type] = {
    "kind": str,
    "step": int,
    "plugin": str,
    "message": str,
    "tensors": list,
    "data": dict,
}


def check_frame(state: object) -> None:
    """Refuse a state whose fields are not those of a saved session, one level above the plugins.

    Raises:
        StateError: The message names the field.
    """
    fields = _fields("stablekit", state, _FRAME)
    if fields["version"] != VERSION:
        raise StateError(f"state field version must be {VERSION}, got {fields['version']}")
    for name, count in fields["clipped"].items():
        _expect(f"clipped[{name!r}]", name, str)
        _expect(f"clipped[{name!r}]", count, int)
    for name, entry in fields["plugins"].items():
        _expect(f"plugins[{name!r}]", name, str)
        _fields(f"plugins.{name}", entry, {"settings": dict, "state": dict})
    for i, event in enumerate(fields["events"]):
        for tensor in _fields(f"events[{i}]", event, _EVENT)["tensors"]:
            _expect(f"events[{i}].tensors", tensor, str)


def _fields(path: str, value: object, kinds: Mapping[str, type]) -> dict[str, Any]:
    """Return a dict that has exactly these fields, each of its type."""
    if not isinstance(value, dict):
        raise StateError(f"state field {path} must be a dict, got {type(value).__name__}")
    if set(value) != set(kinds):
        odd = ", ".join(sorted(map(repr, set(value) ^ set(kinds))))
        raise StateError(f"state field {path} must hold {', '.join(kinds)}; missing or odd: {odd}")
    for key, kind in kinds.items():
        _expect(key if path == "stablekit" else f"{path}.{key}", value[key], kind)
    return value


def _expect(path: str, value: object, kind: type) -> None:
    """Refuse a value of another type; an integer must be a count."""
    if not isinstance(value, kind) or isinstance(value, bool):
        raise StateError(f"state field {path} must be of type {kind.__name__}, got {value!r}")
    if isinstance(value, int) and value < 0:
        raise StateError(f"state field {path} must be at least 0, got {value!r}")
