"""Which ranks hold which part of a tensor, and the reductions that make local numbers global."""

from __future__ import annotations

import sys
from operator import attrgetter
from typing import TYPE_CHECKING, Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from stablekit.errors import PlacementError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed import ProcessGroup

_OPS = ("sum", "mean", "max", "min")
_PLAIN = (Tensor, torch.nn.Parameter)

PLACES = attrgetter("device_mesh", "placements")
"""Returns where a DTensor lies."""

LOCAL_PART = attrgetter("_local_tensor")
"""Returns what this rank holds of a DTensor, as ``to_local()`` without autograd does, faster."""


def is_dtensor(tensor: Tensor) -> bool:
    """Tell DTensors apart without importing the module that defines them, which is slow."""
    if type(tensor) in _PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def are_dtensors(tensors: Sequence[Tensor]) -> bool:
    """Tell whether all of them, and at least one, are of the class itself."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and set(map(type, tensors)) == {module.DTensor}


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds, which shares its memory.

    Example:
        >>> local(torch.ones(2))
        tensor([1., 1.])
    """
    return _mesh_tensor(tensor).to_local() if is_dtensor(tensor) else tensor


def placed_like(grad: Tensor, param: Tensor, name: str) -> Tensor:
    """Return a gradient placed as its parameter is; pending sums (Partial) are carried out.

    Raises:
        PlacementError: One of them is no DTensor, or they are on different meshes.
    """
    if not (is_dtensor(grad) and is_dtensor(param)):
        kinds = f"{type(grad).__name__}, but the parameter is a {type(param).__name__}"
        raise PlacementError(f"the gradient of {name} is a {kinds}; both must be DTensors")
    on, home = _mesh_tensor(grad), _mesh_tensor(param)
    if on.device_mesh != home.device_mesh:
        raise PlacementError(
            f"the gradient of {name} is on {on.device_mesh}, its parameter on {home.device_mesh};"
            " redistribute the gradient to the mesh of the parameter before step()"
        )
    if on.placements == home.placements:
        return grad
    placed: Tensor = on.redistribute(placements=home.placements)
    return placed


def is_cut(tensor: Tensor) -> bool:
    """Tell whether a tensor is spread over several ranks.

    Raises:
        PlacementError: It is a sum that is pending (Partial), which no parameter can be.
    """
    if not is_dtensor(tensor):
        return False
    mesh, places = _mesh_tensor(tensor).device_mesh, _mesh_tensor(tensor).placements
    if any(place.is_partial() for place in places):
        raise PlacementError(f"a parameter is placed as {places}; it must be sharded or replicated")
    return any(_cut_dim(place) is not None and mesh.size(d) > 1 for d, place in enumerate(places))


def cuts_like_first(tensors: Sequence[Tensor]) -> bool:
    """Tell whether the first tensor is cut along every mesh dim along which any other is."""
    cuts = [_cuts(tensor) for tensor in tensors]
    return all(mesh == cuts[0][0] and dims <= cuts[0][1] for mesh, dims in cuts)


def is_copy(tensor: Tensor) -> bool:
    """Tell whether what this rank holds is a copy of what a lower rank of the mesh holds."""
    where = _mesh_tensor(tensor).device_mesh.get_coordinate()
    places = _mesh_tensor(tensor).placements
    return any(place.is_replicate() and where[d] > 0 for d, place in enumerate(places))


def rows_here(tensor: Tensor) -> Tensor | None:
    """Return which rows of dim 0 this rank holds, None for all of them."""
    if tensor.ndim == 0 or not is_cut(tensor):
        return None
    from torch.distributed.tensor import Replicate, distribute_tensor

    given = _mesh_tensor(tensor)
    places = [place if _cut_dim(place) == 0 else Replicate() for place in given.placements]
    if all(place.is_replicate() for place in places):
        return None
    rows = torch.arange(tensor.shape[0], device=tensor.device)
    return local(distribute_tensor(rows, given.device_mesh, places, src_data_rank=None))


