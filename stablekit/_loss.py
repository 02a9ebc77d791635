"""The loss of a step: a mean over what was observed, made global over data-parallel ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stablekit._sharding import all_reduce, is_world, world_size

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
    """Return the loss as a vector that can ride in the reduction of the norms, if it may."""
    if not losses or len(layout.shards) != 1 or not is_world(layout.shards[0][0]):
        return None
    return mean(losses).to(layout.device).view(1)


def reduced(losses: list[Tensor]) -> Tensor | None:
    """Return the mean loss over all ranks; one collective where there are several."""
    return all_reduce(mean(losses), "mean") if losses else None
