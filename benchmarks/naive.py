"""What stablekit is compared with and nobody publishes as a package: written from descriptions."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

# Up to this size torch's norm is accurate; longer tensors are read by rows.
_SHORT = 1 << 16


def accurate_norm(grads: Sequence[Tensor]) -> Tensor:
    """Return the global norm, accurate to 1e-6: the floor, what any clipper has to spend."""
    short = [grad for grad in grads if grad.numel() <= _SHORT]
    norms = list(torch._foreach_norm(short))
    for grad in grads:
        if grad.numel() > _SHORT:
            norms.append(torch.linalg.vector_norm(torch.linalg.vector_norm(grad, dim=-1)))
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


def unit_wise_norm(tensor: Tensor) -> Tensor:
    """Return norms over all dims but the first, kept as dims of size 1."""
    norm: Callable[..., Tensor] = tensor.norm
    if tensor.ndim <= 1:
        return norm(2.0)
    return norm(2.0, dim=tuple(range(1, tensor.ndim)), keepdim=True)


@torch.no_grad()
def unit_wise_clip_(
    params: Iterable[Parameter], clipping: float = 0.01, *, eps: float = 1e-3
) -> None:
    """Clip units as timm does: two temporaries of full size and a copy back for every tensor."""
    for param in params:
        if param.grad is None:
            continue
        limits = unit_wise_norm(param.detach()).clamp_(min=eps).mul_(clipping)
        norms = unit_wise_norm(param.grad)
        clipped = param.grad * (limits / norms.clamp(min=1e-6))
        param.grad.copy_(torch.where(norms < limits, param.grad, clipped))


@final
class ListAutoClip:
    """AutoClip as its authors publish it: numpy's percentile over a list of all norms."""

    def __init__(self, params: list[Parameter], percentile: float = 10.0) -> None:
        """Start with an empty history."""
        self.params = params
        self.percentile = percentile
        self.history: list[float] = []

    @torch.no_grad()
    def step(self) -> None:
        """Take the norm into the history and clip at its percentile."""
        squares = sum(p.grad.norm(2).item() ** 2 for p in self.params if p.grad is not None)
        self.history.append(squares**0.5)
        limit = float(np.percentile(self.history, self.percentile))
        torch.nn.utils.clip_grad_norm_(self.params, limit)
