"""The slope of a critic between real and generated samples, and the penalty on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["gradient_penalty", "interpolate", "slope_penalty", "slopes"]


def interpolate(real: Tensor, fake: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Return a random point on the line between each real sample and its fake, detached.

    Args:
        real: ``[n, ...]``.
        fake: of the same shape.
        generator: source of the ``n`` uniform numbers, on the samples' device.

    Raises:
        ValueError: The shapes differ.

    Example:
        >>> interpolate(torch.zeros(5, 2), torch.ones(5, 2)).shape
        torch.Size([5, 2])
    """
    if real.shape != fake.shape:
        raise ValueError(
            "a gradient penalty takes as many real as fake samples of the same shape, got"
            f" {list(real.shape)} and {list(fake.shape)}"
        )
    shape = (len(real),) + (1,) * (real.ndim - 1)
    alpha = torch.rand(shape, generator=generator, device=real.device).to(real.dtype)
    real, fake = real.detach(), fake.detach()
    return real + alpha * (fake - real)


def slopes(critic: Callable[[Tensor], Any], points: Tensor) -> Tensor:
    """Return the length of the critic's gradient at each point, ``[n]``, fit for backward.

    Over all dims but the first, float32, with 1e-12 under the root, without which the gradient of
    a slope of 0 is NaN. Their mean square at real samples is the penalty R1 (arXiv 1801.04406).

    Args:
        critic: what gives a number a sample; a sample's score must depend on no other sample, so
            no batch norm.
        points: ``[n, ...]``.

    Example:
        >>> slopes(lambda x: 3 * x.sum(1), torch.zeros(2, 4)).tolist()
        [6.0, 6.0]
    """
    with torch.enable_grad():
        points = points.detach().requires_grad_()
        score = critic(points).sum()
        (gradient,) = torch.autograd.grad(score, points, create_graph=True)
    rows = gradient.flatten(1)
    rows = rows if rows.dtype == torch.float64 else rows.float()
    return (rows.square().sum(1) + 1e-12).sqrt()


def slope_penalty(slope: Tensor, *, one_sided: bool = False) -> Tensor:
    """Return the mean of ``(slope - 1) ** 2``; one-sided, slopes below 1 cost nothing.

    Example:
        >>> slope_penalty(torch.tensor([0.0, 2.0]))
        tensor(1.)
        >>> slope_penalty(torch.tensor([0.0, 2.0]), one_sided=True)
        tensor(0.5000)
    """
    excess = slope - 1.0
    return (excess.clamp(min=0.0) if one_sided else excess).square().mean()


def gradient_penalty(
    critic: Callable[[Tensor], Any],
    real: Tensor,
    fake: Tensor,
    *,
    one_sided: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the gradient penalty of WGAN-GP, without its weight.

    ``mean((||grad D(x)|| - 1) ** 2)`` at ``x = real + alpha (fake - real)``, with one uniform
    ``alpha`` a sample. To be added to the critic's loss; keeps the graph for that.

    Args:
        critic: what gives a number a sample; no batch norm in it.
        real: ``[n, ...]``.
        fake: of the same shape; neither gets a gradient.
        one_sided: let slopes below 1 be.
        generator: source of ``alpha``.

    Raises:
        ValueError: The shapes differ.

    Example:
        >>> real, fake = torch.randn(8, 3), torch.randn(8, 3)
        >>> unit = torch.nn.functional.normalize(torch.ones(3), dim=0)
        >>> gradient_penalty(lambda x: x @ unit, real, fake).round(decimals=6)
        tensor(0.)
    """
    points = interpolate(real, fake, generator=generator)
    return slope_penalty(slopes(critic, points), one_sided=one_sided)
