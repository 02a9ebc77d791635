"""Clipping the gradient of every output unit against the norm of the unit's own weights.

Brock, De, Smith, Simonyan: High-Performance Large-Scale Image Recognition Without Normalization
(arXiv 2102.06171).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from stablekit import hookimpl
from stablekit.arguments import number, plugin_name
from stablekit_clipping._report import report_factors

if TYPE_CHECKING:
    from stablekit import Step

__all__ = ["AGC", "agc_factors"]


def agc_factors(
    gradient_norms: Tensor, weight_norms: Tensor, *, clipping: float, eps: float
) -> Tensor:
    """Return the factor of every unit: ``min(1, clipping * max(||w||, eps) / max(||g||, 1e-6))``.

    Args:
        gradient_norms: norms of the units' gradients, ``[units]``.
        weight_norms: norms of the units' weights, ``[units]``.
        clipping: largest allowed ratio.
        eps: smallest weight norm that counts, so that zero-initialised units can start.

    Example:
        >>> gradients, weights = torch.tensor([1.0, 0.001]), torch.tensor([2.0, 0.0])
        >>> agc_factors(gradients, weights, clipping=0.1, eps=0.01)
        tensor([0.2000, 1.0000])
    """
    limits = clipping * weight_norms.clamp(min=eps)
    factors = (limits / gradient_norms.clamp(min=1e-6)).clamp(max=1.0)
    return torch.where(gradient_norms > limits, factors, 1.0)


@final
class AGC:
    """Scale the gradient of each output unit so that it stays small against its weights.

    A unit is a row of dim 0 of a matrix or convolution kernel, and the whole of a tensor with fewer
    dims; so timm and the authors' code have it. (GPT-2's ``Conv1D`` keeps its weights transposed:
    there a row is an input.) The authors leave the final linear layer alone:
    ``only("agc", exclude="head.*")``.

    Stateless. A NaN unit stays as it is, an infinite one is scaled by 0, others are unaffected.

    Args:
        clipping: largest ratio of gradient norm to weight norm, above 0; 0.01 in the paper, up to
            0.16 for small batches.
        eps: smallest weight norm that counts.
        name: the plugin's name in the session.

    Raises:
        TypeError: An argument is not a number.
        ValueError: An argument is out of range.

    Example:
        >>> import torch, stablekit
        >>> p = torch.nn.Parameter(torch.ones(1, 4))
        >>> optimizer = stablekit.wrap(torch.optim.SGD([p], lr=1.0), AGC(0.1))
        >>> p.grad = torch.ones(1, 4)
        >>> optimizer.step()
        >>> p.data
        tensor([[0.9000, 0.9000, 0.9000, 0.9000]])
    """

    needs = ("unit_norms", "weight_unit_norms")
    cost = "one read of the gradients and one of the weights; one write of the tensors clipped"

    def __init__(
        self, clipping: float = 0.01, *, eps: float = 1e-3, name: str | None = None
    ) -> None:
        """Check the arguments."""
        self.clipping = number("clipping", clipping, above=0)
        self.eps = number("eps", eps, above=0)
        self.name = plugin_name(name, "agc")

    @hookimpl
    def transform_gradients(self, step: Step) -> None:
        """Scale the units whose gradient is too large."""
        gradients = step.gradients
        units = gradients.unit_norms()
        if not units:
            return
        joined = torch.cat(units)
        weights = torch.cat(gradients.weight_unit_norms())
        factors = agc_factors(joined, weights, clipping=self.clipping, eps=self.eps)
        gradients.scale_units_(factors.split([unit.numel() for unit in units]))
        report_factors(step, factors)
