"""The gradients of one step as they lie in memory, and how whole tensors are measured there."""

from __future__ import annotations

from functools import cached_property
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple, cast, final

import torch
from torch import Tensor

from stablekit import _norms
from stablekit._sharding import LOCAL_PART, PLACES, is_dtensor, local, placed_like

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from stablekit._layout import Layout
    from stablekit._sharding import Span

_LAYOUT = attrgetter("layout")


class Reading(NamedTuple):
    """What was measured: of whole tensors, the same on every rank."""

    norms: Tensor
    """Float32 ``[P]``, zero where nobody asked."""
    units: dict[int, Tensor]
    """Position -> norms of the gradient's output units."""
    weights: dict[int, Tensor]
    """Position -> norms of the parameter's output units."""


@final
class Memory:
    """The local parts of the gradients, ``data``, and the reductions that measure the whole.

    An output unit is a row of dim 0; a tensor of fewer dims is one unit. Of a sparse gradient the
    rows it holds are the units. Where there is no gradient all norms are 0.
    """

    def __init__(
        self, params: list[Tensor], layout: Layout, *, unscale: Tensor | None, ride: Tensor | None
    ) -> None:
        """Find the gradients; nothing is read yet.

        Args:
            params: the parameters, in layout order.
            layout: their names and places.
            unscale: what gradients in memory must be multiplied by to be true (1 / loss scale).
            ride: float32 vector to be summed in the first reductions: its first two elements
                over every span, the others over all ranks. To the second is added what is not
                finite in tensors outside of a span, which its ranks would not hear of.
        """
        self.params = params
        self.layout = layout
        self.unscale = unscale
        self.ride = torch.empty(0, device=layout.device) if ride is None else ride
        self.data, self._is_usual = _local_gradients(params, layout)
        self.held, self.present = layout.everywhere, layout.everyone
        self.listened = False
        if not self._is_usual and type(None) in set(map(type, self.data)):
            self.held = tuple(i for i, data in enumerate(self.data) if data is not None)
            self.present = layout.mask(self.held)

    def read(
        self,
        norms: Iterable[int] = (),
        units: Iterable[int] = (),
        weights: Iterable[int] = (),
        *,
        first: bool = False,
    ) -> Reading:
        """Measure tensors at these positions, with one reduction a span where they are cut.

        Args:
            norms: whose norms to read.
            units: whose unit norms to read; not the positions in ``norms``.
            weights: whose parameters' unit norms to read.
            first: whether presence and what rides along are to be agreed on too.
        """
        whole = (*norms, *(i for i in units if not self.has_rows(i)))
        found = Reading(
            self._local_norms(whole),
            {i: self._local_units(i) for i in units if self.has_rows(i)},
            self._local_weights(list(weights)),
        )
        for span in self.layout.spans:
            if first or not span.members.isdisjoint((*whole, *found.units, *found.weights)):
                found = self._agree(span, found, first=first)
        single = {i: found.norms[i : i + 1] for i in units if i not in found.units}
        return found._replace(units={**found.units, **single})

    def largest(self, unit_factors: Mapping[int, Tensor]) -> Tensor:
        """Return the largest absolute element of each tensor, times unit factors, ``[P]``."""
        values = [self._peak(i, unit_factors).to(self.layout.device) for i in self.held]
        peaks = self._spread(torch.stack(values) if values else None, self.held)
        for span in self.layout.spans:
            peaks = span.put(peaks, span.largest(span.of(peaks)))
        return peaks

    def leave(self) -> None:
        """Work on copies from now on, so that nothing done here reaches the gradients."""
        self.data = [None if data is None else data.clone() for data in self.data]

    def has_rows(self, i: int) -> bool:
        """Tell whether the units of tensor i are rows; otherwise it is one unit as a whole."""
        return i in self._with_rows

    @cached_property
    def _with_rows(self) -> frozenset[int]:
        shown = (p if d is None else d for p, d in zip(self.params, self.data, strict=True))
        return frozenset(i for i, tensor in enumerate(shown) if tensor.ndim > 1)

    def unit_count(self, i: int) -> int:
        """Return how many output units tensor i has."""
        data, param = self.data[i], self.params[i]
        if not self.has_rows(i):
            return 1
        return (param if data is None or is_dtensor(param) else data).shape[0]

    def over_units(self, factors: Tensor, i: int) -> Tensor:
        """Return one factor a unit, shaped to multiply what this rank holds of tensor i."""
        data = self.local(i)
        rows = self.layout.rows(i, self.params[i]) if data.ndim > 1 else None
        here = (factors if rows is None else factors[rows]).to(data.device, non_blocking=True)
        return here.view(-1, *[1] * (data.ndim - 1)) if data.ndim else here.view(())

    def local(self, i: int) -> Tensor:
        """Return this rank's part of a gradient that is there."""
        data = self.data[i]
        assert data is not None
        return data

    def _local_norms(self, positions: Sequence[int]) -> Tensor:
        if self._is_usual and positions == self.layout.everywhere:
            parts = cast("list[Tensor]", self.data)
            return self._true(_norms.tensor_norms(parts, self.layout.shapes_of(parts)))
        held = tuple(i for i in sorted(positions) if self.data[i] is not None)
        if not held:
            return self._spread(None, ())
        read = _norms.tensor_norms([data for i in held if (data := self.data[i]) is not None])
        return self._spread(self._true(read.to(self.layout.device)), held)

    def _local_units(self, i: int) -> Tensor:
        if self.data[i] is None:
            return torch.zeros(self.unit_count(i), device=self.layout.device)
        return self._whole(i, self._true(_norms.unit_norms(self.local(i))))

    def _local_weights(self, positions: list[int]) -> dict[int, Tensor]:
        weights = {i: self._weight(i) for i in positions if self._is_weighed(i)}
        found = {
            i: torch.zeros(self.unit_count(i), device=self.layout.device)
            for i in positions
            if i not in weights
        }
        rows = [i for i in weights if self.has_rows(i)]
        found.update((i, self._whole(i, _norms.unit_norms(weights[i]))) for i in rows)
        single = [i for i in weights if not self.has_rows(i)]
        if single:
            norms = _norms.tensor_norms([weights[i] for i in single]).to(self.layout.device)
            found.update(zip(single, norms.split(1), strict=True))
        return found

    def _is_weighed(self, i: int) -> bool:
        """Tell whether a parameter must be read: other ranks may have the gradient of a cut one."""
        return self.data[i] is not None or is_dtensor(self.params[i])

    def _weight(self, i: int) -> Tensor:
        param = self.params[i]
        weight = local(param.detach()) if i in self.layout.on_mesh else param
        if param.grad is not None and param.grad.is_sparse and self.has_rows(i):
            return weight[param.grad._indices()[0]]
        return weight

    def _agree(self, span: Span, found: Reading, *, first: bool) -> Reading:
        """Replace what this rank found of its parts by what all ranks found together."""
        tables = (dict(found.units), dict(found.weights))
        slots = [(table, i) for table in tables for i in table if i in span.members]
        units = span.own_units([table[i] for table, i in slots], [i for _, i in slots])
        norms = [span.own(span.of(found.norms)), *units]
        riders = self._riders(span, found) if first else []
        (agreed, *more), ridden = span.join(norms, *riders)
        for (table, i), whole in zip(slots, more, strict=True):
            table[i] = whole
        if first:
            flags, ride = ridden
            self.present = span.put(self.present, flags > 0)
            self.ride = ride if span.is_world else torch.cat([ride, self.ride[2:]])
        return Reading(span.put(found.norms, agreed), *tables)

    def _riders(self, span: Span, found: Reading) -> list[Tensor]:
        """Return what is to be summed besides norms: who has a gradient, and what rides along."""
        if span.outside and len(self.ride):
            self._warn(span, found)
        is_everyone = self.present is self.layout.everyone and span.is_whole
        flags = self.layout.ones if is_everyone else span.of(self.present).float()
        return [flags, self.ride if span.is_world else self.ride[:2]]

    def _warn(self, span: Span, found: Reading) -> None:
        """Add what is not finite here, and not in the span, to what rides along."""
        norms = [found.norms[self.layout.subset(span.outside)]]
        norms += [found.units[i] for i in span.outside if i in found.units]
        joined = torch.cat(norms)
        bad = torch.where(joined.isfinite(), 0.0, joined).sum()
        self.listened = True
        self.ride = self.ride.index_add(0, self.layout.subset((1,)), bad.view(1))

    def _whole(self, i: int, units: Tensor) -> Tensor:
        """Put the units this rank holds in their places among all units, zero elsewhere."""
        units = units.to(self.layout.device)
        rows = self.layout.rows(i, self.params[i])
        if rows is None:
            return units
        full = torch.zeros(self.params[i].shape[0], device=self.layout.device)
        return full.index_copy(0, rows, units)

    def _peak(self, i: int, unit_factors: Mapping[int, Tensor]) -> Tensor:
        data = self.local(i)
        if data.numel() == 0:
            return torch.zeros(())
        if i in unit_factors:
            data = data * self.over_units(unit_factors[i], i)
        low, high = torch.aminmax(data.abs() if data.is_complex() else data)
        return self._true(torch.maximum(-low, high).float())

    def _true(self, values: Tensor) -> Tensor:
        return values if self.unscale is None else values * self.unscale.to(values.device)

    def _spread(self, values: Tensor | None, positions: tuple[int, ...]) -> Tensor:
        """Put values of some tensors into a vector over all, zero elsewhere."""
        if values is not None and positions == self.layout.everywhere:
            return values
        full = torch.zeros(len(self.params), device=self.layout.device)
        if values is None:
            return full
        return full.index_copy(0, self.layout.subset(positions), values)


