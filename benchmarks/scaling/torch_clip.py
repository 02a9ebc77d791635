"""The cost of what everyone does now, ``torch.nn.utils.clip_grad_norm_``, in the same terms."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.scaling.cost import FLOAT, Cost, Reduction

if TYPE_CHECKING:
    from benchmarks.scaling.sizes import Held, Mesh

_KERNELS = 8
"""Norms, their stack, its norm, four for the factor, the multiplication."""
_KERNELS_A_REDUCTION = 2


def torch_cost(held: Held, mesh: Mesh, *, by_hand: bool = True) -> Cost:
    """Return what one call costs: it reads the gradients, and always multiplies them.

    Per-tensor norms are reduced once for every way that cuts tensors, one after the other.

    Args:
        held: what the rank holds.
        mesh: how the model is spread.
        by_hand: with stages, count the reduction that the training loop adds to make it global.
    """
    cutting = [way for way in mesh.holding if way != "replicate"] if mesh.is_cut else []
    reductions = [Reduction((way,), FLOAT * held.tensors) for way in cutting]
    if by_hand and mesh.pipeline > 1:
        reductions.append(Reduction(("pipeline",), FLOAT))
    kernels = _KERNELS + _KERNELS_A_REDUCTION * len(cutting)
    return Cost(
        reductions=tuple(reductions),
        passes=3,
        bytes=3 * held.elements * held.itemsize,
        kernels=kernels,
        kernels_once=kernels,
        batched=2,
        temporary=2 * FLOAT * held.tensors,
    )
