"""Clipping by a fixed global norm, as ``torch.nn.utils.clip_grad_norm_`` does it.

Pascanu, Mikolov, Bengio: On the difficulty of training recurrent neural networks (arXiv 1211.5063).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from stablekit import hookimpl
from stablekit.arguments import number, one_of, plugin_name
from stablekit.gradients import clip_factor
from stablekit_clipping._report import report_factor

if TYPE_CHECKING:
    from stablekit import Step

__all__ = ["GlobalNorm", "total_norm"]


def total_norm(norms: Tensor, norm_type: float) -> Tensor:
    """Return the p-norm of per-tensor p-norms, 0-dim; ``inf`` takes the largest.

    Example:
        >>> total_norm(torch.tensor([3.0, 4.0]), 2.0)
        tensor(5.)
    """
    total: Tensor = torch.linalg.vector_norm(norms, norm_type)
    return total


@final
class GlobalNorm:
    """Scale all gradients so that their global norm is at most ``max_norm``.

    ``c = min(1, max_norm / (n + 1e-6))``, with n the norm of all gradients together.

    Where it differs from torch: below the threshold nothing is written; a NaN norm leaves the
    gradients as they are (torch makes all of them NaN); norms are accurate to 1e-6 at any size.

    Args:
        max_norm: the threshold, above 0.
        norm_type: 2 or infinity; the infinity norm is the largest absolute element, which costs a
            second read of the gradients.
        name: the plugin's name in the session.

    Raises:
        TypeError: An argument is not a number.
        ValueError: ``max_norm`` is not above 0, or ``norm_type`` is neither 2 nor infinity.

    Example:
        >>> import torch, stablekit
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = stablekit.wrap(torch.optim.SGD([p], lr=1.0), GlobalNorm(1.0))
        >>> p.grad = torch.tensor([3.0, 4.0])
        >>> optimizer.step()
        >>> p.data
        tensor([-0.6000, -0.8000])
    """

    cost = "one read of the gradients; one write in steps that clip"

    def __init__(
        self, max_norm: float = 1.0, *, norm_type: float = 2.0, name: str | None = None
    ) -> None:
        """Check the arguments."""
        self.max_norm = number("max_norm", max_norm, above=0)
        self.norm_type = one_of("norm_type", norm_type, (2.0, math.inf))
        self.needs: tuple[str, ...] = ("amaxes",) if self.norm_type == math.inf else ()
        self.name = plugin_name(name, "global-norm")

    @hookimpl
    def transform_gradients(self, step: Step) -> None:
        """Scale everything by one factor."""
        gradients = step.gradients
        if self.norm_type == 2.0:
            norm = gradients.norm()
        else:
            norm = total_norm(gradients.amaxes(), self.norm_type)
        # As a tensor on the host too: float32 arithmetic gives the bits of torch's own function.
        factor = clip_factor(norm, self.max_norm)
        gradients.scale_(factor)
        step.record("threshold", self.max_norm)
        report_factor(step, factor)
