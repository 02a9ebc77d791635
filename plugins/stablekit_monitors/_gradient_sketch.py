"""The sketch of all gradients of a step, whole tensors wherever their parts are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from stablekit_monitors import _sketch

if TYPE_CHECKING:
    from stablekit import Step

__all__ = ["sketch_of"]


def sketch_of(step: Step, factors: Tensor | None = None) -> Tensor:
    """Return the sketch of the gradients as they lie in memory, float32, the same on all ranks.

    One read of the gradients, and one reduction where parameters are sharded.

    Args:
        step: the step; those parameters that the plugin may see.
        factors: multiply the tensors, ``[P]``.
    """
    gradients = step.gradients
    total = torch.zeros(_sketch.BLOCK, device=gradients.device)
    is_cut = any(hasattr(param, "placements") for param in step.parameters)
    for i, param in enumerate(step.parameters):
        if param.grad is not None or is_cut:
            name, factor = gradients.names[i], None if factors is None else factors[i]
            _add_one(total, param, name, factor, is_cut=is_cut)
    found = _sketch.fold(total)
    return step.session.reduce(found, "sum") if is_cut else found


def _add_one(
    total: Tensor, param: Tensor, name: str, factor: Tensor | None, *, is_cut: bool
) -> None:
    data, first, owners = _part(param) if is_cut else (param.grad, 0, 1)
    if data is None or not data.numel():
        return
    here = total if factor is None else torch.zeros_like(total)
    _sketch.add_(here, _flat(data.detach()), name=name, first=first, share=1 / owners)
    if factor is not None:
        total.add_(here * factor)


def _part(param: Any) -> tuple[Tensor | None, int, int]:  # noqa: ANN401 - a tensor or a DTensor
    """Return what this rank adds of a gradient: elements, place of the first, how many add them.

    A tensor cut along its first dim is added in parts; one that is cut in another way is gathered.
    All ranks must ask.
    """
    world = dist.get_world_size()
    if not hasattr(param, "placements"):
        return param.grad, 0, world
    grad = param.detach().new_zeros(param.shape) if param.grad is None else param.grad
    grad = grad.redistribute(placements=param.placements)
    cuts = [(d, place) for d, place in enumerate(param.placements) if not place.is_replicate()]
    if not cuts:
        return grad.to_local(), 0, world
    dim, place = cuts[0]
    if len(cuts) > 1 or not place.is_shard(0) or type(place).__name__ != "Shard":
        return grad.full_tensor(), 0, world
    ranks, rows = param.device_mesh.size(dim), param.shape[0]
    each = -(-rows // ranks)
    start = min(param.device_mesh.get_local_rank(dim) * each, rows)
    return grad.to_local(), start * (param.numel() // rows), world // ranks


def _flat(data: Tensor) -> Tensor:
    if data.is_sparse:
        data = data.to_dense()
    if data.is_complex():
        data = torch.view_as_real(data)
    return data.reshape(-1)
