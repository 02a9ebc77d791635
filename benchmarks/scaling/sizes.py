"""How a model is spread over ranks, and what one rank holds of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from collections.abc import Sequence

Shape = tuple[int, ...]


@final
@dataclass(frozen=True)
class Mesh:
    """How many ranks share the work in each way; the product is the number of ranks.

    ``replicate`` alone is DDP, with ``shard`` it is HSDP. Parameters are DTensors over
    ``replicate``, ``shard`` and ``tensor`` as soon as one of the last two is above 1; each stage of
    ``pipeline`` holds other parameters.

    Example:
        >>> Mesh(replicate=2, shard=40, tensor=8, pipeline=16).ranks
        10240
        >>> str(Mesh(shard=8))
        'shard 8'
    """

    replicate: int = 1
    shard: int = 1
    tensor: int = 1
    pipeline: int = 1

    @property
    def ranks(self) -> int:
        """The number of ranks."""
        return self.pipeline * self.replicate * self.shard * self.tensor

    @property
    def is_cut(self) -> bool:
        """Whether parameters are DTensors."""
        return self.shard * self.tensor > 1

    @property
    def dims(self) -> dict[str, int]:
        """The ways in use, outermost first: neighbours in the last one are on one machine."""
        sizes = {
            "pipeline": self.pipeline,
            "replicate": self.replicate,
            "shard": self.shard,
            "tensor": self.tensor,
        }
        return {name: size for name, size in sizes.items() if size > 1}

    @property
    def holding(self) -> tuple[str, ...]:
        """The ways in which a parameter is placed."""
        return tuple(name for name in self.dims if name != "pipeline")

    @property
    def copying_rank(self) -> int:
        """A rank of the first stage and shard that has copies where any has: no rank does more.

        Example:
            >>> Mesh(replicate=2, shard=4, tensor=8).copying_rank, Mesh(shard=8).copying_rank
            (39, 0)
        """
        return (self.replicate - 1) * self.shard * self.tensor + self.tensor - 1

    def __str__(self) -> str:
        """Return the ways in use."""
        return " x ".join(f"{name} {size}" for name, size in self.dims.items()) or "1 rank"


@final
@dataclass(frozen=True)
class Held:
    """What one rank holds of the gradients.

    Args:
        elements: how many elements; N of the formulas.
        tensors: how many tensors; P.
        vectors: those of them with fewer than two dims.
        units: rows of the others, those on other ranks included; U.
        rows: how many of these rows are here, in part or whole.
        largest: elements of the largest tensor here.
        itemsize: bytes of an element.
    """

    elements: int
    tensors: int
    vectors: int
    units: int
    rows: int
    largest: int
    itemsize: int = 4

    @property
    def matrices(self) -> int:
        """Tensors of two or more dims."""
        return self.tensors - self.vectors


def held(shapes: Sequence[Shape], mesh: Mesh, itemsize: int = 4) -> Held:
    """Return what the first rank holds: rows cut by ``shard``, columns by ``tensor``.

    Example:
        >>> held([(10, 6), (10,)], Mesh(shard=4, tensor=2))
        Held(elements=12, tensors=2, vectors=1, units=10, rows=3, largest=9, itemsize=4)
    """
    local = [here(shape, mesh) for shape in shapes]
    return Held(
        elements=sum(map(math.prod, local)),
        tensors=len(shapes),
        vectors=sum(len(shape) < 2 for shape in shapes),
        units=sum(shape[0] for shape in shapes if len(shape) > 1),
        rows=sum(shape[0] for shape in local if len(shape) > 1),
        largest=max(map(math.prod, local)),
        itemsize=itemsize,
    )


def here(shape: Shape, mesh: Mesh) -> Shape:
    """Return the shape of the first rank's part of a tensor."""
    rows = math.ceil(shape[0] / mesh.shard)
    if len(shape) < 2:
        return (rows,)
    return (rows, math.ceil(shape[1] / mesh.tensor), *shape[2:])