def _local_gradients(params: list[Tensor], layout: Layout) -> tuple[list[Tensor | None], bool]:
    """Return this rank's dense part of every gradient, None where there is none.

    Also whether all are there, placed and laid out like the parameters.
    """
    grads = [param.grad for param in params]
    are_plain = not layout.on_mesh and set(map(type, grads)) == {Tensor}
    if are_plain and set(map(_LAYOUT, grads)) == {torch.strided}:
        return grads, True
    all_on_mesh = layout.places and set(map(type, grads)) == layout.kinds
    if all_on_mesh and list(map(PLACES, grads)) == layout.places:
        return list(map(LOCAL_PART, grads)), True
    named = zip(params, layout.names, strict=True)
    return [_local_gradient(param, name) for param, name in named], False


def _local_gradient(param: Tensor, name: str) -> Tensor | None:
    """Return the dense local data of a gradient.

    One that means nothing as it is - sparse with repeated rows, or a DTensor placed otherwise than
    its parameter - is brought into order first, as the optimizer would have to.
    """
    grad = param.grad
    if grad is None:
        return None
    if grad.is_sparse:
        if not grad.is_coalesced():
            param.grad = grad = grad.coalesce()
        return grad._values()
    if is_dtensor(grad) or is_dtensor(param):
        placed = placed_like(grad, param, name)
        if placed is not grad:
            param.grad = placed
        return local(placed)
    return grad
