"""Clamping every weight to a fixed range, as the critic of a Wasserstein GAN needs it.

Arjovsky et al.: Wasserstein GAN (arXiv 1701.07875).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from stablekit import hookimpl
from stablekit.arguments import number, plugin_name
from stablekit_updates._weights import held, matrices, report

if TYPE_CHECKING:
    from stablekit import Step

__all__ = ["WeightClip", "clamp_weights_"]


def clamp_weights_(weights: Tensor, limit: Tensor | float) -> Tensor:
    """Clamp weights to ``[-limit, limit]`` in place and return whether any was outside, 0-dim bool.

    Example:
        >>> w = torch.tensor([0.5, -2.0])
        >>> clamp_weights_(w, 1.0), w
        (tensor(True), tensor([ 0.5000, -1.0000]))
    """
    low, high = weights.aminmax()
    outside = (high > limit) | (low < -limit)
    if isinstance(limit, Tensor):
        bound = limit.to(weights.device, weights.dtype)
        torch.clamp(weights, -bound, bound, out=weights)
    elif bool(outside):
        weights.clamp_(-limit, limit)
    return outside


@final
class WeightClip:
    """Clamp weights to ``[-limit, limit]`` after every update.

    The paper and Gulrajani et al.'s code clamp after the update, as here; the authors' code clamps
    before it, so that the generator sees a critic that is not clamped. Norms and biases are left
    alone unless they are named: ``only(WeightClip(), include="*")`` is the paper's, where every
    parameter of the critic is clamped.

    Args:
        limit: the bound on absolute values, above 0.
        name: the plugin's name in the session.

    Raises:
        TypeError: ``limit`` is not a number.
        ValueError: ``limit`` is not above 0.

    Example:
        >>> import stablekit
        >>> w = torch.nn.Parameter(torch.ones(1, 2))
        >>> optimizer = stablekit.wrap(torch.optim.SGD([w], lr=0.1), WeightClip(0.5))
        >>> w.grad = torch.tensor([[1.0, 9.0]])
        >>> optimizer.step()
        >>> w.data
        tensor([[0.5000, 0.1000]])
    """

    cost = "one read of the weights, and a write of the tensors with a weight outside"
    needs = ("parameters",)

    def __init__(self, limit: float = 0.01, *, name: str | None = None) -> None:
        """Check the limit."""
        self.limit = number("limit", limit, above=0)
        self.name = plugin_name(name, "weight-clip")

    @hookimpl
    def after_update(self, step: Step) -> None:
        """Clamp the weights."""
        limit: Tensor | float = self.limit
        if not step.session.host:
            limit = torch.where(step.ok, self.limit, torch.inf)
        positions = matrices(step)
        acted = {i: step.ok & False for i in positions}
        acted |= {i: clamp_weights_(data, limit) for i, data in held(step, positions)}
        report(step, acted)
