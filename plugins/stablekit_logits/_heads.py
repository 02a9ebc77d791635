"""Which module of a model makes its logits: the one named, and what to name otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from stablekit.errors import AttachError
from stablekit.forward import modules

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["head_names", "head_of", "module_name", "output_embedding"]

_SHOWN = 3


def module_name(value: str | int | None) -> str | None:
    """Return the constructor argument ``on``: in strings such as "z-loss:on=2" it is a number.

    Raises:
        TypeError: It is neither a string nor an integer nor None.

    Example:
        >>> module_name("head"), module_name(2)
        ('head', '2')
    """
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return str(value) if is_number else modules.pattern("on", value)  # type: ignore[arg-type]  # refused there


def output_embedding(model: nn.Module) -> nn.Module | None:
    """Return the output embedding of a model of transformers, or of one in a model."""
    return next(_output_embeddings(model), None)


def head_names(model: nn.Module) -> list[str]:
    """Return names of modules that may make the logits, the likeliest first.

    Output embeddings, if there are any; or linear layers with as many outputs as there are labels
    (``config.num_labels``); or all linear layers. The last one comes first.

    Example:
        >>> head_names(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)))
        ['2', '0']
    """
    names = {id(module): name for name, module in modules.named(model).items()}
    linear = [one for one in reversed(list(model.modules())) if isinstance(one, nn.Linear)]
    configs = (getattr(module, "config", None) for module in model.modules())
    labels = next((found for one in configs if (found := getattr(one, "num_labels", None))), None)
    classifying = [one for one in linear if one.out_features == labels]
    found = [*_output_embeddings(model)] or classifying or linear
    return list(dict.fromkeys(names[id(one)] for one in found if id(one) in names))


def head_of(model: nn.Module, on: str | None, plugin: str) -> nn.Module:
    """Return the module of that name, None for the output embedding.

    Raises:
        AttachError: There is no such module, or there are several.
    """
    if on is None:
        head = _own_embedding(model)
        if head is not None:
            return head
        raise AttachError(
            f"{plugin} finds no output embedding in {type(model).__name__}; name the module that"
            f" makes the logits{_perhaps(model)}"
        )
    try:
        found = modules.matching(model, on, argument="on")
    except AttachError as error:
        raise AttachError(
            f"{plugin}: name the module that makes the logits{_perhaps(model)}. {error}"
        ) from None
    if len(found) > 1:
        raise AttachError(f"{plugin}: on={on!r} matches {', '.join(found)}; name one module")
    return next(iter(found.values()))


def _perhaps(model: nn.Module) -> str:
    names = ", ".join(f"on={name!r}" for name in head_names(model)[:_SHOWN])
    return f" with on=, perhaps {names}" if names else " with on="


def _output_embeddings(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        found = _own_embedding(module)
        if found is not None:
            yield found


def _own_embedding(module: nn.Module) -> nn.Module | None:
    find = getattr(module, "get_output_embeddings", None)
    found = None if find is None else find()
    return found if isinstance(found, nn.Module) else None
