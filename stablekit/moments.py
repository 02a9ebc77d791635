"""What optimizers call their first and second moments in ``optimizer.state``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

__all__ = ["FIRST", "SECOND", "first", "second"]

FIRST: tuple[str, ...] = ("exp_avg", "momentum_buffer", "moment1", "m")
"""State keys of a running average of gradients, most common first."""

SECOND: tuple[str, ...] = ("exp_avg_sq", "square_avg", "sum", "moment2", "v")
"""State keys of a running average (or sum) of squared gradients, most common first."""


def first(state: Mapping[str, Any]) -> Tensor | None:
    """Return one parameter's first moment, None where its optimizer keeps none.

    Args:
        state: ``optimizer.state[parameter]``.

    Example:
        >>> import torch
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> p.grad = torch.ones(2)
        >>> optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.9)
        >>> optimizer.step()
        >>> first(optimizer.state[p])
        tensor([1., 1.])
    """
    return _find(state, FIRST)


def second(state: Mapping[str, Any]) -> Tensor | None:
    """Return one parameter's second moment, None where its optimizer keeps none.

    Args:
        state: ``optimizer.state[parameter]``.

    Example:
        >>> second({"momentum_buffer": Tensor([1.0])}) is None
        True
    """
    return _find(state, SECOND)


def _find(state: Mapping[str, Any], keys: tuple[str, ...]) -> Tensor | None:
    found = (state[key] for key in keys if isinstance(state.get(key), Tensor))
    return next(found, None)
