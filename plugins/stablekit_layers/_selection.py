"""Which convolutions and linear layers of a model are chosen by ``include`` and ``exclude``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from stablekit.errors import AttachError
from stablekit.forward import modules
from stablekit_layers._gains import is_transposed

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["chosen_layers", "patterns"]

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def patterns(argument: str, value: str | Sequence[str] | None) -> list[str] | None:
    """Return names as a list, which is what a configuration that was saved holds.

    Raises:
        TypeError: They are neither names nor None.

    Example:
        >>> patterns("include", "blocks.*")
        ['blocks.*']
    """
    listed = [value] if isinstance(value, str) else value
    if listed is None:
        return None
    if not isinstance(listed, (list, tuple)) or not all(isinstance(one, str) for one in listed):
        raise TypeError(f"{argument} must be a string, a list of strings or None, got {value!r}")
    return list(listed)


def chosen_layers(
    model: nn.Module, surgery: str, include: list[str] | None, exclude: list[str] | None
) -> dict[str, nn.Module]:
    """Return layers by name: those included, else all of the base model, but those excluded.

    Raises:
        AttachError: There is none, or a name stands for no module, or for one of another kind.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> list(chosen_layers(model, "scaled-ws", None, ["1"]))
        ['0']
    """
    found = _body(model) if include is None else _included(model, surgery, include)
    around = _matching(model, exclude or [], argument="exclude").values()
    excluded = {id(module) for one in around for module in one.modules()}
    found = {name: layer for name, layer in found.items() if id(layer) not in excluded}
    if not found:
        left = " left by exclude" if excluded else ""
        raise AttachError(f"{type(model).__name__} has no convolution and no linear layer{left}")
    return found


def _body(model: nn.Module) -> dict[str, nn.Module]:
    body = {id(module) for module in getattr(model, "base_model", model).modules()}
    named = modules.named(model).items()
    return {name: one for name, one in named if id(one) in body and _is_layer(one)}


def _included(model: nn.Module, surgery: str, include: list[str]) -> dict[str, nn.Module]:
    found = _matching(model, include, argument="include")
    others = [f"{k} ({type(m).__name__})" for k, m in found.items() if not _is_layer(m)]
    if others:
        raise AttachError(f"{surgery} is for convolutions and linear layers: {others[0]}")
    return found


def _matching(model: nn.Module, wanted: list[str], *, argument: str) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for one in wanted:
        found |= modules.matching(model, one, argument=argument)
    # What was put into layers meanwhile is no part of the model that was named.
    return {name: one for name, one in found.items() if "parametrizations" not in name.split(".")}


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, _LAYERS) or is_transposed(module)