def world_size() -> int:
    """Return the number of ranks of the default process group, 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce(
    tensor: Tensor, op: str = "sum", groups: Sequence[ProcessGroup | None] = (None,)
) -> Tensor:
    """Return the tensor reduced over the groups in turn; None is all ranks.

    Raises:
        ValueError: The operation is not one of ``"sum"``, ``"mean"``, ``"max"``, ``"min"``.
    """
    if op not in _OPS:
        raise ValueError(f"op must be one of {', '.join(_OPS)}, got {op!r}")
    if world_size() == 1:
        return tensor
    return _reduced_(tensor.clone(), op, groups)


def _reduced_(result: Tensor, op: str, groups: Sequence[ProcessGroup | None]) -> Tensor:
    """Reduce a tensor that nobody else needs, in place where it can be."""
    kind = getattr(dist.ReduceOp, "SUM" if op == "mean" else op.upper())
    for group in groups:
        dist.all_reduce(result, op=kind, group=group)
        if op == "mean":
            result = result / dist.get_world_size(group)
    return result


@final
class Span:
    """Tensors that are cut over the same ranks, and the reductions over those ranks."""

    def __init__(self, params: Sequence[Tensor], positions: Sequence[int]) -> None:
        """Find the ranks; all tensors at these positions live on the same."""
        mesh = _mesh_tensor(params[positions[0]]).device_mesh
        home = params[0].device
        self.members = frozenset(positions)
        self.outside = tuple(i for i in range(len(params)) if i not in self.members)
        self.index = torch.tensor(positions, device=home)
        self.is_whole = list(positions) == list(range(len(params)))
        self.groups = _groups(mesh)
        self.ranks = frozenset(_ranks(mesh))
        self.is_world: bool = mesh.size() == world_size()
        copies = [is_copy(params[i]) for i in positions]
        self._copies = {i for i, is_one in zip(positions, copies, strict=True) if is_one}
        self._is_own = torch.tensor([not one for one in copies], device=home)

    def of(self, values: Tensor) -> Tensor:
        """Return those of this span among values of all tensors."""
        return values if self.is_whole else values[self.index]

    def put(self, values: Tensor, agreed: Tensor) -> Tensor:
        """Return values of all tensors with those of this span replaced."""
        return agreed if self.is_whole else values.index_copy(0, self.index, agreed)

    def own(self, norms: Tensor) -> Tensor:
        """Return what this rank adds for all tensors: nothing where it has a copy.

        A NaN counts anyway, so that one in any copy reaches every rank.
        """
        return torch.where(norms.isnan() | self._is_own, norms, 0.0) if self._copies else norms

    def own_units(self, norms: Sequence[Tensor], positions: Sequence[int]) -> list[Tensor]:
        """Return what this rank adds for the units of each tensor, of copies as :meth:`own`."""
        added = list(norms)
        copied = [k for k, i in enumerate(positions) if i in self._copies]
        if copied:
            whole = torch.cat([added[k] for k in copied])
            kept = torch.where(whole.isnan(), whole, 0.0).split([len(added[k]) for k in copied])
            for k, part in zip(copied, kept, strict=True):
                added[k] = part
        return added

    def join(self, norms: list[Tensor], *riders: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return norms over all ranks, and the sums of what rides along, in one reduction."""
        squares = (norms[0] if len(norms) == 1 else torch.cat(norms)).square()
        parts = [squares, *riders]
        summed = _reduced_(torch.cat(parts), "sum", self.groups)
        total, *ridden = summed.split([part.numel() for part in parts])
        whole = total.sqrt()
        return [*(whole.split([norm.numel() for norm in norms]) if norms[1:] else [whole])], ridden

    def largest(self, values: Tensor) -> Tensor:
        """Return the largest value on any rank, NaN where one is NaN, in one reduction."""
        # gloo and NCCL do not agree on the maximum of a number and NaN.
        marked = torch.cat([values.nan_to_num(0.0, posinf=torch.inf), values.isnan().float()])
        most, is_nan = _reduced_(marked, "max", self.groups).chunk(2)
        return torch.where(is_nan > 0, torch.nan, most)


def spans_of(params: Sequence[Tensor]) -> list[Span]:
    """Sort the parameters that are cut by the ranks they are cut over.

    Copies on the same ranks come along: they cost nothing and are then the same bits everywhere.
    """
    by_ranks: dict[tuple[int, ...], list[int]] = {}
    for i, param in enumerate(params):
        if is_dtensor(param) and _mesh_tensor(param).device_mesh.get_coordinate() is not None:
            by_ranks.setdefault(_ranks(_mesh_tensor(param).device_mesh), []).append(i)
    spans = [
        Span(params, positions)
        for positions in by_ranks.values()
        if any([is_cut(params[i]) for i in positions])
    ]
    # All ranks last: what some of them have agreed on by then is agreed on by all.
    return sorted(spans, key=lambda span: len(span.ranks))


def _ranks(mesh: Any) -> tuple[int, ...]:  # noqa: ANN401 - a DeviceMesh
    return tuple(sorted(mesh.mesh.flatten().tolist()))


def _groups(mesh: Any) -> tuple[ProcessGroup | None, ...]:  # noqa: ANN401 - a DeviceMesh
    """Return groups to reduce over in turn so that all ranks of a mesh count once; None is all."""
    dims = [dim for dim in range(mesh.ndim) if mesh.size(dim) > 1]
    if len(dims) > 1 and mesh.size() == world_size():
        return (None,)
    return tuple(mesh.get_group(dim) for dim in dims)


def _cuts(tensor: Tensor) -> tuple[Any, frozenset[int]]:
    """Return the mesh of a tensor, None without one, and along which of its dims it is cut."""
    if not is_dtensor(tensor):
        return None, frozenset()
    mesh, places = _mesh_tensor(tensor).device_mesh, _mesh_tensor(tensor).placements
    return mesh, frozenset(d for d, place in enumerate(places) if not place.is_replicate())


def _cut_dim(place: Any) -> int | None:  # noqa: ANN401 - a Placement
    """Return the tensor dim a placement cuts, None if it cuts none.

    ``is_shard()`` will not do: it is false for what FSDP2 gives a tensor that tensor parallelism
    cut before.
    """
    return getattr(place, "dim", None)


def _mesh_tensor(tensor: Tensor) -> Any:  # noqa: ANN401 - a DTensor, whose module is not imported
    return tensor
