"""Logits of bounded norm: the rescaling of rows, and the lowest loss that it leaves in reach."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stablekit.arguments import choice, number

__all__ = ["FORMS", "clip_logits", "lowest_loss", "norm_type", "row_norms"]

FORMS = ("paper", "repository")
_HALVES = (torch.float16, torch.bfloat16)


def clip_logits(logits: Tensor, tau: float = 1.0, *, p: float = 2.0, form: str = "paper") -> Tensor:
    """Return logits whose rows have a norm of at most ``tau``; the others are as they were.

    ``z * min(1, tau / ||z||)``. A class that is masked, at ``-inf`` or the lowest number of the
    type, is left out of the norm and stays as it is. The form "repository" is what the authors'
    code computes: rows with a norm above ``tau`` get the norm ``1 / tau``, so their norm jumps
    there unless ``tau`` is 1.

    Args:
        logits: ``[..., classes]``; norms of half precision are taken in float32.
        tau: the largest norm, above 0.
        p: which norm, at least 1; may be infinite.
        form: "paper" or "repository".

    Returns:
        A tensor of the same shape and type.

    Example:
        >>> clip_logits(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), 1.0)
        tensor([[0.6000, 0.8000],
                [0.3000, 0.4000]])
    """
    wide = logits.float() if logits.dtype in _HALVES else logits
    norms = row_norms(wide, p)
    if form == "repository":
        norms = norms + 1e-7
    largest = 1.0 / tau if form == "repository" else tau
    # clamp: what is not chosen must not divide by 0 either. tau / tau is not always 1 in torch.
    factors = torch.where(norms > tau, largest / norms.clamp(min=tau), 1.0)
    masked = _masked(logits)
    return torch.where(masked, wide, wide.masked_fill(masked, 0.0) * factors).to(logits.dtype)


def row_norms(logits: Tensor, p: float) -> Tensor:
    """Return the norm of every row, ``[..., 1]``, that of half precision in float32.

    Masked classes are left out.

    Example:
        >>> row_norms(torch.tensor([[3.0, 4.0]]), 2.0)
        tensor([[5.]])
    """
    kind = torch.float32 if logits.dtype in _HALVES else logits.dtype
    found = logits.to(kind).masked_fill(_masked(logits), 0.0)
    unit: Tensor | float = 1.0
    if 2 < p < math.inf:  # powers of large logits overflow
        unit = found.detach().abs().amax(-1, keepdim=True).clamp(min=torch.finfo(kind).tiny)
    norms: Tensor = torch.linalg.vector_norm(found / unit, p, dim=-1, keepdim=True)
    return norms * unit


def _masked(logits: Tensor) -> Tensor:
    return logits <= torch.finfo(logits.dtype).min / 2


def lowest_loss(tau: float, classes: int, *, p: float = 2.0, form: str = "paper") -> float:
    """Return the lowest cross-entropy that clipped logits can reach, in nats.

    ``log(1 + (K - 1) exp(-tau * sqrt(K / (K - 1))))`` for ``p`` of 2: a row of norm ``tau`` that
    points at its label and away from all other classes alike. For another ``p`` the margin is
    ``tau`` times the dual norm of that direction.

    Example:
        >>> round(lowest_loss(1.5, 50257), 2), round(math.log(50257), 2)
        (9.32, 10.82)
    """
    if classes < 2:
        return 0.0
    others = classes - 1
    if p == 1:
        length = 1.0
    else:
        dual = 1.0 if math.isinf(p) else p / (p - 1.0)
        length = math.exp(math.log1p(others ** (1.0 - dual)) / dual)
    reach = max(tau, 1.0 / tau) if form == "repository" else tau
    return math.log1p(others * math.exp(-reach * length))


def norm_type(value: float) -> float:
    """Return ``p``, a number of at least 1 or infinity.

    Raises:
        TypeError: It is not a number.
        ValueError: It is below 1 or NaN.

    Example:
        >>> norm_type(2)
        2.0
    """
    return math.inf if value == math.inf else number("p", value, at_least=1)


def checked(tau: float, p: float, form: str) -> tuple[float, float, str]:
    """Return the three arguments, checked."""
    return number("tau", tau, above=0), norm_type(p), choice("form", form, FORMS)
