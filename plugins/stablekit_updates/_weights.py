"""Which parameters a projection of weights acts on, and how exactly it can meet a limit."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stablekit.gradients import local

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from stablekit import Step


def matrices(step: Step) -> list[int]:
    """Return positions of parameters of two or more dims, or of all if they were named."""
    return [i for i, p in enumerate(step.parameters) if step.named or p.ndim > 1]


def held(step: Step, positions: Iterable[int]) -> Iterator[tuple[int, Tensor]]:
    """Yield the positions and what this rank holds of parameters that are not empty here."""
    for i in positions:
        data = local(step.parameters[i].detach())
        if data.numel():
            yield i, data


def within(limit: float, dtype: torch.dtype) -> float:
    """Return what to scale a norm to so that it is at most ``limit`` after rounding to ``dtype``.

    A projection that lands on the limit itself would find it exceeded again by a rounding error.

    Example:
        >>> 0.99 < within(1.0, torch.bfloat16) < within(1.0, torch.float32) < 1.0
        True
    """
    return limit * (1 - torch.finfo(dtype).eps * (0.5 if dtype.itemsize < 4 else 8))


def whole(tensor: Tensor) -> Tensor:
    """Carry out the sums that are pending in a DTensor; anything else comes back as it is."""
    places = getattr(tensor, "placements", ())
    if not any(place.is_partial() for place in places):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(tensor, DTensor)
    settled = [Replicate() if place.is_partial() else place for place in places]
    return tensor.redistribute(placements=settled)


def full(tensor: Tensor) -> Tensor:
    """Return all of a tensor, gathering the parts of a DTensor."""
    gather: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def row_copies(tensor: Tensor) -> int:
    """Return how many ranks hold parts of the same rows, where a DTensor is cut across rows."""
    places = getattr(tensor, "placements", ())
    cut = [d for d, place in enumerate(places) if getattr(place, "dim", 0) != 0]
    mesh = getattr(tensor, "device_mesh", None)
    return math.prod(mesh.size(d) for d in cut) if mesh is not None else 1


def report(step: Step, acted: Mapping[int, Tensor], units: Mapping[int, int] | None = None) -> None:
    """Record the share of tensors on which a projection acted, the same on every rank.

    Args:
        step: the step.
        acted: by position, 0-dim: whether it did, or on how many of this rank's units.
        units: by position, how many units the whole tensor has; then the mean share of units.
    """
    if not acted:
        step.record("clipped", 0.0)
        return
    home = step.gradients.device
    found = torch.stack([one.to(home) for one in acted.values()]).float().sqrt()
    roots: list[Tensor | None] = [None] * len(step.parameters)
    for i, root in zip(acted, found.split(1), strict=True):
        roots[i] = root
    known = torch.tensor(sorted(acted), device=home)
    counts = step.norms_of(roots).square()[known]
    shares = counts > 0 if units is None else counts / counts.new_tensor([units[i] for i in acted])
    step.record("clipped", shares.float().clamp(max=1.0).mean())
