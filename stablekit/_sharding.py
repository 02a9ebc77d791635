"""Which ranks hold which part of a tensor, and the reductions that make local numbers global."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed import ProcessGroup

_OPS = ("sum", "mean", "max", "min")


def is_dtensor(tensor: Tensor) -> bool:
    """Tell DTensors apart without importing the module that defines them, which is slow."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds."""
    if type(tensor) is Tensor or not is_dtensor(tensor):
        return tensor
    return tensor.to_local()  # type: ignore[attr-defined, no-any-return]  # a DTensor


def shard_groups(tensor: Tensor) -> tuple[ProcessGroup, ...]:
    """Return the process groups over which a tensor is cut into shards, none for a plain tensor."""
    if not is_dtensor(tensor):
        return ()
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]  # DTensor
    return tuple(mesh.get_group(dim) for dim, place in enumerate(placements) if place.is_shard())


def is_cut_inside_units(tensor: Tensor) -> bool:
    """Tell whether an output unit (a row of dim 0) is spread over several ranks."""
    if not is_dtensor(tensor):
        return False
    places = tensor.placements  # type: ignore[attr-defined]  # a DTensor
    return any(place.is_shard() and (place.dim > 0 or tensor.ndim <= 1) for place in places)


def world_size() -> int:
    """Return the number of ranks of the default process group, 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_world(groups: Sequence[ProcessGroup]) -> bool:
    """Tell whether one group is all ranks there are, so that a mean over it is the global mean."""
    return len(groups) == 1 and groups[0].size() == world_size()


def all_reduce(
    tensor: Tensor, op: str = "sum", groups: Sequence[ProcessGroup] | None = None
) -> Tensor:
    """Return the tensor reduced over the groups in turn; by default over all ranks.

    Raises:
        ValueError: The operation is not one of ``"sum"``, ``"mean"``, ``"max"``, ``"min"``.
    """
    if op not in _OPS:
        raise ValueError(f"op must be one of {', '.join(_OPS)}, got {op!r}")
    if world_size() == 1:
        return tensor
    result = tensor.clone()
    for group in groups if groups is not None else (dist.group.WORLD,):
        kind = {"sum": dist.ReduceOp.SUM, "mean": dist.ReduceOp.SUM}.get(op)
        kind = kind or {"max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}[op]
        dist.all_reduce(result, op=kind, group=group)
        if op == "mean":
            result = result / dist.get_world_size(group)
    return result


def gather_norms(
    norms: Tensor, present: Tensor, index: Tensor, groups: Sequence[ProcessGroup], ride: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Make the norms of sharded tensors global in one reduction, and let other numbers ride along.

    Args:
        norms: local norms, float32 ``[P]``.
        present: which tensors have a gradient on this rank, bool ``[P]``.
        index: positions of the sharded tensors in ``[P]``.
        groups: process groups over which they are sharded.
        ride: any float32 vector to be summed in the same reduction.

    Returns:
        Global norms, global presence (any rank), and the summed riders.
    """
    count = index.numel()
    packed = torch.cat([norms[index].square(), present[index].float(), ride])
    summed = all_reduce(packed, "sum", groups)
    squares, flags, riders = summed.split([count, count, ride.numel()])
    return (
        norms.index_copy(0, index, squares.sqrt()),
        present.index_copy(0, index, flags > 0),
        riders,
    )
