"""Lowering the few elements of a gradient that stand out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from stablekit import Step

_CHUNK = 2**17


def lower_peaks_(step: Step, peaks: Tensor, limits: Tensor) -> Tensor:
    """Multiply elements above their tensor's limit by ``limit / peak``, in place.

    Only tensors whose peak is above the limit are touched; in device mode all are.

    Args:
        step: whose gradients.
        peaks: largest absolute elements, ``[P]``.
        limits: one a tensor, ``[P]``; infinite to leave it alone.

    Returns:
        bool ``[P]``, which tensors were to be lowered.
    """
    gradients = step.gradients
    above = (peaks > limits) & peaks.isfinite()
    ratios = torch.where(above, limits / peaks, 1.0)
    if step.session.host:
        acting = {
            name: (limit, ratio)
            for name, acts, limit, ratio in zip(
                gradients.names, above.tolist(), limits.tolist(), ratios.tolist(), strict=True
            )
            if acts
        }
        if acting:
            edit = gradients.edit()
            edit.touched(acting)
            for name, gradient in edit:
                if name in acting:
                    scale_above_(gradient, *acting[name])
        return above
    places = dict(
        zip(gradients.names, zip(limits.unbind(), ratios.unbind(), strict=True), strict=True)
    )
    for name, gradient in gradients.edit():
        limit, ratio = places[name]
        gradient.mul_(torch.where(gradient.abs() > limit, ratio, 1.0))
    return above


def scale_above_(gradient: Tensor, limit: float, ratio: float) -> None:
    """Multiply the elements whose absolute value is above a limit, in place.

    Reads in pieces that stay in the cache, and writes only to pieces that have such elements.

    Example:
        >>> g = torch.tensor([1.0, -4.0, 3.0])
        >>> scale_above_(g, 2.0, 0.5)
        >>> g
        tensor([ 1.0000, -2.0000,  1.5000])
    """
    if gradient.is_complex():
        gradient.mul_(torch.where(gradient.abs() > limit, ratio, 1.0))
        return
    if gradient.numel() <= _CHUNK or not gradient.is_contiguous():
        _scale_above_(gradient, limit, ratio)
        return
    for piece in gradient.view(-1).split(_CHUNK):
        low, high = piece.aminmax()
        if high > limit or low < -limit:
            _scale_above_(piece, limit, ratio)


def _scale_above_(piece: Tensor, limit: float, ratio: float) -> None:
    """Take out what stands out, and put it back smaller; a mask would take five times as long."""
    out = torch.nn.functional.hardshrink(piece, limit)
    piece.sub_(out).add_(out, alpha=ratio)
