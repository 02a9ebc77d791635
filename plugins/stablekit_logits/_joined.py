"""A term that joins a loss in the backward pass, at one of the tensors the loss is made of."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

__all__ = ["joined"]


def joined(
    output: Tensor,
    term: Tensor,
    rows: int,
    loss_factor: float | None,
    is_other: Tensor | None,
) -> Tensor:
    """Return ``output``, whose gradient also makes that of a term flow, as if added to the loss.

    Args:
        output: what the loss is a mean of, with a plus or a minus.
        term: 0-dim.
        rows: how many rows of the output that mean is over; the next as many are in another one.
        loss_factor: what the loss is multiplied by; None takes the sum of the gradient of the first
            rows, without its sign.
        is_other: 0-dim bool, set where ``loss_factor`` is None and the gradient is zero or not the
            same in all of these rows, or not as large in the next, so that the loss is no mean of
            them, or of one less the other.

    Example:
        >>> output, term = torch.ones(4, requires_grad=True), torch.ones((), requires_grad=True)
        >>> loss = -joined(output, 7 * term, 4, None, None).mean() / 2
        >>> loss.backward()
        >>> output.grad, term.grad
        (tensor([-0.1250, -0.1250, -0.1250, -0.1250]), tensor(3.5000))
    """
    result: Tensor = _Joined.apply(output, term, rows, loss_factor, is_other)  # type: ignore[no-untyped-call]  # torch's
    return result


@final
class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's
        output: Tensor,
        term: Tensor,
        rows: int,
        loss_factor: float | None,
        is_other: Tensor | None,
    ) -> Tensor:
        """Pass the output on."""
        ctx.rows, ctx.loss_factor, ctx.is_other, ctx.kind = rows, loss_factor, is_other, term.dtype
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - torch's
        """Give the term the factor of the loss."""
        (grad,) = grads
        if ctx.loss_factor is not None:
            factor = torch.full((), ctx.loss_factor, dtype=ctx.kind, device=grad.device)
            return grad, factor, None, None, None
        parts = grad.split(ctx.rows)
        sums = [part.sum(dtype=ctx.kind).abs() for part in parts]
        if ctx.is_other is not None:
            for part, total in zip(parts, sums, strict=True):
                ctx.is_other.logical_or_(part.amax() != part.amin())
                ctx.is_other.logical_or_((total != sums[0]) | (total == 0))
        return grad, sums[0], None, None, None
