"""The loss of a step: a mean over what was observed, made global over data-parallel ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stablekit._sharding import all_reduce, world_size

if TYPE_CHECKING:
    from stablekit._layout import Layout


def mean(losses: list[Tensor]) -> Tensor:
    """Return the mean of scalar losses, float32, where the first of them lives."""
    if len(losses) == 1:
        return losses[0].float()
    return torch.stack([loss.float().to(losses[0].device) for loss in losses]).mean()


def is_shared() -> bool:
    """Tell whether other ranks have losses of their own."""
    return world_size() > 1


def riders(losses: list[Tensor], layout: Layout) -> Tensor | None:
    """Return loss and 1, or 0 and 0, to ride in a reduction of norms over all ranks, if any.

    A rank without a loss takes part too: the others would wait for it.
    """
    if layout.world_span is None:
        return None
    if not losses:
        return torch.zeros(2, device=layout.device)
    loss = mean(losses).to(layout.device)
    return torch.stack([loss, torch.ones_like(loss)])


def reduced(losses: list[Tensor]) -> Tensor | None:
    """Return the mean loss over all ranks; one collective where there are several."""
    return all_reduce(mean(losses), "mean") if losses else None
