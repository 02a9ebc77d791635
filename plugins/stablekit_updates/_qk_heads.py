"""Multiplying the parts of weights that make one head each, wherever the optimizer holds them."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from stablekit.errors import AttachError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed.device_mesh import DeviceMesh

    from stablekit import Step
    from stablekit_updates._qk_gains import ClippedLayer, Gain

__all__ = ["Held", "group_factors", "scale_heads_"]


def group_factors(factors: Tensor, groups: int) -> Tensor:
    """Return the smallest factor of each set of heads that shares a key head.

    Args:
        factors: ``[heads]``.
        groups: how many sets; neighbours are in one.

    Example:
        >>> group_factors(torch.tensor([0.5, 1.0, 1.0, 0.8]), 2)
        tensor([0.5000, 0.8000])
    """
    smallest: Tensor = factors.unflatten(-1, (groups, -1)).amin(-1)
    return smallest


@torch.no_grad()
def scale_heads_(
    weight: Tensor,
    factors: Tensor,
    *,
    dim: int = 0,
    start: int = 0,
    width: int | None = None,
    is_offset: bool = False,
) -> None:
    """Multiply parts of equal length along one dim by a factor each, in place.

    Args:
        weight: any shape; a DTensor whichever way it is cut.
        factors: one for each part.
        dim: the dim along which the parts lie.
        start: where the first begins.
        width: of all parts together; None goes to the end.
        is_offset: whether the weight is kept as its difference from 1.

    Example:
        >>> w = torch.ones(4, 1)
        >>> scale_heads_(w, torch.tensor([0.5, 2.0]))
        >>> w.flatten()
        tensor([0.5000, 0.5000, 2.0000, 2.0000])
    """
    width = weight.shape[dim] - start if width is None else width
    by = factors.to(weight.device).repeat_interleave(width // factors.numel())
    mesh = getattr(weight, "device_mesh", None)
    if mesh is not None:
        full = by.new_ones(weight.shape[dim])
        full[start : start + width] = by
        by = _replicated(full.view(_facing(dim, weight.ndim)), mesh)
    else:
        weight = weight.narrow(dim, start, width)
        by = by.view(_facing(dim, weight.ndim))
    if is_offset:
        weight.copy_(weight * by + (by - 1))
    else:
        weight.mul_(by)


def _facing(dim: int, ndim: int) -> list[int]:
    return [-1 if d == dim else 1 for d in range(ndim)]


def _replicated(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """Put what all ranks hold on a mesh, so that every rank takes the part it needs."""
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


@final
class Held:
    """Where the parameters of layers are among those of a plugin, found anew when these change."""

    def __init__(self, layers: Sequence[ClippedLayer], device: torch.device) -> None:
        """Look for nothing yet."""
        self.layers = layers
        self.device = device
        self.is_held = torch.ones(len(layers), dtype=torch.bool, device=device)
        """bool ``[layers]``, false where the plugin was restricted to others."""
        self._owners = torch.empty(0, device=device)
        self._places: dict[int, list[tuple[Gain, int]]] = {}
        self._names: tuple[str, ...] | None = None

    def find(self, step: Step) -> None:
        """Find the positions in this step.

        Raises:
            AttachError: A layer is held in part, or none is held at all.
        """
        names = step.gradients.names
        if names is self._names:
            return
        where = {name: i for i, name in enumerate(names)}
        self._places = {}
        for number, layer in enumerate(self.layers):
            held = [gain for gain in layer.gains if gain.parameter in where]
            places = [(gain, where[gain.parameter]) for gain in held]
            if places:
                _refuse_partial(layer, [gain.parameter for gain in held])
                self._places[number] = places
        if not self._places and not step.named:
            raise AttachError(
                "qk-clip is to scale weights that no optimizer holds, as"
                f" {self.layers[0].gains[0].parameter}; those it holds are like {names[0]}"
            )
        self._names = names
        self._index(len(names))

    def _index(self, count: int) -> None:
        owners, held = [-1] * count, [False] * len(self.layers)
        for number, places in self._places.items():
            owners[places[0][1]], held[number] = number, True
        self._owners = torch.tensor(owners, device=self.device)
        self.is_held = torch.tensor(held, device=self.device)

    def marked(self, layers: Tensor) -> Tensor:
        """Return which parameters stand for layers, bool ``[P]`` from bool ``[layers]``."""
        return layers[self._owners.clamp(min=0)] & (self._owners >= 0)

    def scale_(self, step: Step, factors: Tensor, acting: Sequence[bool]) -> None:
        """Multiply the logits of heads by factors ``[layers, heads]`` where a layer is acted on."""
        params = step.parameters
        for number, places in self._places.items():
            if not acting[number]:
                continue
            layer = self.layers[number]
            shared = group_factors(factors[number, : layer.heads], layer.groups)
            for gain, i in places:
                scale_heads_(
                    params[i].detach(),
                    shared**gain.share,
                    dim=gain.dim,
                    start=gain.start,
                    width=gain.width,
                    is_offset=gain.is_offset,
                )


def _refuse_partial(layer: ClippedLayer, held: list[str]) -> None:
    missing = [gain.parameter for gain in layer.gains if gain.parameter not in held]
    if missing:
        raise AttachError(
            f"qk-clip scales {', '.join(held)} together with {', '.join(missing)}, which no"
            " optimizer holds or which only(...) left out"
        )
