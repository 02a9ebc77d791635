"""How far a prediction is from its label, and which tokens are therefore left out."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["error_norms", "judged", "largest_count", "truncation_mask"]

_AT_ONCE = 1 << 24


def error_norms(logits: Tensor, labels: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Return the L2 distance of every predicted distribution from its one-hot label.

    ``||softmax(z) - onehot(y)||``, from 0 to sqrt(2), by
    ``exp(lse(2z) - 2 lse(z)) - 2 exp(z_y - lse(z)) + 1`` under the root: neither the softmax nor
    the one-hot is made.

    Args:
        logits: ``[..., classes]``; taken in parts, half precision in float32.
        labels: ``[...]``, integers.
        ignore_index: the label of what is no token; its distance is given as 0.

    Returns:
        ``[...]``, detached.

    Example:
        >>> error_norms(torch.tensor([[0.0, 0.0], [9.0, -9.0]]), torch.tensor([0, 1]))
        tensor([0.7071, 1.4142])
    """
    return judged(logits, labels, ignore_index=ignore_index)[0]


@torch.no_grad()
def judged(logits: Tensor, labels: Tensor, *, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """Return :func:`error_norms` and the cross-entropy of every token, both 0 where ignored.

    Example:
        >>> judged(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        (tensor([0.7071]), tensor([0.6931]))
    """
    rows, flat = logits.detach().flatten(0, -2), labels.flatten().to(logits.device)
    size = max(1, _AT_ONCE // rows.shape[-1])
    pairs = zip(rows.split(size), flat.split(size), strict=True)
    parts = [_judged(part, label, ignore_index) for part, label in pairs]
    norms, losses = (torch.cat(column).view(labels.shape) for column in zip(*parts, strict=True))
    return norms, losses


def _judged(rows: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    z = rows if rows.dtype == torch.float64 else rows.float()
    valid = labels != ignore_index
    total = z.logsumexp(-1)
    loss = total - z.gather(-1, labels.where(valid, 0).unsqueeze(-1)).squeeze(-1)
    spread = (z + z).logsumexp(-1) - (total + total)
    squared = (spread.exp() - 2.0 * (-loss).exp() + 1.0).clamp(min=0.0)
    return torch.where(valid, squared.sqrt(), 0.0), torch.where(valid, loss, 0.0)


@torch.no_grad()
def truncation_mask(
    norms: Tensor,
    *,
    threshold: float | None = None,
    fraction: float | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Tell which tokens are left out: those above a threshold, or the share farthest off.

    With ``fraction`` the threshold is the element ``int(fraction * n)`` of the norms in falling
    order; what is above it goes, so at most ``int(fraction * n)`` tokens do, and ties stay.

    Args:
        norms: error norms, of any shape.
        threshold: leave out tokens with a norm above it.
        fraction: leave out this share; exactly one of the two is given.
        valid: bool, which tokens count; None is all of them, as in the authors' fairseq code.

    Returns:
        Bool, shaped like ``norms``, true where a token is left out; false where it is not valid.

    Raises:
        ValueError: Both or none of threshold and fraction are given.

    Example:
        >>> truncation_mask(torch.tensor([0.2, 1.4, 1.1]), threshold=1.2).tolist()
        [False, True, False]
        >>> truncation_mask(torch.tensor([0.2, 1.4, 1.1]), fraction=0.34).tolist()
        [False, True, False]
    """
    if (threshold is None) == (fraction is None):
        raise ValueError(
            f"exactly one of threshold and fraction must be given, got threshold={threshold!r} and"
            f" fraction={fraction!r}"
        )
    counted = torch.ones_like(norms, dtype=torch.bool) if valid is None else valid
    if threshold is not None:
        return counted & (norms > threshold)
    if not norms.numel():
        return counted
    falling = norms.where(counted, -torch.inf).flatten().sort(descending=True).values
    place = largest_count(counted.sum(), fraction or 0.0).clamp(max=falling.numel() - 1)
    return counted & (norms > falling.gather(0, place.view(1)))


def largest_count(count: Tensor, fraction: float) -> Tensor:
    """Return how many of so many tokens a fraction leaves out at most, rounded down.

    Example:
        >>> largest_count(torch.tensor(8), 0.1), largest_count(torch.tensor(10), 0.1)
        (tensor(0), tensor(1))
    """
    return (count * fraction).long()
