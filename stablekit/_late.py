"""Parameters that were added to a model after its optimizer was made."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from stablekit.errors import NoEffectWarning

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn

ADDED = "stablekit_added"
"""Attribute of a module: names of its own parameters that were added to the model it is part of."""


def warn_of_late(model: nn.Module, held: Iterable[Tensor], *, stacklevel: int) -> bool:
    """Warn if all that the optimizers of a session leave out of a model was added to it.

    If they leave out anything else, other optimizers train parts of the model, or nothing does on
    purpose, and it cannot be told which part of it added parameters are.
    """
    ids = set(map(id, held))
    left_out = {
        id(param): name
        for name, param in model.named_parameters()
        if param.requires_grad and id(param) not in ids
    }
    if not left_out or not left_out.keys() <= _added(model):
        return False
    first = next(iter(left_out.values()))
    more = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
    warnings.warn(
        f"{first}{more} were added to {type(model).__name__} and are in no optimizer of the"
        " session, so they will not train: make the optimizer after the surgery",
        NoEffectWarning,
        stacklevel=stacklevel + 1,
    )
    return True


def _added(model: nn.Module) -> set[int]:
    return {
        id(module._parameters.get(name))
        for module in model.modules()
        for name in vars(module).get(ADDED, ())
    }
