"""The loss of a step: a mean over what was observed, made global over data-parallel ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from stablekit._sharding import all_reduce, world_size


def mean(losses: list[Tensor]) -> Tensor:
    """Return the mean of scalar losses, float32, where the first of them lives."""
    if len(losses) == 1:
        return losses[0].float()
    return torch.stack([loss.float().to(losses[0].device) for loss in losses]).mean()


def is_shared() -> bool:
    """Tell whether other ranks have losses of their own."""
    return world_size() > 1


def rider(losses: list[Tensor], home: torch.device) -> Tensor:
    """Return loss and 1, or 0 and 0, to be summed over all ranks.

    A rank without a loss takes part too: the others would wait for it.
    """
    if not losses:
        return torch.zeros(2, device=home)
    loss = mean(losses).to(home)
    return torch.stack([loss, torch.ones_like(loss)])


def shared(summed: Tensor, *, host: bool) -> Tensor | None:
    """Return the mean of the ranks that have a loss, from the sum of riders.

    Where none has, None; on a device, which cannot tell, NaN.
    """
    if host and not any(summed.tolist()[1:]):
        return None
    loss, count = summed.unbind()
    return loss / count


def reduced(losses: list[Tensor], home: torch.device, *, host: bool) -> Tensor | None:
    """Return the mean loss over all ranks; one collective where there are several."""
    if not is_shared():
        return mean(losses) if losses else None
    return shared(all_reduce(rider(losses, home)), host=host)
