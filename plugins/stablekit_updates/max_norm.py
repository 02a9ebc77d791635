"""Capping the norm of every output unit's weights.

Srivastava et al.: Dropout: A Simple Way to Prevent Neural Networks from Overfitting (JMLR 2014),
section 5.1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from stablekit import hookimpl
from stablekit.arguments import number, plugin_name
from stablekit.gradients import local
from stablekit_updates._weights import matrices, report, row_copies, whole, within

if TYPE_CHECKING:
    from stablekit import Step

__all__ = ["MaxNorm", "unit_factors", "unit_norms"]


def unit_factors(norms: Tensor, max_norm: float, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return ``max_norm / norm`` for the units above the cap and 1 for the others.

    A hair less, so that rounding the products to ``dtype`` does not bring them above it again.

    Example:
        >>> unit_factors(torch.tensor([0.5, 4.0]), 1.0)
        tensor([1.0000, 0.2500])
    """
    return torch.where(norms > max_norm, within(max_norm, dtype) / norms, 1.0)


def unit_norms(weights: Tensor) -> Tensor:
    """Return the L2 norms of those rows of dim 0 that this rank holds, whole rows where cut.

    Example:
        >>> unit_norms(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        tensor([5., 1.])
    """
    kind = torch.promote_types(weights.dtype, torch.float32)
    dims = tuple(range(1, weights.ndim)) or None
    norms = torch.linalg.vector_norm(weights, dim=dims, dtype=kind)
    return local(whole(norms)).reshape(-1)


@final
class MaxNorm:
    """Scale down, after every update, the units whose weights have an L2 norm above ``max_norm``.

    A unit is a row of dim 0, as in ``nn.Linear`` and convolutions; GPT-2's ``Conv1D`` keeps units
    in columns, so there it caps inputs. Norms and biases are left alone unless they are named with
    ``only(..., include=...)``; a tensor of one dim is then one unit.

    Args:
        max_norm: the cap, above 0.
        name: the plugin's name in the session.

    Raises:
        TypeError: ``max_norm`` is not a number.
        ValueError: ``max_norm`` is not above 0.

    Example:
        >>> import stablekit
        >>> w = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [0.3, 0.4]]))
        >>> optimizer = stablekit.wrap(torch.optim.SGD([w], lr=0.1), MaxNorm(1.0))
        >>> w.grad = torch.zeros(2, 2)
        >>> optimizer.step()
        >>> w.data
        tensor([[0.6000, 0.8000],
                [0.3000, 0.4000]])
    """

    cost = "one read of the weights, and a write of the tensors with a unit above the cap"
    needs = ("parameters",)

    def __init__(self, max_norm: float, *, name: str | None = None) -> None:
        """Check the cap."""
        self.max_norm = number("max_norm", max_norm, above=0)
        self.name = plugin_name(name, "max-norm")

    @classmethod
    def example(cls) -> MaxNorm:
        """Return an instance that acts on weights of ordinary size."""
        return cls(0.5)

    @hookimpl
    def after_update(self, step: Step) -> None:
        """Cap the units."""
        params = step.parameters
        acted, units = {}, {}
        for i in matrices(step):
            weights = params[i].detach()
            norms = unit_norms(weights)
            factors = unit_factors(norms, self.max_norm, dtype=weights.dtype)
            acted[i] = (norms > self.max_norm).sum() / row_copies(weights)
            units[i] = max(weights.shape[0], 1) if weights.ndim > 1 else 1
            if not step.session.host:
                factors = torch.where(step.ok, factors, 1.0)
            elif bool((factors == 1).all()):
                continue
            data = local(weights)
            data.mul_(factors.view(-1, *[1] * (data.ndim - 1)) if data.ndim else factors[0])
        report(step, acted, units)
