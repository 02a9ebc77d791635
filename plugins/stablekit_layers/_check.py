"""Checking that a model is what its configuration, its adapters and its optimizer take it for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stablekit.errors import StateError
from stablekit_layers import _marks

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

__all__ = ["check"]


def check(model: nn.Module, *optimizers: Optimizer) -> None:
    """Raise unless a model has the surgeries that its configuration says its weights need.

    Also refused are adapters (PEFT) on a projection that a surgery changed: they would be added
    after its norm or gain, or their merging would be lost; and optimizers that do not hold what
    surgeries added.

    Args:
        model: what is checked; wrapped or not.
        *optimizers: all that train it, if that is to be checked too.

    Raises:
        StateError: What the model computes is not what was, or will be, trained.

    Example:
        >>> from torch import nn
        >>> check(nn.Linear(2, 2))
    """
    _check_configuration(model)
    for name, module in model.named_modules():
        if name.endswith("base_layer"):
            _check_adapted(name, module)
    if optimizers:
        _check_optimizers(model, optimizers)


def _check_configuration(model: nn.Module) -> None:
    asked = _marks.marked(model)
    made = [_marks.entry(surgery) for surgery in _marks.applied(model)]
    if hasattr(_marks.bare(model), "config") and asked != made:
        raise StateError(
            f"the configuration of this model asks for the surgeries {_marks.words(asked)}, made"
            f" were {_marks.words(made)}: load it with stablekit_layers.load"
        )


def _check_adapted(name: str, module: nn.Module) -> None:
    hooks: list[Any] = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    if any(_is_ours(getattr(hook, "func", type(hook))) for hook in hooks):
        raise StateError(
            f"what adapters put out is added to {name} after the norm or gain of a surgery:"
            " leave this projection out of their targets"
        )
    if any(_is_ours(type(part)) for part in module.modules()):
        raise StateError(
            f"the weight of {name} is computed by a surgery, so merging an adapter into it would be"
            " lost: fold the model before it gets adapters, or leave this projection out of their"
            " targets"
        )


def _is_ours(what: Any) -> bool:  # noqa: ANN401 - a class or a function
    return bool(what.__module__.partition(".")[0] == "stablekit_layers")


def _check_optimizers(model: nn.Module, optimizers: tuple[Optimizer, ...]) -> None:
    held = {id(p) for one in optimizers for group in one.param_groups for p in group["params"]}
    added = _marks.added(model)
    missing = [name for name, p in added.items() if p.requires_grad and id(p) not in held]
    if missing:
        raise StateError(
            f"no optimizer holds {missing[0]} and {len(missing) - 1} more of the {len(added)}"
            " parameters that surgeries added, so they would not train: make the optimizer after"
            " stablekit_layers.apply"
        )
